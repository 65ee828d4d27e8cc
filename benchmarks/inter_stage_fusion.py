"""Generation and scoring with inter-stage fusion off and on, in turn, on the same samples, in real processes.

    python -m benchmarks.inter_stage_fusion --size m --lengths skew --picture timeline.svg --costs-out costs.json
    python -m benchmarks.inter_stage_fusion --size m --lengths tail512 --costs costs.json

The first pairs measure what work costs here (`--costs` takes that of another run instead); nothing is learnt after
them, so what is predicted for the pairs that count was not fitted to them. Of each pair it prints the seconds of both,
what the simulator predicted for each, and the idle time: rank-seconds from the first prompt to the last score in which
a rank did neither. What fusion could remove of it is the idle time with fusion off less what no schedule can avoid: all
work divided evenly, or the longest response decoded alone, whichever takes longer.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import work
from benchmarks.ppo_iteration import machine
from benchmarks.work import LENGTHS, SIZES

if TYPE_CHECKING:
    from training.distributed import Ranks
    from training.fusion.board import Span
    from training.fusion.choice import FusionChoice
    from training.fusion.costs import Costs
    from training.step3_rlhf.ppo import PPO

CALIBRATION = 2
"""Pairs that come before those that count."""
COLOURS = {"generate": "#4c78a8", "score": "#d66c0f", "migrate": "#de4b45", "idle": "#878c92", "train": "#3f9142"}


class Bench:
    """The trainer of one rank, asked for rollouts one by one."""

    def __init__(self, ranks: "Ranks", arguments: argparse.Namespace, directory: Path):
        from benchmarks import our_ppo
        from training.rlhf_settings import FusionSettings

        self.ranks, self.lengths = ranks, LENGTHS[arguments.lengths]
        pairs = arguments.pairs + CALIBRATION
        config = our_ppo.make_config(arguments.size, self.lengths, arguments.dtype, "fp32", 2 * pairs + 2, 1)
        config.rlhf.fusion = FusionSettings(mode=arguments.fusion)
        config.rlhf.generation_tensor_parallel = arguments.tensor
        self.ppo: PPO = our_ppo.make_ppo(config, self.lengths, directory, ranks)

    def rollout(self, number: int, choice: "FusionChoice", trains: bool = False) -> dict[str, Any]:
        """Generate and score the samples of pair `number` (and train on them)."""
        from training.step3_rlhf.timing import Clock

        rollouts = self.ppo.rollouts
        rollouts.forced_lengths = lambda _: self.lengths.of(number)
        rollouts.fusion.chooser.current = choice
        rollouts.fusion.chooser.next = lambda _: choice
        self.ranks.barrier()
        if trains:
            iteration = self.ppo.iterate(number + 1, check=False)
            metrics, clock = iteration.metrics, iteration.clock
        else:
            prompt_rows, clock = self.ppo.choose_prompts(number + 1), Clock()
            rollout = rollouts.start([self.ppo.prompts[row] for row in prompt_rows], prompt_rows, number + 1, clock)
            experience = rollout.generate_and_score() if rollout.is_fused else rollout.score(rollout.generate())
            metrics = rollout.learn(experience)
        return {
            "achieved": metrics.get("time/fusion_achieved"),
            "predicted": metrics.get("time/fusion_predicted"),
            "choice": str(choice),
            "spans": self.ranks.gather(clock.timeline.spans),
        }


def measure(ranks: "Ranks", arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """All pairs; the same on every rank."""
    from training.fusion.choice import FusionChoice

    bench = Bench(ranks, arguments, directory)
    fusion = bench.ppo.rollouts.fusion.chooser
    off = FusionChoice(None, "off in every other rollout of this benchmark")
    costs = calibrated(bench, off, arguments.costs)
    fusion.costs = costs
    chosen = fusion.choose(CALIBRATION)
    pairs = []
    for number in range(CALIBRATION, CALIBRATION + arguments.pairs):
        pair = {}
        for way, choice in (("off", off), ("on", chosen)):
            pair[way] = bench.rollout(number, choice, trains=number == CALIBRATION + arguments.pairs - 1)
            fusion.costs = costs  # nothing is learnt any more
        pairs.append(pair)
    longest = bench.lengths.longest if bench.lengths.spread == 0 else max(bench.lengths.of(0))
    alone = costs.prefill_seconds(work.PROMPT_TOKENS) + sum(
        costs.decode_seconds(1, work.PROMPT_TOKENS + done) for done in range(longest - 1)
    )
    return {"costs": asdict(costs), "chosen": str(chosen), "pairs": pairs, "longest_alone": alone}


def idle_seconds(spans: "list[Span]", start: float, end: float) -> float:
    """Time of one rank in start .. end that no span but an idle one covers."""
    busy = sum(max(0.0, min(span.end, end) - max(span.start, start)) for span in spans if span.kind != "idle")
    return end - start - busy


def calibrated(bench: Bench, off: "FusionChoice", file: Path | None) -> "Costs":
    """Costs measured on pair 1 (pair 0 warms up), or those of another run."""
    from training.fusion.costs import Costs

    fusion = bench.ppo.rollouts.fusion.chooser
    bench.rollout(0, off)
    fusion.costs = None if file is None else Costs.from_dict(json.loads(file.read_text()))
    bench.rollout(1, off)
    bench.rollout(1, fusion.choose(1))
    if file is not None:
        return Costs.from_dict(json.loads(file.read_text()))
    fusion.refit()
    assert fusion.costs is not None
    return fusion.costs


def figures(pair: dict[str, Any], longest_alone: float) -> dict[str, float]:
    """Seconds, idle rank-seconds and what of them could be removed."""
    found = {}
    for way in ("off", "on"):
        idle, busy, seconds = idle_and_busy(pair[way]["spans"])
        found |= {f"{way}_seconds": seconds, f"{way}_idle": idle, f"{way}_busy": busy}
        found[f"{way}_predicted"] = pair[way]["predicted"]
        found[f"{way}_achieved"] = pair[way]["achieved"]
    ranks = len(pair["off"]["spans"])
    unavoidable = max(0.0, ranks * max(found["off_busy"] / ranks, longest_alone) - found["off_busy"])
    found["removable"] = max(0.0, found["off_idle"] - unavoidable)
    return found


def idle_and_busy(spans: list[list["Span"]]) -> tuple[float, float, float]:
    """Rank-seconds of both between the first prompt and the last score, and the seconds between them."""

    rollout = [[span for span in rank if span.kind != "train"] for rank in spans]
    start = min(span.start for rank in rollout for span in rank)
    end = max(span.end for rank in rollout for span in rank if span.kind == "score")
    idle = sum(idle_seconds(rank, start, end) for rank in rollout)
    return idle, len(spans) * (end - start) - idle, end - start


def picture(pair: dict[str, Any], what: str) -> str:
    """The timelines of one pair, fusion off above fusion on."""
    from training.pictures import Bar, Panel, gantt_svg

    panels = []
    for way in ("off", "on"):
        spans = pair[way]["spans"]
        start = min(span.start for rank in spans for span in rank)
        rows = {
            f"rank {number}": [Bar(span.kind, span.start - start, span.end - start) for span in rank]
            for number, rank in enumerate(spans)
        }
        panels.append(Panel(f"Inter-stage fusion {way}: {what}", rows))
    return gantt_svg(panels, COLOURS)


def report(found: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints the table; returns what goes into the file."""
    rows = [figures(pair, found["longest_alone"]) for pair in found["pairs"]]

    def median(name: str) -> float:
        return statistics.median(row[name] for row in rows)

    print(f"{found['chosen']}\n")
    print("| fusion | seconds | predicted | idle rank-seconds |\n|---|---|---|---|")
    for way in ("off", "on"):
        shown = (median(f"{way}_{name}") for name in ("achieved", "predicted", "idle"))
        print(f"| {way} | " + " | ".join(f"{value:.3f}" for value in shown) + " |")
    ratio = statistics.median(row["off_achieved"] / row["on_achieved"] for row in rows)
    removable = sum(row["removable"] for row in rows)
    removed = sum(row["off_idle"] - row["on_idle"] for row in rows)
    errors = {way: [row[f"{way}_predicted"] / row[f"{way}_achieved"] - 1 for row in rows] for way in ("off", "on")}
    print(f"\noff / on: {ratio:.3f} (median of {len(rows)} pairs)")
    print(
        f"idle time that could be removed: {removable:.2f} rank-seconds; removed: {removed / max(removable, 1e-9):.0%}"
    )
    for way, wrong in errors.items():
        print(
            f"predicted against achieved, fusion {way}: {statistics.median(wrong):+.1%} (median), "
            f"{max(wrong, key=abs):+.1%} (worst)"
        )
    return {
        "machine": machine(),
        "work": {name: getattr(arguments, name) for name in ("size", "lengths", "dtype", "processes", "tensor")},
        "chosen": found["chosen"],
        "costs": found["costs"],
        "off_over_on": ratio,
        "removed_share_of_removable_idle": removed / max(removable, 1e-9),
        "pairs": rows,
    }


def worker(arguments: argparse.Namespace) -> None:
    """One of the processes; the first prints and writes."""
    from training.distributed import start_ranks, stop_ranks
    from training.run_directory import versions, write_json

    ranks = start_ranks(threads=1)
    try:
        found = measure(ranks, arguments, arguments.worker)
        if ranks.is_first:
            result = report(found, arguments)
            if arguments.out:
                write_json(arguments.out, {"versions": versions()} | result)
            if arguments.costs_out:
                write_json(arguments.costs_out, found["costs"])
            if arguments.picture:
                what = f"model {arguments.size}, lengths {arguments.lengths}, {ranks.size} processes with one core each"
                arguments.picture.parent.mkdir(parents=True, exist_ok=True)
                arguments.picture.write_text(picture(found["pairs"][-1], what))
        ranks.barrier()
    finally:
        stop_ranks()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="m")
    parser.add_argument("--lengths", choices=list(LENGTHS), default="skew")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel degree of generation")
    parser.add_argument("--fusion", choices=["inter", "auto"], default="inter", help="what `on` means")
    parser.add_argument("--pairs", type=int, default=6, help="that count; the last one trains too, for the picture")
    parser.add_argument("--costs", type=Path, help="JSON file of costs from another run")
    parser.add_argument("--costs-out", type=Path)
    parser.add_argument("--picture", type=Path, help="SVG file for the timelines of the last pair")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.worker:
        worker(arguments)
        return 0
    work.models(arguments.size)  # built here once, not by several processes at a time
    with tempfile.TemporaryDirectory() as directory:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.processes)]
        command = [sys.executable, "-W", "ignore", *launcher, "-m", "benchmarks.inter_stage_fusion", *sys.argv[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run([*command, "--worker", directory], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
