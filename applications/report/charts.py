"""Charts of a page, drawn by matplotlib: coloured by the page's style sheet, read by hovering, without scripts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from training.config import RunConfig
from training.pictures import GRID, INK, SVG, drawing, svg
from training.steps import Step

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 10, 37
LINE = 16  # of the legend
THICK = 24  # of a bar and of an interval
IN_A_LINE = 6  # values under the pointer that stand in one line
MOST_POINTS = 60  # more than these are averaged in groups
FEW_POINTS = 12  # up to so many are drawn as dots too
LINE_COLOURS = {"a": "#2456c8", "b": "#b4570b", "c": "#11795f", "d": "#8a3ab9", "e": "#b3265e", "f": "#6d6a12"}
VARIABLES = {INK: "var(--soft)", GRID: "var(--grid)"} | {
    colour: f"var(--{name})" for name, colour in LINE_COLOURS.items()
}
LINE_COLOURS["soft"] = "#868e99"
VARIABLES[LINE_COLOURS["soft"]] = "var(--faint)"
"""What replaces the colours, so that the style sheet decides."""


@dataclass(frozen=True)
class Series:
    """One line. `colour` is one of LINE_COLOURS."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str = "a"
    spread: Sequence[float] = ()  # half the height of a band around each point
    line: str = "-"  # as matplotlib calls it: solid, dashed, dotted
    is_part: bool = False
    """Another line is the mean of this and others: it is thin, in no legend and under no pointer."""


@dataclass(frozen=True)
class Mark:
    """A dashed line across the chart, and what it means."""

    value: float
    label: str


@dataclass(frozen=True)
class Chart:
    title: str
    note: str
    series: Sequence[Series]
    x_label: str
    marks: Sequence[Mark] = ()
    from_zero: bool = False
    has_legend: bool = True  # else the page says what its lines are


@drawing()
def line_chart(chart: Chart, name: str) -> Markup:
    """The chart as an <svg>; series without points are left out. `name` is its own in the page."""
    lines = [thinned(line) for line in chart.series if line.points]
    named = [line for line in lines if not line.is_part]
    columns = min(len(named), 2)
    top = TOP + LINE * math.ceil(len(named) / columns if chart.has_legend else len(named) / IN_A_LINE)
    picture = Figure((WIDTH / 72, HEIGHT / 72))
    axes = picture.add_axes((LEFT / WIDTH, BOTTOM / HEIGHT, 1 - (LEFT + RIGHT) / WIDTH, 1 - (top + BOTTOM) / HEIGHT))
    for line in lines:
        draw(line, axes)
    xs = sorted({x for line in named for x, _ in line.points})
    for mark in chart.marks:
        axes.axhline(mark.value, color=LINE_COLOURS["soft"], linestyle="--", linewidth=1, clip_on=False)
        at: Any = {"xycoords": ("axes fraction", "data"), "xytext": (-3, 3), "textcoords": "offset points"}
        axes.annotate(mark.label, (1, mark.value), **at, ha="right", gid="mark")
    first, last = axes.dataLim.intervalx
    axes.set_xlim(*((first, last) if first < last else (first - 1, first + 1)))
    axes.set_xlabel(chart.x_label, labelpad=2)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    low, high = axes.dataLim.intervaly
    ticks = value_ticks(low, high, chart.from_zero)
    axes.set(yticks=ticks, ylim=(ticks[0], ticks[-1]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: number(value))
    axes.grid(axis="y", clip_on=False)
    if chart.has_legend:
        legend = axes.legend(
            loc="upper left", bbox_to_anchor=(0, 1 - 3 / HEIGHT), bbox_transform=picture.transFigure, ncols=columns
        )
        legend.set_gid("key")
    root = svg(picture, name, VARIABLES)
    root[:] = [*readouts(named, xs, axes), *root]
    ends = (f"{line.label} from {number(line.points[0][1])} to {number(line.points[-1][1])}" for line in named)
    return inline(root, "chart", f"{chart.title}: {'; '.join(ends)}")


def value_ticks(low: float, high: float, from_zero: bool) -> Sequence[float]:
    """A few round numbers from at or below `low` (and 0) to at or above `high`."""
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
        high = high if high > low else 1.0
    room = 0.0 if high - low > 1e-12 else abs(high) * 0.1 or 1.0
    return MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low - room, high + room)


def draw(series: Series, axes: Axes) -> None:
    """Band, line and last point; a dot for each where there are few. The legend has the last value."""
    xs, ys = zip(*series.points, strict=True)
    colour, soft = LINE_COLOURS[series.colour], series.colour == "soft"
    if series.spread:
        low, high = ([y + sign * s for y, s in zip(ys, series.spread, strict=True)] for sign in (-1, 1))
        axes.fill([*xs, *xs[::-1]], [*low, *high[::-1]], color=colour, alpha=0.14, clip_on=False)
    axes.plot(
        xs,
        ys,
        color=colour,
        linewidth=0.8 if series.is_part else 1.4 if soft else 2,
        alpha=0.55 if series.is_part else None,
        linestyle=series.line,
        marker="" if series.is_part else "o",
        markersize=4,
        markeredgewidth=0,
        markevery=1 if len(xs) <= FEW_POINTS else [-1],
        label=f"{series.label} {number(ys[-1])}",
        clip_on=False,
    )


def readouts(series: Sequence[Series], xs: Sequence[float], axes: Axes) -> list[Element]:
    """A strip for each x that shows its values, instead of the legend, while the pointer is over it."""
    centres = [float(axes.transData.transform((x, 0))[0]) for x in xs]
    bounds = [LEFT, *((a + b) / 2 for a, b in pairwise(centres)), WIDTH - RIGHT]
    values = [(line.label, dict(line.points)) for line in series]
    strips = []
    for (start, end), x in zip(pairwise(bounds), xs, strict=True):
        texts = [f"{label} {number(ys[x])}" for label, ys in values if x in ys]
        strip = Element(f"{SVG}g", {"class": "hit"})
        size = {"x": f"{start:.1f}", "width": f"{end - start:.1f}", "height": str(HEIGHT - BOTTOM)}
        SubElement(strip, f"{SVG}rect", size)
        for row, first in enumerate(range(0, len(texts), IN_A_LINE)):
            text = ", ".join(texts[first : first + IN_A_LINE])
            SubElement(strip, f"{SVG}text", {"y": str(12 + LINE * row)}).text = text if row else f"{x:g}: {text}"
        strips.append(strip)
    return strips


def inline(root: Element, kind: str, label: str) -> Markup:
    """The <svg> as a part of a page, as wide as what it stands in."""
    for name in ("width", "height", "version", "font-family", "font-size"):
        del root.attrib[name]
    root.attrib |= {"class": kind, "role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def thinned(series: Series) -> Series:
    """At most MOST_POINTS points: the means of groups of neighbours, each at the x of its last."""
    size = math.ceil(len(series.points) / MOST_POINTS)
    if size == 1:
        return series

    def means(values: Sequence[float]) -> list[float]:
        return [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]

    xs = [series.points[min(i + size, len(series.points)) - 1][0] for i in range(0, len(series.points), size)]
    ys = means([y for _, y in series.points])
    return replace(series, points=list(zip(xs, ys, strict=True)), spread=means(series.spread))


def number(value: float) -> str:
    """Three digits that matter, without trailing zeros; thousands as k, millions as M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:z.4g}" if abs(value) >= 1000 else f"{value:z.3g}"


@drawing()
def interval(rate: float, low: float, high: float, colour: str, name: str) -> Markup:
    """A rate from 0 to 1 with its interval, on a line with a mark at the coin's half."""
    picture, axes = strip()
    axes.set(xlim=(-0.02, 1.02), ylim=(-1, 1))
    axes.axhline(0, color=GRID, linewidth=1, clip_on=False)
    axes.axvline(0.5, color=LINE_COLOURS["soft"], linestyle="--", linewidth=1, clip_on=False)
    axes.hlines(0, low, high, color=LINE_COLOURS[colour], alpha=0.45, linewidth=4, clip_on=False)
    axes.plot(rate, 0, "o", color=LINE_COLOURS[colour], markersize=11, markeredgewidth=0, clip_on=False)
    return inline(svg(picture, name, VARIABLES), "interval", f"{rate:.1%}, from {low:.1%} to {high:.1%}")


@dataclass(frozen=True)
class Segment:
    label: str
    seconds: float
    colour: str


@drawing()
def stacked_bar(segments: Sequence[Segment], longest: float) -> Markup:
    """Seconds one behind the other; `longest` fills the whole width."""
    picture, axes = strip()
    axes.set(xlim=(0, longest), ylim=(-1, 1))
    start = 0.0
    titles: dict[str, str] = {}
    for part in segments:
        gid = f"part {len(titles)}"
        axes.barh(0, part.seconds, 2, start, color=LINE_COLOURS[part.colour], clip_on=False, gid=gid)
        titles[gid] = f"{part.label}: {part.seconds:.1f} s"
        start += part.seconds
    root = svg(picture, "", VARIABLES, titles)
    root.set("preserveAspectRatio", "none")
    return inline(root, "bar", f"{start:.1f} seconds")


def strip() -> tuple[Figure, Axes]:
    """A low picture, and the axes that fill it, unseen."""
    picture = Figure((WIDTH / 72, THICK / 72))
    axes = picture.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    return picture, axes


Rows = Sequence[Mapping[str, Any]]
PHASES = {
    "generate": "a",
    "generate_and_score": "a",
    "score": "b",
    "train": "c",
    "gather": "soft",
    "reallocate": "soft",
}
"""Phases of an iteration and their colours; what is not here is `other`."""


def charts(step: Step, rows: Rows, config: RunConfig) -> list[Chart]:
    """The curves of a step that have points."""
    unit = step.loss.replace(step.rows.unit, config.rows_of(step).unit)
    possible = ppo_charts(rows, config) if step.draws_samples else supervised_charts(rows, unit)
    return [chart for chart in possible if any(line.points for line in chart.series)]


def series(rows: Rows, key: str, label: str, colour: str = "a", spread: str = "") -> Series:
    """The rows that have the metric (and that of the band)."""
    chosen = [row for row in rows if is_number(row.get(key)) and (not spread or is_number(row.get(spread)))]
    points = [(row["number"], row[key]) for row in chosen]
    return Series(label, points, colour, [row[spread] for row in chosen] if spread else ())


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def supervised_charts(rows: Rows, unit: str) -> list[Chart]:
    x = "optimiser step"
    loss = series(rows, "loss", "train", "soft"), series(rows, "eval/loss", "held-out")
    accuracy = series(rows, "accuracy", "train", "soft"), series(rows, "eval/accuracy", "held-out")
    scores = series(rows, "eval/chosen", "chosen"), series(rows, "eval/rejected", "rejected", "b")
    rewards = series(rows, "eval/reward/chosen", "chosen"), series(rows, "eval/reward/rejected", "rejected", "b")
    unpaired = series(rows, "eval/reward/good", "good"), series(rows, "eval/reward/bad", "bad", "b")
    return [
        Chart("Accuracy", "share of pairs ranked right", accuracy, x, [Mark(0.5, "a coin")]),
        Chart("Loss", unit, loss, x),
        Chart("Perplexity", "of held-out demonstrations", [series(rows, "eval/perplexity", "perplexity")], x),
        Chart("Scores", "mean of held-out answers, raw", scores, x),
        Chart("Implicit rewards", "mean of held-out answers", rewards, x),
        Chart("Implicit rewards", "mean of held-out answers", unpaired, x),
        speed(rows, x),
    ]


def ppo_charts(rows: Rows, config: RunConfig) -> list[Chart]:
    def chart(title: str, note: str, *lines: Series, marks: Sequence[Mark] = (), from_zero: bool = True) -> Chart:
        return Chart(title, note, lines, "iteration", marks, from_zero)

    def line(key: str, label: str, colour: str = "a", spread: str = "") -> Series:
        return series(rows, key, label, colour, spread)

    def held_out(metric: str) -> Series:
        return series(rows, f"eval/{metric}", "held-out", "b")

    kl = config.rlhf.kl
    bounds = [Mark(value, label) for value, label in ((kl.stop, "stop"), (kl.target, "target")) if value]
    means = {key for row in rows for key in row if key.startswith("reward/") and key.endswith("_mean")}
    sources = [
        line(key, key.removeprefix("reward/").removesuffix("_mean"), "abcdef"[index % 6])
        for index, key in enumerate(sorted(means - {"reward/score_mean"}))
    ]
    lengths = line("response/length_mean", "mean"), line("response/length_max", "longest", "soft"), held_out("length")
    seconds = [
        line(f"time/{phase}", phase.replace("_", " "), colour) for phase, colour in PHASES.items() if colour != "soft"
    ]
    score = line("reward/score_mean", "score", spread="reward/score_std")
    ended = line("response/ended_fraction", "ended"), held_out("ended_fraction")
    variety = line("response/distinct_bigrams", "variety"), held_out("distinct_bigrams")
    explained = line("value/explained_variance", "explained")
    return [
        chart("Score", "of all that rewards; band: one deviation", score, held_out("reward"), from_zero=False),
        chart("Rewards", "mean of each source", *sources * (len(sources) > 1), from_zero=False),
        chart("KL to the SFT model", "nats a response", line("kl/reference", "KL"), held_out("kl"), marks=bounds),
        chart("Length", "tokens of a response", *lengths),
        chart("Entropy", "nats a token; near 0 is collapse", line("policy/entropy", "entropy")),
        chart("Ended by itself", "share of responses", *ended, from_zero=False),
        chart("Variety", "distinct bigrams; falls when answers become alike", *variety),
        chart("Clipped", "share of tokens outside the clip range", line("policy/clip_fraction", "clipped")),
        chart("Critic", "explained variance; 1 is perfect", explained, marks=[Mark(0, "none")]),
        chart("Value loss", "of the critic", line("value/loss", "loss")),
        chart("Seconds an iteration", "by phase", *seconds),
        speed(rows, "iteration"),
    ]


def speed(rows: Rows, x: str) -> Chart:
    return Chart("Speed", "tokens a second", [series(rows, "tokens_per_second", "tokens")], x, from_zero=True)
