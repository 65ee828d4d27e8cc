"""A role's checkpoint on one to four ranks, at ZeRO stage 0 to 3: seconds and memory of opening one of as many ranks
and one of another number, and seconds of writing beside DeepSpeed's own way.

    python -m benchmarks.opening --out benchmarks/results/opening.json

Processes of one thread each, fp32, files forced to the disk. Seconds are those of the slowest rank; ways take turns,
and each goes first in half of the pairs. Ends with 1 where another number of ranks takes more than twice as long to
open, where a rank needs more than its part and two layers, or where the median of ours / DeepSpeed's is over 1.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.layout_pairs import peak_of, shape
from benchmarks.ppo_iteration import machine
from training.run_directory import versions, write_json

RANKS = 4
PAIRS = ((1, 0, 1, 0), (2, 3, 2, 3), (1, 0, 2, 3), (4, 3, 2, 3), (2, 3, 4, 2), (4, 1, 1, 0), (2, 2, 2, 2), (4, 3, 4, 3))
"""Ranks and ZeRO stage that write; those that open."""


def run_rank(arguments: argparse.Namespace) -> None:
    """One rank; the first prints what all measured."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from training.distributed import start_ranks, stop_ranks
    from training.hybrid_engine.zero_engine import MOMENTS, ZeroEngine
    from training.models.policy import Policy
    from training.role_settings import LoRASettings, OptimizerSettings

    ranks = start_ranks(1)
    groups = {size: ranks.part(range(size)) for size in range(1, RANKS + 1)}

    def make(size: int, stage: int) -> Any:
        group = groups[size]
        if group is None:
            return None
        torch.manual_seed(0)
        policy = Policy(LlamaForCausalLM(LlamaConfig(**shape())), LoRASettings(rank=0))
        engine = ZeroEngine(policy, OptimizerSettings(zero_stage=stage), torch.float32, 10, group)
        for weight in engine.own_weights():
            about = {moment: torch.randn_like(weight) for moment in MOMENTS}
            engine.engine.basic_optimizer.state[weight].update(step=torch.tensor(1.0), **about)
        return engine

    def seconds_of(function: Callable[[Path], Any], engine: Any, place: Path, writes: bool) -> float:
        """Of the slowest rank; what was written is forced to the disk."""
        ranks.barrier()
        begun = time.perf_counter()
        if engine is not None:
            function(place)
        ranks.barrier()
        for file in place.rglob("*") if writes and ranks.is_first else ():
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        ranks.barrier()
        return max(ranks.gather(time.perf_counter() - begun))

    directory = Path(ranks.tell(tempfile.mkdtemp(dir=arguments.directory) if ranks.is_first else None, "a directory"))
    place, own, deepspeeds_own = (directory / name for name in ("written", "own", "deepspeed"))
    rows, writing = [], []
    for wrote, wrote_at, opens, opens_at in PAIRS:
        engine = make(wrote, wrote_at)
        ways = (
            ("ours", engine and engine.save, place),
            ("DeepSpeed's", engine and by_deepspeed(engine), deepspeeds_own),
        )
        timed = arguments.pairs + 1 if [wrote, wrote_at] not in [each[:2] for each in writing] else 1
        taken = [
            {way: seconds_of(save, engine, at, True) for way, save, at in (ways if number % 2 else ways[::-1])}
            for number in range(timed)
        ]
        if timed > 1:
            writing.append([wrote, wrote_at, taken[1:]])  # the first pair warms up
        engine = make(opens, opens_at)
        if engine is not None:
            engine.save(own)
            engine.engine.basic_optimizer.state.clear()
        ranks.barrier()
        peak = peak_of(lambda engine=engine: engine and engine.load(place))
        part = 3 * sum(weight.nbytes for weight in engine.own_weights()) if engine else 0
        seconds: dict[str, list[float]] = {"own": [], "other": []}
        for number in range(arguments.pairs):
            for name, at in (("own", own), ("other", place))[:: 1 if number % 2 else -1]:
                seconds[name].append(seconds_of(engine and engine.load, engine, at, False))
        rows.append({"pair": (wrote, wrote_at, opens, opens_at), "peaks": ranks.gather((peak, part)), **seconds})
        if ranks.is_first:
            for each in (place, own, deepspeeds_own):
                shutil.rmtree(each, ignore_errors=True)
        ranks.barrier()
    if ranks.is_first:
        print("FOUND " + json.dumps({"rows": rows, "writing": writing}))
        shutil.rmtree(directory)
    ranks.barrier()
    stop_ranks()


def by_deepspeed(engine: Any) -> Callable[[Path], None]:
    def save(place: Path) -> None:
        with engine.ranks.as_world():
            engine.engine.save_checkpoint(str(place), "state", {"updates": 1})

    return save


def report(found: dict[str, Any]) -> tuple[str, bool]:
    layer = 4 * (4 * 512 * 512 + 3 * 512 * 1408)
    lines = ["| wrote | opens | own, s | this, s | ratio | peak beyond the moments, layers |", "|" + "---|" * 6]
    good = True
    for row in found["rows"]:
        wrote, wrote_at, opens, opens_at = row["pair"]
        own, other = (statistics.median(row[name]) for name in ("own", "other"))
        beyond = max((peak - part * 2 / 3) / layer for peak, part in row["peaks"])
        good = good and other <= 2 * own and beyond <= 2
        lines.append(
            f"| {wrote} ZeRO {wrote_at} | {opens} ZeRO {opens_at} | {own:.3f} | {other:.3f} | {other / own:.2f} "
            f"| {beyond:.2f} |"
        )
    lines += ["", "| wrote | ours, s | DeepSpeed's, s | ours / DeepSpeed's | interval of 95 % |", "|" + "---|" * 5]
    for size, stage, taken in found["writing"]:
        ours, theirs = (statistics.median(each[way] for each in taken) for way in ("ours", "DeepSpeed's"))
        ratios = sorted(each["ours"] / each["DeepSpeed's"] for each in taken)
        tails = [math.comb(len(ratios), k) / 2 ** len(ratios) for k in range(len(ratios))]
        left = max((k for k in range(len(ratios) // 2) if sum(tails[: k + 1]) <= 0.025), default=0)
        middle = statistics.median(ratios)
        good = good and middle <= 1
        interval = f"{ratios[left]:.2f} to {ratios[-1 - left]:.2f}"
        lines.append(f"| {size} ZeRO {stage} | {ours:.3f} | {theirs:.3f} | {middle:.2f} | {interval} |")
    return "\n".join(lines), good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--directory", type=Path, help="where checkpoints are written")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(arguments)
        return 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*launcher, str(RANKS), "-m", "benchmarks.opening", *sys.argv[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not lines:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    found = json.loads(lines[0].removeprefix("FOUND "))
    text, good = report(found)
    print(text)
    if arguments.out:
        write_json(arguments.out, {"machine": machine(), "versions": versions(), **found})
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
