"""The page of `rlhf-chat compare --out`: the table, and the curves of all runs in the same charts."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from applications.compare import Comparison, Group
from applications.report.charts import LINE_COLOURS, Chart, Series, charts
from applications.report.page import filled, read_metrics, title_of
from training.steps import STEPS, Step

LINES = {"-": "", "--": "6 3", ":": "2 3", "-.": "6 2 2 2"}
"""Kinds of lines, and what SVG calls them."""
COLOUR_NAMES = [name for name in LINE_COLOURS if name != "soft"]


def render_comparison(comparison: Comparison) -> str:
    headings, rows = comparison.table()
    steps = [(title_of(step), drawn) for step in STEPS if (drawn := list(charts_of(step, comparison)))]
    return filled(
        "comparison.html",
        kind="compare",
        name=f"{len(comparison.results)} runs compared",
        runs=[comparison.name(result) for result in comparison.results],
        notes=list(comparison.notes()),
        headings=headings,
        rows=[look(number, cells, group, is_group) for number, group, is_group, cells in rows],
        steps=steps,
        has_seeds=len(comparison.groups) < len(comparison.results),
    )


def look(number: int, cells: Sequence[str], group: Group, is_group: bool) -> dict[str, Any]:
    """A row of the table with its line in the charts, which is thin (no `is_line`) where a group has the thick one."""
    colour, line = style(number)
    is_line = is_group or len(group.results) == 1
    look = {"key": number, "is_line": is_line, "is_group": is_group, "colour": colour, "dashes": LINES[line]}
    return {"cells": cells, **look}


def style(number: int) -> tuple[str, str]:
    """Colour and kind of the line with a number, from 1."""
    turn, colour = divmod(number - 1, len(COLOUR_NAMES))
    return COLOUR_NAMES[colour], list(LINES)[turn % len(LINES)]


def charts_of(step: Step, comparison: Comparison) -> Iterator[Chart]:
    """Each line of the report's charts as a chart of its own, in which each group has that line."""
    drawn: dict[tuple[str, str], tuple[Chart, dict[int, list[Series]]]] = {}
    for number, group in enumerate(comparison.groups, 1):
        for result in group.results:
            for chart in charts(step, read_metrics(result.run.step(step)), result.config):
                for line in chart.series:
                    if line.points:
                        _, lines = drawn.setdefault((chart.title, line.label), (chart, {}))
                        lines.setdefault(number, []).append(line)
    for (title, label), (chart, by_number) in drawn.items():
        several = sum(name == title for name, _ in drawn) > 1
        of_groups = [line for number, lines in by_number.items() for line in of_group(number, lines)]
        named = f"{title}: {label}" if several else title
        yield replace(chart, title=named, series=of_groups, has_legend=False, marks=())


def of_group(number: int, lines: Sequence[Series]) -> list[Series]:
    """The lines of a group's runs, and of several the mean where all have a point."""
    colour, kind = style(number)
    if len(lines) == 1:
        return [Series(str(number), lines[0].points, colour, line=kind)]
    values = [dict(line.points) for line in lines]
    shared = [x for x, _ in lines[0].points if all(x in line for line in values)]
    together = [(x, mean(line[x] for line in values)) for x in shared]
    parts = [Series(str(number), line.points, colour, line=kind, is_part=True) for line in lines]
    return [*parts, Series(str(number), together, colour, line=kind)]
