"""Gantt pictures: who did what when, as SVG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, ROW, GAP, HEAD = 960, 120, 26, 6, 28
"""Pixels: of the picture, of the labels, of a row, between rows, above a panel."""
FONT = 'font-family="system-ui, sans-serif" font-size="12"'


@dataclass(frozen=True)
class Bar:
    kind: str
    start: float
    end: float
    """Seconds."""
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """One chart: a title and, by the label of each row, its bars."""

    title: str
    rows: Mapping[str, Sequence[Bar]]


def gantt_svg(panels: Sequence[Panel], colours: Mapping[str, str], unit: str = "s") -> str:
    """The panels one below the other on one scale of time, with a legend; `colours` are by kind."""
    longest = max(bar.end for panel in panels for bars in panel.rows.values() for bar in bars)
    scale = (WIDTH - LEFT - 20) / longest
    parts: list[str] = []
    top = 10
    for panel in panels:
        parts.append(f'<text x="10" y="{top + 16}" {FONT} font-weight="bold">{escape(panel.title)}</text>')
        top += HEAD
        for label, bars in panel.rows.items():
            parts.append(f'<text x="10" y="{top + ROW - 9}" {FONT}>{escape(label)}</text>')
            parts.append(f'<rect x="{LEFT}" y="{top}" width="{longest * scale:.1f}" height="{ROW}" fill="#f4f4f4"/>')
            parts += [bar_svg(bar, top, scale, colours, unit) for bar in bars]
            top += ROW + GAP
        top += GAP
    parts += axis(top, longest, scale, unit)
    top += 30
    for place, (kind, colour) in enumerate(colours.items()):
        x = LEFT + place * 110
        parts.append(f'<rect x="{x}" y="{top}" width="14" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="{top + 12}" {FONT}>{escape(kind)}</text>')
    height = top + 26
    frame = f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">\n'
        + "\n".join([frame, *parts])
        + "\n</svg>\n"
    )


def bar_svg(bar: Bar, top: float, scale: float, colours: Mapping[str, str], unit: str) -> str:
    x, width = LEFT + bar.start * scale, max(0.5, (bar.end - bar.start) * scale)
    title = f"{bar.label or bar.kind}: {bar.start:.3f} to {bar.end:.3f} {unit}"
    return (
        f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="{ROW}" fill="{colours[bar.kind]}">'
        f"<title>{escape(title)}</title></rect>"
    )


def axis(top: float, longest: float, scale: float, unit: str) -> list[str]:
    """Ticks at round times, about ten of them."""
    step = next(
        step
        for power in range(-4, 6)
        for step in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
        if longest / step <= 10
    )
    parts = []
    for place in range(int(longest / step) + 1):
        x = LEFT + place * step * scale
        parts.append(f'<line x1="{x:.1f}" y1="{top - 6}" x2="{x:.1f}" y2="{top}" stroke="#888"/>')
        parts.append(f'<text x="{x:.1f}" y="{top + 14}" {FONT} text-anchor="middle">{place * step:g} {unit}</text>')
    return parts
