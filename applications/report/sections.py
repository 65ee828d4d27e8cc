"""The samples of the newest iteration that was written down, each token in the colour of its KL or its advantage."""

import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from applications.chat import chosen_of, facts
from applications.report.charts import VARIABLES, inline, number
from training.metrics import Journal
from training.pictures import CALL_COLOURS, PASS_COLOURS, ROW_COLOUR, Bar, Panel, draw, drawing, svg
from training.run_directory import RunDirectory, read_json
from training.steps import PPO

EACH = 3
"""Samples with the lowest reward, with the highest, and with most tokens."""
BOUNDS = {"kl": (0.1, 0.5, 2.0), "advantages": (0.25, 1.0, 2.0)}
"""From where on a token has each colour: nats, and standard deviations of the iteration's advantages."""
COLUMNS = {"kl": "KL", "advantages": "advantage", "values": "value", "logprobs": "log-probability"}
LISTED = 200
"""Tokens of a sample whose numbers stand in a table."""


@dataclass(frozen=True)
class ColouredSample:
    facts: str
    prompt: str
    response: Markup
    headings: list[str]
    table: list[list[str]]
    """Each token and its numbers."""


@dataclass(frozen=True)
class RolloutsPart:
    iteration: int
    samples: int
    """Of the iteration."""
    colours: list[str]
    """What tokens can be coloured by."""
    chosen: list[ColouredSample]


def rollouts_part(run: RunDirectory) -> RolloutsPart | None:
    """None where none were written."""
    rows, _ = Journal(run.step(PPO).rollouts_file).read_one()
    if not rows:
        return None
    colours = [name for name in BOUNDS if name in rows[0]]
    advantages = [value for row in rows for value in row["advantages"]]
    deviation = (sum(value**2 for value in advantages) / max(1, len(advantages))) ** 0.5
    units = {"kl": 1.0, "advantages": deviation or 1.0}
    chosen = [coloured(row, colours, units) for row in chosen_of(rows, EACH, EACH, EACH)]
    return RolloutsPart(rows[0]["number"], len(rows), colours, chosen)


def coloured(row: Mapping[str, Any], colours: list[str], units: Mapping[str, float]) -> ColouredSample:
    spans = []
    for place, token in enumerate(row["tokens"]):
        classes = " ".join(filter(None, (shade(name, row[name][place] / units[name]) for name in colours)))
        title = ", ".join(f"{COLUMNS[name]} {row[name][place]:+.2f}" for name in colours)
        shown = token.replace("\n", "↵\n")
        spans.append(Markup('<span class="{}" title="{}">{}</span>').format(classes, title, shown))
    columns = [name for name in COLUMNS if name in row]
    table = [
        [repr(token)[1:-1], *(f"{row[name][place]:z.2f}" for name in columns)]
        for place, token in enumerate(row["tokens"][:LISTED])
    ]
    headings = ["token", *(COLUMNS[name] for name in columns)]
    return ColouredSample(" · ".join(facts(row)), row["prompt"], Markup("").join(spans), headings, table)


def shade(name: str, value: float) -> str:
    """The class of a token: what it is coloured by, more or less than nothing, how much; empty where it is little."""
    strength = bisect_left(BOUNDS[name], abs(value))
    return f"{name}-{'more' if value > 0 else 'less'}-{strength}" if strength else ""


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
