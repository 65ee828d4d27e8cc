"""Charts; places and ticks by hand."""

import re
from itertools import pairwise

import pytest

from applications.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    LINE,
    TOP,
    Chart,
    Mark,
    Segment,
    Series,
    interval,
    line_chart,
    nice_ticks,
    number,
    stacked_bar,
    thinned,
)


def polyline(svg: str) -> list[tuple[float, float]]:
    found = re.search(r'<polyline class="line a" points="([^"]*)"', svg)
    assert found
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found[1].split())]


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
    assert nice_ticks(low, high, 4) == pytest.approx(expected)


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
    svg = line_chart(Chart("Loss", "", [Series("loss", [(0, 0.0), (5, 0.5), (10, 1.0)])], "step"))
    first, middle, last = polyline(svg)
    bottom = HEIGHT - BOTTOM
    assert first == (LEFT, bottom) and last[1] == TOP
    assert middle == pytest.approx(((first[0] + last[0]) / 2, (bottom + TOP) / 2), abs=0.1)
    assert last[0] == pytest.approx(360 - (len("1") * 6.1 + 12), abs=0.1)  # room for the label of the last value


def test_labels_of_lines_that_end_together_do_not_overlap():
    lines = [
        Series(name, [(0, 0.0), (1, 1.0)], colour) for name, colour in (("mean", "a"), ("longest", "b"), ("x", "c"))
    ]
    svg = line_chart(Chart("", "", lines, ""))
    heights = sorted(float(y) for y in re.findall(r'<text class="end .*?y="([\d.]+)"', svg))
    assert len(heights) == 3 and all(b - a >= LINE - 0.2 for a, b in pairwise(heights))


def test_the_chart_can_be_read_without_seeing_it_and_by_hovering():
    svg = line_chart(Chart("Loss", "", [Series("loss", [(1, 3.0), (2, 2.5)])], "iteration", [Mark(2.8, "bound")]))
    assert 'aria-label="Loss: loss from 3 to 2.5"' in svg and ">bound</text>" in svg
    assert "iteration 1: 3</text>" in svg and "iteration 2: 2.5</text>" in svg


def test_labels_are_escaped():
    svg = line_chart(Chart("<i>", "", [Series("<b>", [(1, 1.0)]), Series("c", [(1, 1.0)])], "<u>"))
    assert not re.search("<[ibu]>", svg) and "&lt;b&gt;" in svg


def test_many_points_become_means_of_neighbours():
    series = thinned(Series("loss", [(i, float(i % 2)) for i in range(1, 121)], spread=[1.0, 3.0] * 60))
    assert len(series.points) == 60 and series.points[0] == (2, 0.5) and series.points[-1] == (120, 0.5)
    assert list(series.spread) == [2.0] * 60


@pytest.mark.parametrize("points", [[(3, 1.0)], [(0, 2.0), (1, 2.0)], [(0, 0.0), (1, 0.0)]])
def test_one_point_and_flat_lines_have_a_place(points):
    assert all(
        LEFT <= x <= 360 and TOP <= y <= HEIGHT - BOTTOM
        for x, y in polyline(line_chart(Chart("", "", [Series("", points)], "")))
    )


def test_intervals_and_bars_are_shares_of_the_width():
    assert 'x1="77.30%" x2="87.70%"' in interval(0.825, 0.773, 0.877, "rlhf") and 'cx="82.50%"' in interval(
        0.825, 0.773, 0.877, "a"
    )
    bar = stacked_bar([Segment("train", 30.0, "c"), Segment("rest", 10.0, "soft")], 80.0)
    assert 'x="0.00%" width="37.50%"' in bar and 'x="37.50%" width="12.50%"' in bar and "train: 30.0 s" in bar
