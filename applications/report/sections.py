"""Parts of the report on step 3: its newest samples token by token, and what its ranks did when."""

import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from applications.chat import chosen_of, facts
from applications.report.charts import VARIABLES, inline, number
from training.metrics import Journal
from training.pictures import CALL_COLOURS, PASS_COLOURS, ROW_COLOUR, Bar, Panel, draw, drawing, svg
from training.run_directory import RunDirectory, read_json
from training.steps import PPO

SHOWN_SAMPLES = 3  # with the lowest reward, with the highest, and with most tokens
SHOWN_TOKENS = 200  # of a sample, in the table of numbers
SHADES = {"kl": (0.1, 0.5, 2.0), "advantages": (0.25, 1.0, 2.0)}
"""Where the three shades of a token begin: nats, and standard deviations of the iteration's advantages."""
TOKEN_COLUMNS = {"kl": "KL", "advantages": "advantage", "values": "value", "logprobs": "log-probability"}


def rollouts_part(run: RunDirectory) -> dict[str, Any] | None:
    """Samples of the newest iteration that was written down, each token in the colour of its KL or its advantage."""
    rows, _ = Journal(run.step(PPO).rollouts_file).read_one()
    if not rows:
        return None
    colours = [name for name in SHADES if name in rows[0]]
    advantages = [value for row in rows for value in row["advantages"]]
    deviation = (sum(value**2 for value in advantages) / max(1, len(advantages))) ** 0.5
    units = {"kl": 1.0, "advantages": deviation or 1.0}
    chosen = [coloured(row, colours, units) for row in chosen_of(rows, *3 * [SHOWN_SAMPLES])]
    return {"iteration": rows[0]["number"], "samples": len(rows), "colours": colours, "chosen": chosen}


def coloured(row: Mapping[str, Any], colours: list[str], units: Mapping[str, float]) -> dict[str, Any]:
    spans = []
    for index, token in enumerate(row["tokens"]):
        classes = " ".join(filter(None, (shade(name, row[name][index] / units[name]) for name in colours)))
        title = ", ".join(f"{TOKEN_COLUMNS[name]} {row[name][index]:+.2f}" for name in colours)
        text = token.replace("\n", "↵\n")
        spans.append(Markup('<span class="{}" title="{}">{}</span>').format(classes, title, text))
    columns = [name for name in TOKEN_COLUMNS if name in row]
    table = [
        [repr(token)[1:-1], *(f"{row[name][index]:z.2f}" for name in columns)]
        for index, token in enumerate(row["tokens"][:SHOWN_TOKENS])
    ]
    return {
        "facts": " · ".join(facts(row)),
        "prompt": row["prompt"],
        "response": Markup("").join(spans),
        "headings": ["token", *(TOKEN_COLUMNS[name] for name in columns)],
        "table": table,
    }


def shade(name: str, value: float) -> str:
    """The CSS class of a token, such as `kl-more-2`; empty where the value is small."""
    strength = bisect_left(SHADES[name], abs(value))
    return f"{name}-{'more' if value > 0 else 'less'}-{strength}" if strength else ""


def schedule_part(run: RunDirectory, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Seconds of each call as predicted and as they were, with the difference; means over the iterations. None where
    nothing was predicted, because no rates of the machine were known."""
    names = dict.fromkeys(key.split("/")[1] for row in metrics for key in row if key.endswith("/predicted"))
    file = run.step(PPO).iteration_file
    if not names or not file.exists():
        return None
    rows = []
    for name in names:
        predicted, achieved = (
            statistics.mean(row[key] for row in metrics if key in row)
            for key in (f"plan/{name}/predicted", f"plan/{name}/achieved")
        )
        difference = f"{predicted / achieved - 1:+.0%}" if achieved else ""
        rows.append((name.replace("_", " "), number(predicted), number(achieved), difference))
    iteration = read_json(file, "delete it")
    return {"rows": rows, "iteration": iteration["iteration"], "picture": gantt(iteration)}


def update_part(run: RunDirectory) -> dict[str, Any] | None:
    """The newest optimiser step in pipeline stages; None where none was made, or none before was timed."""
    file = run.step(PPO).iteration_file
    update = read_json(file, "delete it").get("update") if file.exists() else None
    picture = gantt(update) if update else None
    return {"order": update["order"], "picture": picture} if update and picture else None


@drawing()
def gantt(spans: Mapping[str, Any]) -> Markup | None:
    """What each rank did, under what it was to do: lists of (call, start, end) by rank. None where nothing was timed by
    itself, or nothing predicted."""
    panels = [
        Panel(title, {f"rank {rank}": [Bar(*span) for span in of_rank] for rank, of_rank in enumerate(spans[title])})
        for title in ("predicted", "achieved")
    ]
    if not all(any(panel.rows.values()) for panel in panels):
        return None
    shown = {bar.kind for panel in panels for bars in panel.rows.values() for bar in bars}
    known = CALL_COLOURS | PASS_COLOURS
    picture, titles = draw(panels, {kind: colour for kind, colour in known.items() if kind in shown})
    colours = {**VARIABLES, ROW_COLOUR: "var(--grid)"}
    return inline(svg(picture, "gantt", colours, titles), "gantt", "what each rank did when, predicted and achieved")
