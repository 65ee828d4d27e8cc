"""What each piece of avoided work saves: one PPO iteration of ours with the piece put back, against one without.

    python -m benchmarks.savings --size m --lengths skew --dtype fp32

Each variant is a process of its own (benchmarks.our_ppo with one thing changed); the figures are medians of its
iterations after one that warms up. Balance over ranks is arithmetic: the largest share of tokens over the mean one.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import our_ppo
from benchmarks.ppo_iteration import machine
from benchmarks.turns import System, Worker, wait_until_quiet
from benchmarks.work import LENGTHS, PROMPT_TOKENS, SIZES
from training.run_directory import versions, write_json

PHASES = ("generate", "score", "train", "total")


def as_it_is() -> None:
    """Nothing put back."""


def padded() -> None:
    """Every family takes the path of those that cannot be packed, in generation, scoring and training."""
    import inference.generation.passes as passes
    import training.models.packing as packing

    packing.can_pack = passes.can_pack = lambda model: False


def logits_everywhere() -> None:
    """Logits at every token, of which those before response tokens are then taken."""
    import torch

    import training.models.policy as policy

    plain = policy.call_on_tokens

    def call(model, batch, logits_at=None, exact=None, received=None):
        if logits_at is None:
            return plain(model, batch)
        return plain(model, batch, torch.arange(len(batch.ids), device=batch.ids.device), exact)[logits_at]

    policy.call_on_tokens = call


def plain_weights() -> None:
    """Generation and scoring on the plain order of the weights."""
    import inference.generation.cpu_weights as cpu_weights

    cpu_weights.can_block = lambda model: False


def reduction_over_one_rank() -> None:
    """DeepSpeed's all-reduce of one rank with itself."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    import training.hybrid_engine.zero_engine as zero_engine

    made = zero_engine.ZeroEngine.__init__

    def make(self, *arguments):
        made(self, *arguments)
        self.engine.buffered_allreduce_fallback = DeepSpeedEngine.buffered_allreduce_fallback.__get__(self.engine)

    zero_engine.ZeroEngine.__init__ = make


VARIANTS: dict[str, tuple[str, Callable[[], None], tuple[str, ...]]] = {
    "as_it_is": ("as it is", as_it_is, ()),
    "recompute": ("old log-probabilities computed anew", as_it_is, ("--old-logprobs", "recompute")),
    "exact": ("training equal to generation (rlhf.exact)", as_it_is, ("--exact", "true")),
    "logits": ("logits at every token", logits_everywhere, ()),
    "padded": ("padded rows", padded, ()),
    "plain_weights": ("weights in their plain order", plain_weights, ()),
    "reduction": ("gradients reduced over one rank", reduction_over_one_rank, ()),
}


def balance(lengths: list[int], ranks: int) -> tuple[float, float]:
    """Largest share of tokens over the mean share: rows dealt in their order, and as they are dealt here."""
    from training.data.batching import plan_micro_batches

    tokens = [PROMPT_TOKENS + length for length in lengths]
    mean = sum(tokens) / ranks
    in_order = max(sum(tokens[rank::ranks]) for rank in range(ranks))
    plans = plan_micro_batches(tokens, 4096, ranks)
    dealt = max(sum(tokens[row] for batch in plan if batch.weight for row in batch.rows) for plan in plans)
    return in_order / mean, dealt / mean


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="m")
    parser.add_argument("--lengths", choices=list(LENGTHS), default="skew")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="beside as_it_is")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--patience", type=float, default=20, help="seconds to wait for an idle machine")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = {}
    for name, (_, _, flags) in VARIANTS.items():
        if name not in ("as_it_is", *arguments.only):
            continue
        work = ["--size", arguments.size, "--lengths", arguments.lengths, "--dtype", arguments.dtype, *flags]
        command = [sys.executable, "-m", "benchmarks.savings", "--variant", name, *work, "--turns"]
        command += ["--iterations", str(arguments.iterations)]
        with tempfile.TemporaryDirectory() as logs, Worker(System(name, command), Path(logs) / "log") as worker:
            found = []
            for number in range(arguments.iterations + 1):
                wait_until_quiet(arguments.patience)
                found.append(worker.iterate(number))
        rows[name] = {phase: statistics.median(row[phase] for row in found[1:]) for phase in PHASES}
    print(
        f"| {arguments.size} {arguments.lengths} {arguments.dtype} | "
        + " | ".join(f"{p}, s" for p in PHASES)
        + " | more |"
    )
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        more = row["total"] / rows["as_it_is"]["total"] - 1
        print(f"| {VARIANTS[name][0]} | " + " | ".join(f"{row[phase]:.2f}" for phase in PHASES) + f" | {more:+.0%} |")
    shares = {ranks: balance(LENGTHS[arguments.lengths].of(0), ranks) for ranks in (2, 4, 8)}
    for ranks, (in_order, dealt) in shares.items():
        print(f"{ranks} ranks: largest share of tokens {in_order:.2f} of the mean in order, {dealt:.2f} as dealt")
    if arguments.out:
        asked = {"size": arguments.size, "lengths": arguments.lengths, "dtype": arguments.dtype}
        write_json(
            arguments.out,
            {"machine": machine(), "versions": versions(), "work": asked, "seconds": rows, "balance": shares},
        )
    return 0


def run_variant(name: str, arguments: list[str]) -> None:
    """benchmarks.our_ppo with one thing put back, in this process."""
    with contextlib.redirect_stdout(sys.stderr):  # where DeepSpeed's logger goes from its import on
        VARIANTS[name][1]()
    sys.argv[1:] = arguments
    our_ppo.main()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--variant"]:
        run_variant(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
