"""The samples of the newest iteration that was written down, each token in the colour of its KL or its advantage."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from applications.chat import chosen_of, facts
from training.metrics import Journal
from training.run_directory import RunDirectory
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
