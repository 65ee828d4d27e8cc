"""Gantt pictures: who did what when, as SVG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # takes a second to import
    from matplotlib.figure import Figure

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
"""Of the calls of an iteration, and of what comes before them."""
PASS_COLOURS = {
    "actor forward": "#2597cf",
    "actor backward": "#387ecd",
    "critic forward": "#ab8b09",
    "critic backward": "#d66c0f",
}
"""Of an optimiser step in pipeline stages."""
WIDTH, ROW, HEAD, FOOT = 480, 22, 34, 60
"""Points: of the picture, of a row, above a panel, below all."""
THIN = 0.5
"""Points of an edge: the shortest bar is seen too."""


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
    """A file of its own: the panels one below the other on one scale of time, with a legend; `colours` are by kind."""
    from training.pictures import as_file, drawing

    with drawing():
        picture, titles = draw(panels, colours, unit)
        return as_file(picture, "gantt", titles)


def draw(panels: Sequence[Panel], colours: Mapping[str, str], unit: str = "s") -> tuple["Figure", dict[str, str]]:
    """The same as a picture, and what is said of each bar, by its gid. Call it within `pictures.drawing`."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from training.pictures import ROW_COLOUR

    height = sum(HEAD + ROW * len(panel.rows) for panel in panels) + FOOT
    longest = max(bar.end for panel in panels for bars in panel.rows.values() for bar in bars)
    titles: dict[str, str] = {}
    picture = Figure((WIDTH / 72, height / 72), layout="constrained")
    ratios = [len(panel.rows) for panel in panels]
    axes = picture.subplots(len(panels), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for panel, each in zip(panels, axes, strict=True):
        each.set_title(panel.title, wrap=True)
        places = range(len(panel.rows))
        each.set_yticks(places, list(panel.rows))
        each.barh(places, longest, color=ROW_COLOUR, clip_on=False)
        placed = [(place, bar) for place, bars in zip(places, panel.rows.values(), strict=True) for bar in bars]
        drawn = each.barh(
            [place for place, _ in placed],
            [bar.end - bar.start for _, bar in placed],
            left=[bar.start for _, bar in placed],
            color=[colours[bar.kind] for _, bar in placed],
            linewidth=THIN,
            clip_on=False,
        )
        for (_, bar), patch in zip(placed, drawn, strict=True):
            patch.set_gid(f"bar {len(titles)}")
            titles[patch.get_gid()] = f"{bar.label or bar.kind}: {bar.start:.3f} to {bar.end:.3f} {unit}"
        each.set(xlim=(0, longest), ylim=(len(panel.rows) - 0.5, -0.5))
    axes[-1].xaxis.set_major_formatter(lambda value, place: f"{value:g} {unit}")
    legend = [Patch(color=colour, label=kind) for kind, colour in colours.items()]
    picture.legend(handles=legend, loc="outside lower left", ncols=3)
    return picture, titles
