"""Pictures: bars by hand, colours on both grounds, size on a phone."""

import re
from xml.etree import ElementTree

import pytest

from applications import plan_report
from benchmarks import fused_schedules, fusion_simulation, inter_stage_fusion
from training.pictures import DARK, FONT_SIZE, GROUND, ROW_COLOUR, SVG, WIDTH, Bar, Panel, gantt_svg

COLOURS = {"work": "#4c78a8", "rest": "#878c92"}
PHONE = 358
"""Pixels of a picture on a phone of 390."""


def luminance(colour: str) -> float:
    """Relative, of WCAG."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Of WCAG: 3 for what is drawn, 4.5 for text."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_by_hand():
    assert contrast("#ffffff", "#000000") == pytest.approx(21) and contrast("#777777", "#777777") == 1


@pytest.fixture(scope="module")
def text() -> str:
    rows = {"rank 0": [Bar("work", 0, 1), Bar("rest", 3, 4)], "rank <1>": [Bar("work", 1, 2, "a & b")]}
    return gantt_svg([Panel("before $x_1$", rows), Panel("after", {"rank 0": [Bar("work", 0, 2)]})], COLOURS)


@pytest.fixture(scope="module")
def picture(text) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def test_bars_lie_where_their_times_are(picture):
    found = {}
    for part in picture.findall(f"{SVG}g"):
        title, bar = part
        places = [float(x) for x, _ in re.findall(r"([\d.]+) ([\d.]+)", bar.get("d"))]
        found[title.text] = (min(places), max(places), bar.get("fill"))
    start, end, colour = found["work: 0.000 to 1.000 s"]
    assert colour == COLOURS["work"] and len(found) == 4
    for title, first, last, colour in (
        ("rest: 3.000 to 4.000 s", 3, 4, "rest"),
        ("a & b: 1.000 to 2.000 s", 1, 2, "work"),
        ("work: 0.000 to 2.000 s", 0, 2, "work"),
    ):
        assert found[title][:2] == pytest.approx([start + place * (end - start) for place in (first, last)], abs=0.2)
        assert found[title][2] == COLOURS[colour]


def test_titles_rows_scale_and_legend_are_text(picture):
    texts = [each.text for each in picture.iter(f"{SVG}text")]
    assert {"before $x_1$", "after", "rank 0", "rank <1>", "0 s", "4 s", "work", "rest"} <= set(texts)


def test_it_is_dark_in_the_dark(picture):
    style = picture.find(f"{SVG}style").text
    assert style.startswith("@media(prefers-color-scheme:dark){")
    rules = dict(re.findall(r'\[fill="(#\w+)"\]{fill:(#\w+)}', style))
    fixed = {*COLOURS.values(), None, "none"}
    for each in picture.iter():
        assert each.get("fill") in rules.keys() | fixed and each.get("stroke") in rules.keys() | fixed
    assert all(each.get("fill") in rules for each in picture.iter(f"{SVG}text"))


def test_text_is_legible_on_a_phone(picture):
    sizes = {float(each.get("font-size", picture.get("font-size"))) for each in picture.iter(f"{SVG}text")}
    assert sizes == {FONT_SIZE} and FONT_SIZE * PHONE / WIDTH > 8.5


def test_it_asks_for_nothing_and_is_the_same_bytes_each_time(text, picture):
    panels = [Panel("", {"": [Bar("work", 0, 1)]})]
    assert gantt_svg(panels, COLOURS) == gantt_svg(panels, COLOURS)
    assert not re.search(r"href|url\(|<script|<metadata|<image|@import| style=", text)
    assert re.findall('https?:[^"]*', text) == ["http://www.w3.org/2000/svg"]


@pytest.mark.parametrize(
    "colours",
    [
        plan_report.CALL_COLOURS.values(),
        inter_stage_fusion.COLOURS.values(),
        fused_schedules.COLOURS.values(),
        fusion_simulation.COLOURS,
    ],
)
def test_colours_are_legible_on_both_grounds(colours):
    for ground in (GROUND, ROW_COLOUR):
        assert all(contrast(colour, ground) > 3 and contrast(colour, DARK[ground]) > 3 for colour in colours)
