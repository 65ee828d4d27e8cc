"""Charts; places and ticks by hand."""

import re
from itertools import product
from xml.etree import ElementTree

import pytest

from applications.report import charts
from applications.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    LINE,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    Mark,
    Segment,
    Series,
    interval,
    line_chart,
    number,
    stacked_bar,
    thinned,
    value_ticks,
)
from applications.report.page import HERE
from tests.training.test_pictures import contrast
from training.pictures import SVG

Points = list[tuple[float, float]]


def drawn(*series: Series, marks=(), name="step 1 Loss") -> ElementTree.Element:
    return ElementTree.fromstring(line_chart(Chart("Loss", "", series, "step", marks), name))


def places(path: ElementTree.Element) -> Points:
    return [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", path.get("d", ""))]


def lines(svg: ElementTree.Element, colour: str = "a") -> list[Points]:
    return [places(each) for each in svg.findall(f"{SVG}path") if each.get("stroke") == f"var(--{colour})"]


def texts(svg: ElementTree.Element, where: str = ".") -> list[str]:
    return [each.text or "" for part in svg.findall(where) for each in part.iter(f"{SVG}text")]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0.3, 9.7, [0, 2.5, 5, 7.5, 10]),
        (-1.2, 3.1, [-2, 0, 2, 4]),
        (17.0, 17.3, [17.0, 17.1, 17.2, 17.3]),
        (0, 4000, [0, 1000, 2000, 3000, 4000]),
    ],
)
def test_ticks_are_round_and_reach_over_both_ends(low, high, expected):
    assert value_ticks(low, high, from_zero=False) == pytest.approx(expected)


@pytest.mark.parametrize(("low", "high"), [(3, 9), (-9, -3), (0, 0), (5, 5)])
def test_ticks_from_zero(low, high):
    ticks = value_ticks(low, high, from_zero=True)
    assert min(low, 0) >= ticks[0] and max(high, 0) <= ticks[-1] and 0 in (ticks[0], ticks[-1])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (0.12345, "0.123"),
        (0.00012, "1.2e-4"),
        (1234, "1234"),
        (12345, "12.3k"),
        (-1.5e6, "-1.5M"),
    ],
)
def test_numbers_are_short(value, expected):
    assert number(value) == expected


def test_points_lie_where_their_values_are():
    (line,) = lines(drawn(Series("loss", [(0, 0.0), (5, 0.5), (10, 1.0)])))
    bottom, top, right = HEIGHT - BOTTOM, TOP + LINE, WIDTH - RIGHT
    assert line == [(LEFT, bottom), ((LEFT + right) / 2, (bottom + top) / 2), (right, top)]


def test_a_band_lies_around_its_line():
    svg = drawn(Series("score", [(0, 1.0), (1, 1.0)], spread=[1.0, 0.5]))
    (band,) = (places(each) for each in svg.iter(f"{SVG}path") if each.get("opacity"))
    bottom, top = HEIGHT - BOTTOM, TOP + LINE  # 0 and 2
    rounded = 0.06  # of the file
    assert sorted({y for x, y in band if x == LEFT}) == pytest.approx([top, bottom], abs=rounded)
    narrower = [(bottom + 3 * top) / 4, (3 * bottom + top) / 4]
    assert sorted({y for x, y in band if x == WIDTH - RIGHT}) == pytest.approx(narrower, abs=rounded)


def test_the_legend_has_each_line_with_its_last_value_in_a_place_of_its_own():
    svg = drawn(
        *(Series(name, [(0, 0.0), (1, 1.5)], colour) for name, colour in zip(("x", "y", "z"), "abc", strict=True))
    )
    legend = svg.find(f"{SVG}g[@class='key']")
    assert texts(svg, f"{SVG}g[@class='key']") == ["x 1.5", "y 1.5", "z 1.5"]
    assert len({(each.get("x"), each.get("y")) for each in legend.iter(f"{SVG}text")}) == 3
    assert [each.get("stroke") for each in legend.iter(f"{SVG}path")] == ["var(--a)", "var(--b)", "var(--c)"]


def test_the_chart_can_be_read_without_seeing_it_and_by_hovering():
    svg = drawn(Series("loss", [(1, 3.0), (2, 2.5)]), Series("eval", [(2, 2.0)], "b"), marks=[Mark(2.8, "bound")])
    assert svg.get("aria-label") == "Loss: loss from 3 to 2.5; eval from 2 to 2"
    assert texts(svg, f"{SVG}g[@class='mark']") == ["bound"]
    assert texts(svg, f"{SVG}g[@class='hit']") == ["1: loss 3", "2: loss 2.5, eval 2"]
    strips = [rect for each in svg.findall(f"{SVG}g[@class='hit']") for rect in each.iter(f"{SVG}rect")]
    middle = (LEFT + WIDTH - RIGHT) / 2
    assert [float(each.get("x")) for each in strips] == [LEFT, middle]
    assert [float(each.get("x")) + float(each.get("width")) for each in strips] == [middle, WIDTH - RIGHT]


def test_labels_are_text_whatever_they_are():
    svg = line_chart(Chart("<i>", "", [Series("<b> $x_1$", [(1, 1.0)]), Series("c", [(1, 1.0)])], "<u>"), "")
    assert not re.search("<[ibu]>", svg) and "&lt;b&gt; $x_1$" in svg


def test_many_points_become_means_of_neighbours():
    series = thinned(Series("loss", [(i, float(i % 2)) for i in range(1, 121)], spread=[1.0, 3.0] * 60))
    assert len(series.points) == 60 and series.points[0] == (2, 0.5) and series.points[-1] == (120, 0.5)
    assert list(series.spread) == [2.0] * 60


@pytest.mark.parametrize(
    "points", [[(3, 1.0), (3, 1.0)], [(0, 2.0), (1, 2.0)], [(0, 0.0), (1, 0.0)], [(0, 1e300), (1, -1e-300)]]
)
def test_few_points_flat_lines_and_wide_ranges_have_a_place(points):
    (line,) = lines(drawn(Series("", points)))
    assert all(LEFT <= x <= WIDTH and TOP <= y <= HEIGHT - BOTTOM for x, y in line)


def test_intervals_and_bars_are_shares_of_the_width():
    svg = ElementTree.fromstring(interval(0.8, 0.7, 0.9, "a", "win rate"))
    (whisker,) = lines(svg)
    (dot,) = svg.iter(f"{SVG}use")
    for x, share in ((whisker[0][0], 0.7), (float(dot.get("x")), 0.8), (whisker[1][0], 0.9)):
        assert x == pytest.approx(WIDTH * (share + 0.02) / 1.04, abs=0.1)
    bar = ElementTree.fromstring(stacked_bar([Segment("train", 30.0, "c"), Segment("rest", 10.0, "soft")], 80.0))
    parts = [(each.find(f"{SVG}title").text, places(each.find(f"{SVG}path"))) for each in bar.findall(f"{SVG}g")]
    assert [title for title, _ in parts] == ["train: 30.0 s", "rest: 10.0 s"]
    ends = [(min(x for x, _ in places), max(x for x, _ in places)) for _, places in parts]
    assert ends == [(0, WIDTH * 30 / 80), (WIDTH * 30 / 80, WIDTH * 40 / 80)]


def test_the_same_chart_is_the_same_text_and_its_ids_are_its_own():
    series = Series("loss", [(1, 3.0), (2, 2.5)])
    one, again, other = (drawn(series, name=name) for name in ("step 1 Loss", "step 1 Loss", "step 2 Loss"))
    assert ElementTree.tostring(one) == ElementTree.tostring(again)
    ids = [{each.get("id") for each in svg.iter() if each.get("id")} for svg in (one, other)]
    assert all(ids) and not ids[0] & ids[1]


def schemes() -> list[dict[str, str]]:
    """The variables of the style sheet: in the light, in the dark."""
    css = (HERE / "style.css").read_text()
    return [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root {(.*?)}", css, re.S)]


def test_the_page_colours_its_charts_and_they_are_legible_in_the_light_and_in_the_dark():
    svg = drawn(
        *(Series(each, [(0, 1.0), (1, 2.0)], each, [0.1, 0.1]) for each in charts.LINE_COLOURS), marks=[Mark(1, "m")]
    )
    colours = {each.get(name) for each in svg.iter() for name in ("fill", "stroke")} - {None, "none"}
    used = {re.fullmatch(r"var\(--(\w+)\)", colour)[1] for colour in colours}
    assert used == {*charts.LINE_COLOURS, "faint", "grid"}
    light, dark = schemes()
    for scheme in (light, dark):
        assert used <= scheme.keys() and contrast(scheme["soft"], scheme["card"]) > 4.5
        assert all(contrast(scheme[name], scheme["card"]) > 3 for name in used - {"soft", "grid"})
    assert {colour for name, colour in charts.LINE_COLOURS.items() if name != "soft"} == {
        light[name] for name in charts.LINE_COLOURS if name != "soft"
    }


def test_a_coloured_token_is_legible_in_the_light_and_in_the_dark():
    mixed = set(re.findall(r"color-mix\(in srgb, var\(--(\w)\) (\d+)%", (HERE / "style.css").read_text()))
    assert {name for name, _ in mixed} == {"a", "b"} and len(mixed) == 6
    for scheme, (name, share) in product(schemes(), mixed):
        channels = [(scheme[key][1:][i : i + 2] for i in (0, 2, 4)) for key in (name, "card")]
        blend = "#" + "".join(
            f"{round((int(ours, 16) * int(share) + int(card, 16) * (100 - int(share))) / 100):02x}"
            for ours, card in zip(*channels, strict=True)
        )
        assert contrast(scheme["ink"], blend) > 4.5, (name, share)
