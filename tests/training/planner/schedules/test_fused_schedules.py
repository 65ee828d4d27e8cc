"""The benchmark: published figures read, targets that can be missed, the picture."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from benchmarks import fused_schedules
from benchmarks.fused_schedules import Row, picture, read_rows, solve

from .test_bound import FILE

HEADER = FILE.read_text().splitlines()[0]
SMALL = "x,4,2,4,2,3,2,1.5,2"


@pytest.fixture(scope="module")
def row():
    return Row.of(dict(zip(HEADER.split(","), SMALL.split(",") + [""] * 7, strict=False)))


@pytest.fixture(scope="module")
def result(row):
    return solve(row, seed=0, seconds=1)


def test_the_published_serial_times_and_memory_to_the_unit():
    rows = read_rows(FILE)
    assert len(rows) == 8
    for row in rows:
        serial = fused_schedules.serial_1f1b(row.problem)
        assert serial.makespan == row.serial and serial.peak_memory == pytest.approx(row.memory_serial)


def test_what_is_not_published_is_not_missed(result):
    assert not result.missed


@pytest.mark.parametrize(
    "published, missed",
    [
        ({"serial": 100}, ["serial 1F1B of x"]),
        ({"memory_annealed": 1}, ["memory of x"]),
        ({"memory_serial": 1}, ["serial memory of x"]),
        ({"bound": 1}, []),
    ],
)
def test_targets_can_be_missed(result, published, missed):
    """A bound below ours is no miss where ours is met: no schedule is shorter."""
    assert replace(result, row=replace(result.row, **published)).missed == missed


def test_a_bound_that_is_not_met_and_a_search_too_long_are_missed(result):
    outcome = replace(result.outcome, lower_bound=1.0, seconds=21.0)
    worse = replace(result, outcome=outcome, row=replace(result.row, bound=1.0))
    assert worse.missed == ["bound of x", "seconds of x"]


def test_the_command(tmp_path, capsys):
    file = tmp_path / "problems.csv"
    serial = (4 + 3) * 9 + (2 + 1) * 6
    file.write_text(f"{HEADER}\n{SMALL},{serial},,,,,,\n")
    svg = tmp_path / "picture.svg"
    assert fused_schedules.main(["--csv", str(file), "--seconds", "1", "--svg", str(svg), "--beyond"]) == 0
    out = capsys.readouterr().out
    assert "all targets met" in out and "optimal" in out and "backwards split" in out
    file.write_text(f"{HEADER}\n{SMALL},{serial + 1},,,,,,\n")
    assert fused_schedules.main(["--csv", str(file), "--seconds", "1"]) == 1
    assert "MISSED: serial 1F1B of x" in capsys.readouterr().out


def test_the_picture_shows_every_operation_of_both_schedules(result):
    tree = ElementTree.fromstring(picture(result))
    bars = [each for each in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert len(bars) == len(result.serial.operations) + len(result.outcome.schedule.operations)
