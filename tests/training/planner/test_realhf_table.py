"""The published times: committed constants, few rows, and a command that fails when a target is missed."""

from dataclasses import astuple
from pathlib import Path

import pytest

from benchmarks import realhf_table
from benchmarks.realhf_table import PRIOR, SHAPES, calibrate, calibration_experiment, fit, read_rows
from training.planner.hardware import Calibration

FILE = Path(__file__).parents[2] / "data" / "realhf_v1_iteration_times.csv"


@pytest.fixture(scope="module")
def rows():
    return read_rows(FILE)


def test_parameters_of_the_published_models():
    billions = {name: shape.parameters / 1e9 for name, shape in SHAPES.items()}
    assert billions == pytest.approx({"7B": 6.74, "13B": 13.02, "34B": 33.74, "70B": 68.98}, rel=1e-3)


def test_the_committed_constants_are_those_fitted_to_all_rows(rows):
    assert astuple(Calibration()) == pytest.approx(astuple(calibrate(rows)), rel=0.01)


def test_six_rows_predict_the_others(rows):
    mean, largest = calibration_experiment(rows, draws=8)
    assert mean <= 0.10 and largest <= 0.25


def test_the_fit_recovers_constants_from_exact_times(rows):
    true = Calibration(0.5, 3e-4, 1.6e-4, 0.7)

    def predict(calibration):
        return [row.predicted_heuristic(calibration) for row in rows]

    found = fit(predict, predict(true))
    errors = [abs(a / b - 1) for a, b in zip(predict(found), predict(true), strict=True)]
    assert max(errors) < 0.01 < max(abs(a / b - 1) for a, b in zip(predict(PRIOR), predict(true), strict=True))


def written(tmp_path: Path, *lines: str) -> str:
    (tmp_path / "rows.csv").write_text("\n".join([FILE.read_text().splitlines()[0], *lines]) + "\n")
    return str(tmp_path / "rows.csv")


def test_the_command_prints_predictions_and_ends_well(tmp_path, capsys):
    good = (
        "actor,384,256,13B,16,31.6,74.96,86.47,42.63,31.27",
        "both,896,128,7B,16,22.0,74.28,72.03,58.20,34.26",
        "actor,896,128,70B,64,136.2,,459.79,,123.83",
    )
    assert realhf_table.main(["--csv", written(tmp_path, *good), "--draws", "0"]) == 0
    output = capsys.readouterr().out
    assert "in 2 of 2 rows" in output and "all targets met" in output and "42.6" in output


def test_the_command_fails_when_a_target_is_missed(tmp_path, capsys):
    wrong = "actor,384,256,13B,16,31.6,74.96,86.47,142.63,31.27"
    assert realhf_table.main(["--csv", written(tmp_path, wrong), "--draws", "0"]) == 1
    assert "MISSED: error of the heuristic plan, size of the gain" in capsys.readouterr().out
