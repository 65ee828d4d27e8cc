"""What `rlhf-chat plan` shows: a table and a Gantt picture as text, all of it as JSON, the picture as SVG."""

import math
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from applications.plan_request import PlanOutcome, Request
from inference.streams import columns
from training.pictures import CALL_COLOURS, Bar, Panel, gantt_svg
from training.plan import mesh_text
from training.planner.hardware import GIB
from training.planner.search import Estimate, Progress
from training.planner.table import Interval

COLUMNS = 72  # of the Gantt picture, where the terminal has so many
MENTIONED = 0.05  # seconds from which on what lies between the calls gets a line
LETTERS = {
    "actor_generate": "G",
    "actor_score": "a",
    "reference_score": "f",
    "reward_score": "r",
    "critic_score": "c",
    "actor_train": "A",
    "critic_train": "C",
}
OTHER = {"reallocation": ">", "offload": "^"}
SHOWN_ITERATION = 2  # of those that the schedule unrolls: it has neighbours on both sides


def progress(state: Progress) -> bool:
    """A line that is written over, on a terminal."""
    if sys.stderr.isatty():
        end = "\n" if state.step == state.steps else "\r"
        print(f"searching: {state.step / state.steps:4.0%}, best {state.best_seconds:.1f} s ", end=end, file=sys.stderr)
    return True


def as_text(request: Request, outcomes: Sequence[PlanOutcome]) -> str:
    cluster, workload = request.cluster, request.workload
    lines = [
        f"{cluster.nodes} x {cluster.devices_per_node} {cluster.device.name}; "
        f"one iteration: {workload.samples} samples of {workload.prompt_tokens} + {workload.response_tokens} tokens, "
        f"{workload.mini_batches} mini-batches, "
        f"{workload.precision}; the run: {request.config.rlhf.iterations} iterations",
        "",
    ]
    for outcome in outcomes:
        lines += plan_table(request, outcome) if outcome.estimate else [f"{outcome.name}: none. {outcome.why_not}"]
        lines.append("")
    lines += summary(request, outcomes)
    lines += textwrap.wrap(verdict(outcomes), max(20, columns()))
    best = outcomes[0].estimate
    if best is not None:
        lines += ["", f"One iteration of the plan '{outcomes[0].name}':", *gantt_text(best)]
    return "\n".join(lines)


def plan_table(request: Request, outcome: PlanOutcome) -> list[str]:
    """A line a call: ranks, layout, micro-batches, seconds; then what lies between the calls."""
    estimate = outcome.estimate
    assert estimate is not None
    lines = [f"{outcome.name}:" + (f" DOES NOT FIT. {outcome.why_not}" if outcome.why_not else "")]
    if outcome.refused:
        more = f" ({len(outcome.refused) - 1} more reasons in --json.)" if len(outcome.refused) > 1 else ""
        lines += textwrap.wrap(f"CANNOT BE RUN YET, only costed. {outcome.refused[0]}{more}", max(20, columns()))
    rows: list[tuple[str, ...]] = [("call", "ranks", "data", "tensor", "stages", "ZeRO", "micro", "seconds", "")]
    for node in estimate.nodes:
        if node.kind != "call":
            continue
        assignment = estimate.plan[node.name]
        layout = assignment.layout
        degrees = (layout.data, layout.tensor, layout.pipeline, layout.zero_stage, assignment.micro_batches)
        waits = "waits in host memory between uses" if assignment.offload else ""
        rows.append((node.name, ranks_text(layout.mesh), *map(str, degrees), f"{node.seconds:.2f}", waits))
    lines += table(rows, (16, 9, 5, 6, 6, 5, 6, 8))
    between = [node for node in estimate.nodes if node.kind != "call" and node.seconds >= MENTIONED]
    lines += [f"  {node.name:{min(58, max(0, columns() - 11))}} {node.seconds:7.2f}" for node in between]
    return lines


def ranks_text(mesh: tuple[int, ...]) -> str:
    """Ranks in their order, runs of them as `0-3`."""
    runs: list[tuple[int, ...]] = []
    for rank in mesh:
        follows = runs and runs[-1][-1] == rank - 1
        runs[-1:] = [(*runs[-1], rank)] if follows else [*runs[-1:], (rank,)]
    return ",".join(mesh_text(run) for run in runs)


def table(rows: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    """Lines of texts, all but the first and the last to the right; where they have no room, a sentence a row."""
    head, *rest = rows
    if sum(widths) + len(widths) + 1 > columns():
        figures = [[f"{name} {text}" for name, text in zip(head[1:], row[1:], strict=True) if text] for row in rest]
        return [f"  {row[0]}: {', '.join(shown).strip()}" for row, shown in zip(rest, figures, strict=True)]
    aligned = (
        [f"{row[0]:{widths[0]}}", *(f"{text:>{width}}" for text, width in zip(row[1:-1], widths[1:], strict=True))]
        for row in rows
    )
    return [f"  {' '.join(line)}  {row[-1]}".rstrip() for line, row in zip(aligned, rows, strict=True)]


def summary(request: Request, outcomes: Sequence[PlanOutcome]) -> list[str]:
    """Seconds of an iteration, memory, hours and cost of the run, plan by plan."""
    price = () if request.price is None else ("cost",)
    rows: list[tuple[str, ...]] = [("plan", "s/iteration", "GiB of memory", "hours", *price, "")]
    for outcome in outcomes:
        if outcome.estimate is None:
            continue
        memory = f"{outcome.estimate.peak_bytes / GIB:.1f} of {request.cluster.usable_memory / GIB:.0f}"
        cost, seconds = request.cost(outcome.estimate), outcome.estimate.iteration_seconds
        figures = [f"{seconds:.1f}", memory, f"{request.hours(outcome.estimate):.1f}"]
        figures += [] if cost is None else [f"{cost:.0f}"]
        marks = ["does not fit"] * bool(outcome.why_not) + ["cannot be run yet"] * bool(outcome.refused)
        marks += [f"{outcome.seconds:.1f} s fused"] * (outcome.seconds < seconds)
        rows.append((outcome.name, *figures, ", ".join(marks)))
    return table(rows, (16, 11, 13, 8, 10)[: len(rows[0]) - 1])


def verdict(outcomes: Sequence[PlanOutcome]) -> str:
    """Whether pipeline stages pay, and a fused schedule of actor and critic, a sentence; '' where it is not known."""
    runs = [(outcome, outcome.estimate.iteration_seconds) for outcome in outcomes if outcome.runs and outcome.estimate]
    plain = min((seconds for outcome, seconds in runs if outcome.stages == "no stages"), default=math.inf)
    staged = min((seconds for outcome, seconds in runs if outcome.stages != "no stages"), default=math.inf)
    fused = min((outcome.seconds for outcome, seconds in runs if outcome.seconds < seconds), default=math.inf)
    if math.inf in (plain, staged):
        return ""
    sentence = f"An iteration takes {plain:.1f} s at best without pipeline stages; with stages {staged:.1f} s, so they "
    sentence += "win" if staged < plain else "lose"
    if fused < math.inf:
        wins = "wins" if fused < min(plain, staged) else "loses"
        sentence += f"; with actor and critic in one fused schedule {fused:.1f} s, which {wins}"
    return sentence + "."


def rows_of(estimate: Estimate) -> dict[str, list[Interval]]:
    """The nodes of one iteration by the ranks that run them; ranks that run the same ones share a row."""
    shown = [i for i in estimate.schedule.intervals if i.iteration == SHOWN_ITERATION and i.node.ranks]
    ranks = sorted({rank for interval in shown for rank in interval.node.ranks})
    by_work: dict[tuple[str, ...], list[int]] = {}
    for rank in ranks:
        by_work.setdefault(tuple(i.node.name for i in shown if rank in i.node.ranks), []).append(rank)
    return {
        f"rank {mesh_text(tuple(members))}": [i for i in shown if members[0] in i.node.ranks]
        for members in by_work.values()
    }


def gantt_text(estimate: Estimate) -> list[str]:
    """A row for the ranks that do the same; a letter for what they do, a dot for nothing."""
    rows = rows_of(estimate)
    start = min(i.start for intervals in rows.values() for i in intervals)
    end = max(i.end for intervals in rows.values() for i in intervals)
    width = max(map(len, rows))
    room = max(8, min(COLUMNS, columns() - width - 5))
    scale = room / (end - start)
    lines = []
    for label, intervals in rows.items():
        line = ["."] * room
        for interval in intervals:
            letter = LETTERS.get(interval.node.name) or OTHER.get(interval.node.kind, "?")
            first, last = int((interval.start - start) * scale), int((interval.end - start) * scale)
            if interval.node.seconds > 0:
                line[first : max(last, first + 1)] = letter * (max(last, first + 1) - first)
        lines.append(f"  {label:{width}} |{''.join(line[:room])}|")
    shown = {interval.node.name for intervals in rows.values() for interval in intervals}
    names = ", ".join(f"{letter} {name}" for name, letter in LETTERS.items() if name in shown)
    return [*lines, f"  {end - start:.1f} s. {names}, > reallocation, ^ load from the host"]


def as_svg(outcomes: Sequence[PlanOutcome]) -> str:
    panels = []
    for outcome in outcomes:
        if outcome.estimate is None:
            continue
        rows = rows_of(outcome.estimate)
        start = min(i.start for intervals in rows.values() for i in intervals)

        def bar(i: Interval, start: float = start) -> Bar:
            kind = i.node.name if i.node.name in CALL_COLOURS else i.node.kind
            return Bar(kind, i.start - start, i.end - start, i.node.name)

        bars = {label: [bar(i) for i in intervals if i.node.seconds > 0] for label, intervals in rows.items()}
        panels.append(Panel(f"{outcome.name}: {outcome.estimate.iteration_seconds:.1f} s an iteration", bars))
    return gantt_svg(panels, CALL_COLOURS)


def as_data(request: Request, outcomes: Sequence[PlanOutcome]) -> dict[str, Any]:
    return {
        "gpu": request.cluster.device.name,
        "nodes": request.cluster.nodes,
        "gpus_per_node": request.cluster.devices_per_node,
        "iterations": request.config.rlhf.iterations,
        "stages": verdict(outcomes),
        "plans": [plan_data(request, outcome) for outcome in outcomes],
    }


def plan_data(request: Request, outcome: PlanOutcome) -> dict[str, Any]:
    """All that is known of a plan, in seconds and bytes."""
    estimate = outcome.estimate
    if estimate is None:
        return {"name": outcome.name, "why_not": outcome.why_not}
    calls = {}
    for node in estimate.nodes:
        if node.kind == "call" and node.cost is not None:
            assignment = estimate.plan[node.name]
            layout = assignment.layout
            calls[node.name] = {
                "mesh": list(layout.mesh),
                **{name: getattr(layout, name) for name in ("data", "tensor", "pipeline", "zero_stage")},
                "micro_batches": assignment.micro_batches,
                "offload": assignment.offload,
                "seconds": node.seconds,
                "parts": node.cost.parts(),
            }
    fullest = max(estimate.memory.values(), key=lambda memory: memory.peak("device"))
    return {
        "name": outcome.name,
        "fits": not outcome.why_not,
        "runs": outcome.runs,
        **({"refused": list(outcome.refused)} if outcome.refused else {}),
        **({"why_not": outcome.why_not} if outcome.why_not else {}),
        "seconds_per_iteration": estimate.iteration_seconds,
        **({"fused_seconds_per_iteration": outcome.seconds} if outcome.training else {}),
        "hours": request.hours(estimate),
        "cost": request.cost(estimate),
        "calls": calls,
        "between": {node.name: node.seconds for node in estimate.nodes if node.kind != "call"},
        "host_peak_bytes": request.host_peak(estimate.plan),
        "peak_bytes": {str(rank): memory.peak("device") for rank, memory in estimate.memory.items()},
        "memory_of_the_fullest_rank": [
            {"name": part.name, "bytes": part.bytes, "place": part.location, "phase": part.phase}
            for part in fullest.parts
        ],
        "schedule": [
            {"node": i.node.name, "iteration": i.iteration, "start": i.start, "end": i.end}
            for i in estimate.schedule.intervals
        ],
    }
