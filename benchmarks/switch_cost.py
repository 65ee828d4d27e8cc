"""What switching the actor between training and generation costs: a PPO iteration under ZeRO 3 with tensor-parallel
generation, its share of reallocation, and the peak memory of a switch.

    python -m benchmarks.switch_cost --size m --processes 2 --tensor 2 --zero-stage 3

Processes of one thread each, the work of benchmarks/work.py. Seconds are medians of the slowest rank.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import our_ppo, work
from benchmarks.work import LENGTHS
from training.config import RunConfig

PHASES = ("reallocate", "generate", "gather", "score", "train")


def make_config(arguments: argparse.Namespace) -> RunConfig:
    lengths = LENGTHS[arguments.lengths]
    config = our_ppo.make_config(arguments.size, lengths, arguments.dtype, "fp32", arguments.iterations + 1, 1)
    rlhf = config.rlhf.model_copy(
        update={
            "generation_tensor_parallel": arguments.tensor,
            "actor": config.rlhf.actor.model_copy(update={"zero_stage": arguments.zero_stage}),
        }
    )
    return config.model_copy(update={"rlhf": rlhf})


def run_rank(arguments: argparse.Namespace) -> None:
    """One rank; the first prints what all measured."""
    from training.distributed import start_ranks, stop_ranks

    ranks = start_ranks(1)
    lengths = LENGTHS[arguments.lengths]
    with tempfile.TemporaryDirectory() as own:
        directory = Path(ranks.gather(own)[0])
        ppo = our_ppo.make_ppo(make_config(arguments), lengths, directory, ranks)
        rows = []
        for number in range(arguments.iterations + 1):
            metrics = ppo.iterate(number + 1, check=False).metrics
            rows.append({phase: metrics[f"time/{phase}"] for phase in PHASES} | {"total": sum_of_times(metrics)})
        moved = vars(ppo.roles.moves["actor_generate"].moved)
        weights = sum(p.numel() * p.element_size() for p in whole_parameters(ppo.roles.actor.language_model))
        shares = ranks.gather({"rows": rows[1:], "moved": moved, "weights": weights})
        ranks.barrier()
    if ranks.is_first:
        print("FOUND " + json.dumps(shares))
    stop_ranks()


def sum_of_times(metrics: dict[str, float]) -> float:
    return sum(value for name, value in metrics.items() if name.startswith("time/"))


def whole_parameters(model: Any) -> list[Any]:
    """Tensors of the whole sizes, without storage, also where ZeRO 3 has divided them."""
    import torch

    return [torch.empty(getattr(p, "ds_shape", p.shape), dtype=p.dtype, device="meta") for p in model.parameters()]


def report(shares: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    slowest = {
        phase: statistics.median(max(share["rows"][i][phase] for share in shares) for i in range(arguments.iterations))
        for phase in (*PHASES, "total")
    }
    moved = shares[0]["moved"]
    lines = [
        f"{arguments.size} {arguments.lengths} {arguments.dtype}: ZeRO {arguments.zero_stage} -> tensor-parallel "
        f"{arguments.tensor}, {arguments.processes} processes with one thread each",
        "",
        "| " + " | ".join((*PHASES, "total")) + " | reallocate / total |",
        "|" + "---|" * (len(PHASES) + 2),
        "| "
        + " | ".join(f"{slowest[phase]:.3f} s" for phase in (*PHASES, "total"))
        + f" | {slowest['reallocate'] / slowest['total']:.1%} |",
        "",
        f"weights {shares[0]['weights'] / 1e6:.1f} MB; into the first rank's part {moved['copied'] / 1e6:.1f} MB from "
        f"its own and {moved['received'] / 1e6:.1f} MB from others; buffer {moved['buffer'] / 1e6:.1f} MB",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(work.SIZES), default="m")
    parser.add_argument("--lengths", choices=list(LENGTHS), default="skew")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--zero-stage", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=3)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(arguments)
        return
    work.models(arguments.size)  # made before the ranks look for them
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*launcher, str(arguments.processes), "-m", "benchmarks.switch_cost", *sys.argv[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not found:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    print(report(json.loads(found[0].removeprefix("FOUND ")), arguments))


if __name__ == "__main__":
    main()
