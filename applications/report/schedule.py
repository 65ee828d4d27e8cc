"""What the cost model said of the iterations of step 3, beside what they took."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from applications.report.charts import VARIABLES, inline, number
from training.gantt import CALL_COLOURS, PASS_COLOURS, Bar, Panel, draw
from training.pictures import ROW_COLOUR, drawing, svg
from training.run_directory import RunDirectory, read_json
from training.steps import PPO


@dataclass(frozen=True)
class SchedulePart:
    rows: list[tuple[str, str, str, str]]
    """Call, seconds predicted, seconds achieved (means over the iterations), difference."""
    iteration: int
    picture: Markup | None
    """What each rank did in this iteration, under what it was to do."""


def schedule_part(run: RunDirectory, metrics: Sequence[Mapping[str, Any]]) -> SchedulePart | None:
    """None where nothing was predicted: no rates of the machine were known."""
    names = dict.fromkeys(key.split("/")[1] for row in metrics for key in row if key.endswith("/predicted"))
    rows = []
    for name in names:
        predicted, achieved = (
            statistics.mean(row[key] for row in metrics if key in row)
            for key in (f"plan/{name}/predicted", f"plan/{name}/achieved")
        )
        apart = f"{predicted / achieved - 1:+.0%}" if achieved else ""
        rows.append((name.replace("_", " "), number(predicted), number(achieved), apart))
    file = run.step(PPO).iteration_file
    if not rows or not file.exists():
        return None
    found = read_json(file, "delete it")
    return SchedulePart(rows, found["iteration"], picture(found))


@dataclass(frozen=True)
class UpdatePart:
    order: str
    picture: Markup


def update_part(run: RunDirectory) -> UpdatePart | None:
    """The newest optimiser step in pipeline stages; None where none was made, or none before was timed."""
    file = run.step(PPO).iteration_file
    found = read_json(file, "delete it").get("update") if file.exists() else None
    drawn = picture(found) if found else None
    return UpdatePart(found["order"], drawn) if found and drawn is not None else None


@drawing()
def picture(found: Mapping[str, Any]) -> Markup | None:
    """None where nothing was timed by itself, or nothing predicted."""
    panels = [panel(title, found[title]) for title in ("predicted", "achieved")]
    if not all(any(panel.rows.values()) for panel in panels):
        return None
    shown = {bar.kind for each in panels for bars in each.rows.values() for bar in bars}
    known = CALL_COLOURS | PASS_COLOURS
    drawn, titles = draw(panels, {kind: colour for kind, colour in known.items() if kind in shown})
    colours = {**VARIABLES, ROW_COLOUR: "var(--grid)"}
    return inline(svg(drawn, "gantt", colours, titles), "gantt", "what each rank did when, predicted and achieved")


def panel(title: str, ranks: Sequence[Sequence[tuple[str, float, float]]]) -> Panel:
    """`ranks` hold call, start and end of what each did."""
    return Panel(title, {f"rank {rank}": [Bar(*span) for span in spans] for rank, spans in enumerate(ranks)})
