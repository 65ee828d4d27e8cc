"""The planner against real PPO iterations on the machine that it was profiled on.

    python -m benchmarks.machine_runs --out runs.json      # half an hour on two cores
    python -m benchmarks.this_machine --runs runs.json

The four constants of the cost model are fitted to half of the runs, drawn at random, and predict the other half; so
often (`--draws`). Ends with 1 where the median of the mean errors is over the target.
"""

import argparse
import json
import random
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from applications.fit import find_shape
from benchmarks import work
from benchmarks.machine_runs import MachineRun
from benchmarks.work import LENGTHS, MINI_BATCHES, PROMPT_TOKENS, SAMPLES
from training.plan import Plan
from training.planner.augmented import AugmentedGraphs
from training.planner.calibration import fit
from training.planner.cost import CallCosts
from training.planner.estimate import Estimate, estimate
from training.planner.graph import DataflowGraph
from training.planner.hardware import Calibration
from training.planner.machine import MachineProfile
from training.planner.workload import Workload

MEAN_ERROR = 0.15
PULL = 0.02
"""To what the profile measured: a constant five times as large weighs as much as a run predicted 8 % off."""
LATENCY, OVERHEAD = 3e-4, 0.02
"""Seconds to start from, of a collective and of a call, where the profile does not know them."""
KINDS = ("generate", "score", "train")


@dataclass(frozen=True)
class Measured:
    """A run, what it took, and the machine as its ranks found it."""

    run: MachineRun
    seconds: dict[str, float]
    profile: MachineProfile
    workload: Workload

    @property
    def of_kind(self) -> dict[str, float]:
        """Seconds of generating, scoring and training; bringing weights there belongs to generating."""
        moving = self.seconds["reallocate"] + self.seconds["gather"]
        return {kind: self.seconds[kind] + (moving if kind == "generate" else 0.0) for kind in KINDS}

    def predicted(self, calibration: Calibration) -> Estimate:
        costs = CallCosts(self.workload, self.profile.calibrated(calibration).cluster)
        graphs = AugmentedGraphs(DataflowGraph.of("ppo"), costs)
        plan = Plan.of(self.run.config(1).rlhf, self.run.processes, self.workload.length)
        return estimate(plan, graphs)


def by_kind(found: Estimate) -> dict[str, float]:
    """Predicted seconds, with those of what comes before a call."""
    return {kind: sum(node.seconds for node in found.nodes if node.call.kind == kind) for kind in KINDS}


def read(file: Path) -> list[Measured]:
    values = json.loads(file.read_text(encoding="utf-8"))
    profiles = {int(ranks): MachineProfile.from_values(profile) for ranks, profile in values["profiles"].items()}
    return [
        Measured(run := MachineRun(**row["run"]), row["seconds"], profiles[run.processes], workload_of(run))
        for row in values["runs"]
    ]


def workload_of(run: MachineRun) -> Workload:
    models, lengths = work.models(run.size), LENGTHS[run.lengths].of(0)
    actor, scorer = find_shape(str(models.actor), None), find_shape(str(models.reward), None)
    assert actor is not None and scorer is not None
    return Workload.of(
        {"actor": actor, "reference": actor, "critic": scorer, "reward": scorer},
        SAMPLES, PROMPT_TOKENS, round(statistics.mean(lengths)), max(lengths), MINI_BATCHES,
        precision="fp32", checkpointing=False,
    )  # fmt: skip


def errors(runs: list[Measured], calibration: Calibration) -> list[float]:
    """Of an iteration's seconds, relative."""
    return [run.predicted(calibration).iteration_seconds / run.seconds["total"] - 1 for run in runs]


def calibrated(runs: list[Measured]) -> Calibration:
    """Fitted, starting from what the profile of several ranks measured."""
    profiled = max((run.profile for run in runs), key=lambda profile: profile.ranks).calibration
    prior = replace(
        profiled,
        collective_seconds=profiled.collective_seconds or LATENCY,
        controller_seconds=OVERHEAD,
    )

    def predict(calibration: Calibration) -> list[float]:
        return [run.predicted(calibration).iteration_seconds for run in runs]

    return fit(predict, [run.seconds["total"] for run in runs], prior, PULL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="file of benchmarks.machine_runs")
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    runs = read(arguments.runs)
    everything = calibrated(runs)
    print("| run | measured, s | generate, score, train | predicted, s | generate, score, train | error |")
    print("|---|---|---|---|---|---|")
    for run, error in zip(runs, errors(runs, everything), strict=True):
        found = run.predicted(everything)
        print(
            f"| {run.run} | {run.seconds['total']:.2f} | {', '.join(f'{s:.2f}' for s in run.of_kind.values())} "
            f"| {found.iteration_seconds:.2f} | {', '.join(f'{s:.2f}' for s in by_kind(found).values())} "
            f"| {error:+.0%} |"
        )
    print(f"\nfitted to all: {everything}")
    uncalibrated = [abs(errors([run], run.profile.calibration)[0]) for run in runs]
    print(f"nothing fitted, the profile's own constants: mean error {statistics.mean(uncalibrated):.1%}")
    draw, means = random.Random(arguments.seed), []
    for _ in range(arguments.draws):
        half = set(draw.sample(range(len(runs)), len(runs) // 2))
        calibration = calibrated([run for number, run in enumerate(runs) if number in half])
        others = errors([run for number, run in enumerate(runs) if number not in half], calibration)
        means.append(statistics.mean(map(abs, others)))
    median = statistics.median(means)
    print(
        f"fitted to half of {len(runs)} runs, mean error on the others: median of {arguments.draws} draws "
        f"{median:.1%}, range {min(means):.1%} to {max(means):.1%} (target {MEAN_ERROR:.0%})"
    )
    return 0 if median <= MEAN_ERROR else 1


if __name__ == "__main__":
    sys.exit(main())
