"""Charts as inline SVG: coloured by CSS classes, read by hovering, without scripts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 200
LEFT, TOP, BOTTOM = 42, 16, 26
MOST_POINTS = 60
"""More than these are averaged in groups."""
FEW_POINTS = 12
"""Up to so many are drawn as dots too."""
LETTER = 6.1
"""Pixels of an average letter at the charts' font size."""
LINE = 13
"""Pixels between two labels, at least."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line. `colour` is a class of the style sheet: a, b, c or soft."""

    label: str
    points: Sequence[Point]
    colour: str = "a"
    spread: Sequence[float] = ()
    """Half the height of a band around each point."""


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

    def __html__(self) -> Markup:
        return line_chart(self)


@dataclass(frozen=True)
class Frame:
    """Where values lie in the picture."""

    first: float
    last: float
    low: float
    high: float
    right: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.first) / (self.last - self.first) * (self.right - LEFT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - BOTTOM - TOP)


def line_chart(chart: Chart) -> Markup:
    """The chart as an <svg>; series without points are left out."""
    series = [thinned(each) for each in chart.series if each.points]
    xs = sorted({x for each in series for x, _ in each.points})
    ticks = nice_ticks(*value_range(series, chart.marks, chart.from_zero), 4)
    first, last = (xs[0], xs[-1]) if xs[0] < xs[-1] else (xs[0] - 1, xs[0] + 1)
    frame = Frame(first, last, ticks[0], ticks[-1], WIDTH - label_width(series))
    parts = axes(chart, frame, ticks)
    for each in series:
        parts += drawn(each, frame)
    parts += end_labels(series, frame)
    parts += readouts(series, xs, frame, chart.x_label)
    summary = f"{chart.title}: " + "; ".join(
        f"{each.label} from {number(each.points[0][1])} to {number(each.points[-1][1])}" for each in series
    )
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}">'
        + "".join(parts)
        + "</svg>"
    )


def axes(chart: Chart, frame: Frame, ticks: Sequence[float]) -> list[str]:
    """Grid lines with their values, round places below, the meaning of the latter, and the marks."""
    across = f'x1="{LEFT}" x2="{frame.right:.1f}"'
    parts = []
    for tick in ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" {across} y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in nice_ticks(frame.first, frame.last, 4):
        if frame.first <= tick <= frame.last and tick == round(tick):
            place = f'x="{frame.x(tick):.1f}" y="{HEIGHT - BOTTOM + 13}"'
            parts.append(f'<text class="tick" {place} text-anchor="middle">{number(tick)}</text>')
    middle = (LEFT + frame.right) / 2
    label = escape(chart.x_label)
    parts.append(f'<text class="axis" x="{middle:.1f}" y="{HEIGHT - 2}" text-anchor="middle">{label}</text>')
    for mark in chart.marks:
        y = frame.y(mark.value)
        parts.append(f'<line class="mark" {across} y1="{y:.1f}" y2="{y:.1f}"/>')
        place = f'x="{frame.right - 3:.1f}" y="{y - 3:.1f}" text-anchor="end"'
        parts.append(f'<text class="axis" {place}>{escape(mark.label)}</text>')
    return parts


def drawn(series: Series, frame: Frame) -> list[str]:
    """Band, line and last point; a dot for each where there are few."""
    parts = []
    if series.spread:
        edges = list(zip(series.points, series.spread, strict=True))
        corners = [(x, y + s) for (x, y), s in edges] + [(x, y - s) for (x, y), s in reversed(edges)]
        parts.append(f'<polygon class="band {series.colour}" points="{path(corners, frame)}"/>')
    parts.append(f'<polyline class="line {series.colour}" points="{path(series.points, frame)}"/>')
    shown = series.points if len(series.points) <= FEW_POINTS else series.points[-1:]
    return parts + [dot(point, frame, series.colour, 2.6) for point in shown]


def path(points: Sequence[Point], frame: Frame) -> str:
    return " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)


def dot(point: Point, frame: Frame, colour: str, radius: float) -> str:
    return f'<circle class="dot {colour}" cx="{frame.x(point[0]):.1f}" cy="{frame.y(point[1]):.1f}" r="{radius}"/>'


def label_width(series: Sequence[Series]) -> float:
    """Room at the right for the labels of the lines."""
    return max(len(end_label(each, len(series))) for each in series) * LETTER + 12


def end_label(series: Series, count: int) -> str:
    value = number(series.points[-1][1])
    return value if count == 1 else f"{series.label} {value}"


def end_labels(series: Sequence[Series], frame: Frame) -> list[str]:
    """Each line's name and last value beside its end, moved apart where they would overlap."""
    ends = sorted(series, key=lambda each: frame.y(each.points[-1][1]))
    heights: list[float] = []
    for each in ends:
        heights.append(max(frame.y(each.points[-1][1]), heights[-1] + LINE if heights else 0.0))
    too_low = max(0.0, heights[-1] - (HEIGHT - BOTTOM))
    parts = []
    for each, y in zip(ends, heights, strict=True):
        place = f'x="{frame.x(each.points[-1][0]) + 7:.1f}" y="{y - too_low + 3.5:.1f}"'
        parts.append(f'<text class="end {each.colour}" {place}>{escape(end_label(each, len(series)))}</text>')
    return parts


def readouts(series: Sequence[Series], xs: Sequence[float], frame: Frame, x_label: str) -> list[str]:
    """For each x an invisible strip that shows its values while the pointer is over it."""
    values = [dict(each.points) for each in series]
    bounds = [LEFT, *((frame.x(a) + frame.x(b)) / 2 for a, b in pairwise(xs)), frame.right]
    upright = f'y1="{TOP}" y2="{HEIGHT - BOTTOM}"'
    parts = []
    for (start, end), x in zip(pairwise(bounds), xs, strict=True):
        there = [(each, found[x]) for each, found in zip(series, values, strict=True) if x in found]
        texts = [number(y) if len(series) == 1 else f"{each.label} {number(y)}" for each, y in there]
        dots = "".join(dot((x, y), frame, each.colour, 3.6) for each, y in there)
        parts.append(
            f'<g class="hit"><rect x="{start:.1f}" y="0" width="{end - start:.1f}" height="{HEIGHT - BOTTOM}"/>'
            f'<g><line x1="{frame.x(x):.1f}" x2="{frame.x(x):.1f}" {upright}/>{dots}'
            f'<text x="{LEFT}" y="10">{escape(x_label)} {x:g}: {escape(", ".join(texts))}</text></g></g>'
        )
    return parts


def thinned(series: Series) -> Series:
    """At most MOST_POINTS points: the means of groups of neighbours, each at the x of its last."""
    size = math.ceil(len(series.points) / MOST_POINTS)
    if size == 1:
        return series

    def means(values: Sequence[float]) -> list[float]:
        return [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]

    xs = [series.points[min(i + size, len(series.points)) - 1][0] for i in range(0, len(series.points), size)]
    ys = means([y for _, y in series.points])
    return Series(series.label, list(zip(xs, ys, strict=True)), series.colour, means(series.spread))


def value_range(series: Sequence[Series], marks: Sequence[Mark], from_zero: bool) -> Point:
    """Lowest and highest value that the chart shows."""
    values = [mark.value for mark in marks] + [0.0] * from_zero
    for each in series:
        spread = each.spread or [0.0] * len(each.points)
        values += [y + sign * s for (_, y), s in zip(each.points, spread, strict=True) for sign in (-1, 1)]
    low, high = min(values), max(values)
    if high - low < 1e-12:
        room = abs(high) * 0.1 or 1.0
        return low - room, high + room
    return low, high


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from at or below `low` to at or above `high`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def number(value: float) -> str:
    """Three digits that matter, without trailing zeros; thousands as k, millions as M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"


def interval(rate: float, low: float, high: float, colour: str) -> Markup:
    """A rate from 0 to 1 with its interval, on a line with a mark at the coin's half. As wide as its place."""
    return Markup(
        f'<svg class="interval" role="img" aria-label="{rate:.1%}, from {low:.1%} to {high:.1%}">'
        '<line class="grid" x1="0" x2="100%" y1="12" y2="12"/><line class="mark" x1="50%" x2="50%" y1="0" y2="24"/>'
        f'<line class="whisker {colour}" x1="{low:.2%}" x2="{high:.2%}" y1="12" y2="12"/>'
        f'<circle class="dot {colour}" cx="{rate:.2%}" cy="12" r="6"/></svg>'
    )


@dataclass(frozen=True)
class Segment:
    label: str
    seconds: float
    colour: str


def stacked_bar(segments: Sequence[Segment], longest: float) -> Markup:
    """Seconds one behind the other; `longest` fills the whole width."""
    parts, start = [], 0.0
    for each in segments:
        x, width = start / longest, each.seconds / longest
        title = f"{each.label}: {each.seconds:.1f} s"
        parts.append(
            f'<rect class="fill {each.colour}" x="{x:.2%}" width="{width:.2%}" y="0" height="26">'
            f"<title>{escape(title)}</title></rect>"
        )
        start += each.seconds
    return Markup(f'<svg class="bar" role="img" aria-label="{start:.1f} seconds">{"".join(parts)}</svg>')
