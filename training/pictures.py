"""Pictures by matplotlib as SVG: text is text, nothing comes from outside, and the same picture is the same bytes.

matplotlib takes a second to import, so this module is imported where a picture is made.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Patch

FONT_SIZE = 12
GROUND, INK, GRID, ROW_COLOUR = "#ffffff", "#1b1f24", "#dcdcd7", "#f7f7f5"
DARK = {GROUND: "#14171b", INK: "#e7e8ea", GRID: "#3a4048", ROW_COLOUR: "#1b1f24"}
"""What they are where the reader prefers it dark; all other colours have to be legible on both grounds."""
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": FONT_SIZE,
    "text.color": INK,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.spines.bottom": False,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": FONT_SIZE,
    "axes.titleweight": "bold",
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    "figure.dpi": 72,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 1,
    "legend.borderaxespad": 0,
    "legend.borderpad": 0,
    "legend.columnspacing": 1,
    "legend.frameon": False,
    "legend.handlelength": 1,
    "legend.handletextpad": 0.4,
    "lines.solid_capstyle": "butt",
    "patch.linewidth": 0,
    "xtick.bottom": False,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.left": False,
}
INHERITED = {("font-size", f"{FONT_SIZE}px"), ("text-anchor", "start")}
SVG = "{http://www.w3.org/2000/svg}"
ElementTree.register_namespace("", SVG[1:-1])
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in our style, inside or in a function that it decorates."""
    with rc_context(STYLE):
        yield


def svg(
    picture: Figure, salt: str, colours: Mapping[str, str] | None = None, titles: Mapping[str, str] | None = None
) -> Element:
    """Make the <svg> without style attributes, so that a strict page can hold it.

    `salt` tells its ids from those of other pictures in a page, `colours` has what replaces a colour, `titles` what is
    shown over the artist with this gid. Other gids become classes.
    """
    file = BytesIO()
    with rc_context({"svg.hashsalt": salt}):
        picture.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(file.getvalue())
    root.remove(root[0])  # a rule for every element of the page
    tidy(root, colours or {}, titles or {})
    root.attrib |= {"font-family": "system-ui, sans-serif", "font-size": str(FONT_SIZE), "stroke-linejoin": "round"}
    return root


def tidy(element: Element, colours: Mapping[str, str], titles: Mapping[str, str]) -> None:
    """Turn style into attributes, ids into classes and titles; round coordinates, dissolve groups that say nothing."""
    element.tail = None
    element.text = (element.text or "").strip() or None
    for declaration in filter(None, element.attrib.pop("style", "").split("; ")):
        name, value = declaration.split(": ", 1)
        if (name, value) not in INHERITED and name != "font-family":
            element.set(name, colours.get(value, value))
    for name in element.attrib.keys() & {"d", "x", "y"}:
        points = re.sub(r"\d+\.\d+", lambda match: f"{float(match[0]):.1f}".removesuffix(".0"), element.attrib[name])
        element.set(name, " ".join(points.split()))
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    if element.tag == f"{SVG}g" and (name := element.attrib.pop("id", "")):
        if name in titles:
            element.insert(0, Element(f"{SVG}title"))
            element[0].text = titles[name]
        elif not re.search(r"_\d+$", name):
            element.set("class", name)
    children: list[Element] = []
    for child in element:
        tidy(child, colours, titles)
        if child.tag == f"{SVG}g" and not child.attrib and child.find(f"{SVG}title") is None:
            children += child
        elif child.get("fill") != "none" or "stroke" in child.attrib:
            children.append(child)
    element[:] = children


def as_file(picture: Figure, salt: str, titles: Mapping[str, str] | None = None) -> str:
    """Write a picture as a file of its own, which is dark where the reader prefers that."""
    picture.set_facecolor(GROUND)
    root = svg(picture, salt, titles=titles)
    rules = "".join(f'[{name}="{a}"]{{{name}:{b}}}' for a, b in DARK.items() for name in ("fill", "stroke"))
    style = Element(f"{SVG}style")
    style.text = f"@media(prefers-color-scheme:dark){{{rules}}}"
    root.insert(0, style)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


CALL_COLOURS = {
    "actor_generate": "#4c78a8",
    "actor_score": "#6b8e9f",
    "reference_score": "#ab8b09",
    "reward_score": "#d66c0f",
    "critic_score": "#b279a2",
    "actor_train": "#3f9142",
    "critic_train": "#289e8f",
    "reallocation": "#de4b45",
    "offload": "#9d755d",
}
"""Colours of the calls of an iteration, and of what comes before them."""
PASS_COLOURS = {
    "actor forward": "#2597cf",
    "actor backward": "#387ecd",
    "critic forward": "#ab8b09",
    "critic backward": "#d66c0f",
}
"""Colours of an optimiser step in pipeline stages."""
WIDTH, ROW, HEAD, FOOT = 480, 22, 34, 60
"""Points: of the picture, of a row, above a panel, below all."""
THIN = 0.5  # points of an edge: the shortest bar is seen too


@dataclass(frozen=True)
class Bar:
    kind: str
    start: float  # seconds
    end: float  # seconds
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """One chart: a title and, by the label of each row, its bars."""

    title: str
    rows: Mapping[str, Sequence[Bar]]


def gantt_svg(panels: Sequence[Panel], colours: Mapping[str, str], unit: str = "s") -> str:
    """Write the panels with one scale of time and a legend, as a file of its own; `colours` are by kind."""
    with drawing():
        picture, titles = draw(panels, colours, unit)
        return as_file(picture, "gantt", titles)


def draw(panels: Sequence[Panel], colours: Mapping[str, str], unit: str = "s") -> tuple[Figure, dict[str, str]]:
    """Draw the panels, and return what is said of each bar, by its gid. Call it within `pictures.drawing`."""
    height = sum(HEAD + ROW * len(panel.rows) for panel in panels) + FOOT
    longest = max(bar.end for panel in panels for bars in panel.rows.values() for bar in bars)
    titles: dict[str, str] = {}
    picture = Figure((WIDTH / 72, height / 72), layout="constrained")
    ratios = [len(panel.rows) for panel in panels]
    axes = picture.subplots(len(panels), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for panel, chart in zip(panels, axes, strict=True):
        chart.set_title(panel.title, wrap=True)
        chart.set_yticks(range(len(panel.rows)), list(panel.rows))
        chart.barh(range(len(panel.rows)), longest, color=ROW_COLOUR, clip_on=False)
        in_rows = [(row, bar) for row, bars in enumerate(panel.rows.values()) for bar in bars]
        drawn = chart.barh(
            [row for row, _ in in_rows],
            [bar.end - bar.start for _, bar in in_rows],
            left=[bar.start for _, bar in in_rows],
            color=[colours[bar.kind] for _, bar in in_rows],
            linewidth=THIN,
            clip_on=False,
        )
        for (_, bar), patch in zip(in_rows, drawn, strict=True):
            patch.set_gid(f"bar {len(titles)}")
            titles[patch.get_gid()] = f"{bar.label or bar.kind}: {bar.start:.3f} to {bar.end:.3f} {unit}"
        chart.set(xlim=(0, longest), ylim=(len(panel.rows) - 0.5, -0.5))
    axes[-1].xaxis.set_major_formatter(lambda value, index: f"{value:g} {unit}")
    legend = [Patch(color=colour, label=kind) for kind, colour in colours.items()]
    picture.legend(handles=legend, loc="outside lower left", ncols=3)
    return picture, titles
