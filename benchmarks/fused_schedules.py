"""Fused schedules of actor and critic training beside RLHFuse's published ones (arXiv 2409.13221).

    python -m benchmarks.fused_schedules --csv tests/data/fused_schedule_instances.csv
    python -m benchmarks.fused_schedules --csv FILE --only 1 --svg schedule.svg
    python -m benchmarks.fused_schedules --csv FILE --beyond

Model A runs device 0 -> N - 1, model B the other way, in copies where it has fewer stages; a backward takes twice its
forward. Found schedules are checked by a second evaluator. Ends with 1 where a target is missed: serial 1F1B to the
unit; the lower bound met within 20 s; peak memory at most 10 % above that of the published annealed schedule. An
empty published cell is not compared. `--beyond` prints one more table: schedules with backwards cut into input and
weight gradients.
"""

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.fused_replay import check, replay
from training.pictures import Bar, Panel, gantt_svg
from training.planner.schedules.best import SECONDS, ScheduleResult, find_schedule
from training.planner.schedules.event_loop import PER_DEVICE, PER_MODEL, EventLoop, Rule
from training.planner.schedules.problem import (
    BACKWARD,
    FORWARD,
    KINDS,
    MODELS,
    ROUNDING,
    WEIGHT,
    Pipeline,
    SchedulingProblem,
)
from training.planner.schedules.schedule import Schedule, ScheduledOperation, serial_1f1b, timed

SECONDS_TARGET, MEMORY_TARGET = 20, 1.10
BACKWARD_TO_FORWARD = 2
SPLIT_SHARE = 0.5
"""Of `--beyond`."""
COLOURS = {
    "A forward": "#2597cf",
    "A backward": "#387ecd",
    "A weight": "#7459c8",
    "B forward": "#ab8b09",
    "B backward": "#d66c0f",
    "B weight": "#a9552a",
}


@dataclass(frozen=True)
class Row:
    """A problem and what was published about it; NaN where nothing was."""

    name: str
    problem: SchedulingProblem
    serial: float
    greedy: float
    annealed: float
    bound: float
    memory_serial: float
    memory_annealed: float

    @classmethod
    def of(cls, line: dict[str, str]) -> "Row":
        def pipeline(model: str) -> Pipeline:
            forward = float(line[f"forward_{model}"])
            return Pipeline(
                int(line[f"stages_{model}"]),
                int(line[f"microbatches_{model}"]),
                forward,
                BACKWARD_TO_FORWARD * forward,
                float(line[f"activation_{model}"]),
            )

        published = ("serial_1f1b", "greedy_published", "annealed_published", "lower_bound", "memory_serial")
        figures = [float(line.get(name) or math.nan) for name in (*published, "memory_annealed")]
        return cls(line["id"], SchedulingProblem(pipeline("a"), pipeline("b")), *figures)


@dataclass(frozen=True)
class Result:
    row: Row
    serial: Schedule
    greedy: Schedule
    outcome: ScheduleResult

    @property
    def memory_factor(self) -> float:
        """Against the published annealed schedule."""
        return self.outcome.schedule.peak_memory / self.row.memory_annealed

    @property
    def missed(self) -> list[str]:
        """Targets. Comparisons are such that NaN, nothing published, misses none."""
        row, outcome = self.row, self.outcome
        makespan = outcome.schedule.makespan
        checks = {
            "serial 1F1B": differs(self.serial.makespan, row.serial),
            "serial memory": differs(self.serial.peak_memory, row.memory_serial),
            "bound": not outcome.is_optimal and not makespan <= row.bound * (1 + ROUNDING),
            "seconds": outcome.seconds > SECONDS_TARGET,
            "memory": self.memory_factor > MEMORY_TARGET * (1 + ROUNDING),
        }
        return [f"{name} of {row.name}" for name, is_missed in checks.items() if is_missed]


def differs(ours: float, published: float) -> bool:
    return abs(ours - published) > ROUNDING * abs(published)


def read_rows(file: Path) -> list[Row]:
    with file.open(encoding="utf-8") as lines:
        return [Row.of(line) for line in csv.DictReader(lines)]


def solve(row: Row, seed: int, seconds: float) -> Result:
    outcome = find_schedule(row.problem, seed=seed, seconds=seconds)
    checked(outcome.schedule)
    return Result(row, serial_1f1b(row.problem), interleaved_greedy(row.problem), outcome)


def checked(schedule: Schedule) -> None:
    """By the second evaluator."""
    check(schedule)
    found = replay(schedule.problem, schedule.orders)
    if differs(found[0], schedule.makespan) or differs(found[1], schedule.peak_memory):
        raise AssertionError(f"two evaluators disagree: {found} and {schedule.makespan, schedule.peak_memory}")


def number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.10g}"


NAMES = "id|size|serial|publ.|greedy|publ.|fused|publ.|bound|publ.|serial B|fused B|publ.|short s|all s".split("|")
WIDTHS = (4, 12, 6, 6, 6, 6, 6, 6, 6, 6, 8, 7, 6, 7, 6)


def line_of(cells: Sequence[str]) -> str:
    return " ".join(cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=True))


def print_result(result: Result) -> None:
    """Published figures stand behind ours; B is memory, `short` the time to the makespan: the rest went into memory."""
    row, outcome, fused = result.row, result.outcome, result.outcome.schedule
    a, b = row.problem.models
    figures = (
        *(result.serial.makespan, row.serial, result.greedy.makespan, row.greedy, fused.makespan, row.annealed),
        *(outcome.lower_bound, row.bound, result.serial.peak_memory, fused.peak_memory, row.memory_annealed),
    )
    seconds = (f"{outcome.seconds_to_makespan:.1f}", f"{outcome.seconds:.1f}")
    size = f"{a.stages}/{b.stages} {a.micro_batches}/{b.micro_batches}"
    proved = "optimal" if outcome.is_optimal else "not proved to be optimal"
    line = line_of([row.name, size, *map(number, figures), *seconds])
    has_least_memory = fused.peak_memory <= outcome.memory_bound * (1 + ROUNDING)
    print(f"{line}  {proved}" + (", memory too" if has_least_memory else ""), flush=True)


def print_summary(results: list[Result]) -> list[str]:
    """Returns the targets that are missed."""
    missed = [name for result in results for name in result.missed]
    optimal = sum(result.outcome.is_optimal for result in results)
    gains = [result.serial.makespan / result.outcome.schedule.makespan for result in results]
    factors = [result.memory_factor for result in results if not math.isnan(result.memory_factor)]
    print(
        f"optimal in {optimal} of {len(results)}; {min(gains):.2f} to {max(gains):.2f} times faster than serial 1F1B; "
        f"at most {max(result.outcome.seconds for result in results):.1f} s (target {SECONDS_TARGET})"
    )
    if factors:
        print(
            f"peak memory against the published annealed schedule: {min(factors):.2f} to {max(factors):.2f} "
            f"(target {MEMORY_TARGET:.2f})"
        )
    print("MISSED: " + ", ".join(missed) if missed else "all targets met")
    return missed


def split_pipeline(pipeline: Pipeline, share: float = SPLIT_SHARE) -> Pipeline:
    """Make the weight-gradient part, that share of every backward, an operation of its own."""
    if pipeline.is_split or not 0 < share < 1:
        raise ValueError("only a whole backward can be split, and the share lies between 0 and 1")
    backwards = [times[BACKWARD] for times in pipeline.times]
    rest, weights = (tuple(time * part for time in backwards) for part in (1 - share, share))
    return replace(pipeline, backward=rest, weight=weights)


def split_problem(problem: SchedulingProblem, share: float = SPLIT_SHARE) -> SchedulingProblem:
    """Split the backwards of both models."""
    return replace(problem, a=split_pipeline(problem.a, share), b=split_pipeline(problem.b, share))


def split_schedule(schedule: Schedule, share: float = SPLIT_SHARE) -> Schedule:
    """Split every backward, the weight-gradient part right after the other."""
    operations: list[ScheduledOperation] = []
    for operation in schedule.operations:
        if operation.kind == BACKWARD:
            middle = operation.start + (1 - share) * (operation.end - operation.start)
            operations.append(operation._replace(end=middle))
            operations.append(operation._replace(kind=WEIGHT, start=middle))
        else:
            operations.append(operation)
    return Schedule(split_problem(schedule.problem, share), tuple(operations))


def print_split(results: list[Result], share: float, seed: int, seconds: float) -> None:
    """What split backwards bring. The search starts from the fused schedule, so it is never worse."""
    print(f"\nbackwards split, {share:.0%} for the weight gradients:")
    print("  id    whole    split    bound   memory    split")
    for result in results:
        whole = split_schedule(result.outcome.schedule, share)
        outcome = find_schedule(whole.problem, seed, seconds=seconds, start=whole)
        split = outcome.schedule
        checked(split)
        figures = (whole.makespan, split.makespan, outcome.lower_bound, whole.peak_memory, split.peak_memory)
        cells = " ".join(f"{number(figure):>8}" for figure in figures)
        print(f"{result.row.name:>4} {cells}  {'optimal' if outcome.is_optimal else ''}", flush=True)


def picture(result: Result) -> str:
    panels = [
        Panel(
            f"Instance {result.row.name}, {name}: {schedule.makespan:g}, peak memory {schedule.peak_memory:g}",
            {
                f"device {device}": [
                    Bar(f"{MODELS[each.model]} {KINDS[each.kind]}", each.start, each.end, str(each)) for each in row
                ]
                for device, row in enumerate(schedule.by_device)
            },
        )
        for name, schedule in (("serial 1F1B", result.serial), ("fused", result.outcome.schedule))
    ]
    shown = {bar.kind for panel in panels for bars in panel.rows.values() for bar in bars}
    return gantt_svg(panels, {kind: colour for kind, colour in COLOURS.items() if kind in shown}, unit="units")


def interleaved_greedy(problem: SchedulingProblem) -> Schedule:
    """Whatever is ready starts: backwards first, and of what else is equal the model with more work on a device.

    As in RLHFuse's greedy schedule nothing holds forwards back, no memory cap either.
    """
    boundless = replace(problem, memory_cap=math.inf)
    loop = EventLoop(boundless)
    count = len(loop.time)
    longest = max(loop.total) + 1
    priority = []
    for slot in range(count):
        device, (model, kind) = slot // PER_DEVICE, divmod(slot % PER_DEVICE, PER_MODEL)
        a, b = (each.micro_batches * sum(problem.times(place, device)) for place, each in enumerate(problem.models))
        priority.append([2.0 * (kind == FORWARD) + (model != (a < b))] * longest)
    rule = Rule(priority, [longest] * count, [[math.inf] * longest] * count)
    state = loop.run(rule)
    assert state is not None  # what is ready starts, so the devices cannot wait for each other
    return timed(boundless, loop.orders(state))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="a file of the published form")
    parser.add_argument("--only", nargs="+", metavar="ID", help="these instances alone")
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of a search")
    parser.add_argument("--svg", type=Path, help="draw the first instance, serial and fused, into this file")
    parser.add_argument("--beyond", action="store_true", help="also with split backwards")
    options = parser.parse_args(arguments)
    rows = [row for row in read_rows(options.csv) if not options.only or row.name in options.only]
    if not rows:
        parser.error(f"no such instance in {options.csv}: see its column id")
    print(line_of(NAMES))
    results = []
    for row in rows:
        results.append(solve(row, options.seed, options.seconds))
        print_result(results[-1])
    missed = print_summary(results)
    if options.svg:
        options.svg.write_text(picture(results[0]))
    if options.beyond:
        print_split(results, SPLIT_SHARE, options.seed, options.seconds)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
