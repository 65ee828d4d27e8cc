"""`rlhf-chat compare`: the documented grid of runs, and what keeps figures from being comparable."""

import csv
import io
import json
import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from statistics import stdev

import pytest
import yaml

from applications.compare import Comparison, compare_command, result_of, short_names
from inference.errors import UserError
from tests.applications.report.test_page import lines
from tests.applications.test_report_table import SFT, WIN
from tests.applications.test_rounds import make_run
from tests.pages import ROOT
from training import steps
from training.config_files import load_config
from training.run_directory import RunDirectory
from training.steps import PPO, REWARD

KL = {"0.05": (6.5, 7.0, 7.5), "0.2": (1.0, 2.0, 4.5)}


def commands() -> list[list[str]]:
    """What the loop in the page types."""
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    block = re.search(r"```bash\n(.*?)```", page, re.DOTALL)[1].replace("rlhf-chat", "said")
    done = subprocess.run(
        ["bash", "-c", f"said() {{ printf '%q ' \"$@\"; echo; }}\n{block}"], capture_output=True, text=True
    )
    return [shlex.split(line) for line in done.stdout.splitlines()]


def option(command: list[str], name: str) -> list[str]:
    return [value for key, value in pairwise(command) if key == name]


def trained(path: Path, settings: dict, kl: float, rate: float, reward_model: Path | None = None) -> RunDirectory:
    """Nothing was trained: files as a finished run leaves them."""
    win = {**WIN, "rate": rate, "low": rate - 0.1, "high": rate + 0.1}
    evaluation = {"sft": SFT, "rlhf": {**SFT, "most_frequent_share": 0.01, "kl": kl}, "win_rate": win}
    run = changed(make_run(path, PPO, evaluation), **settings)
    for step in (steps.SFT, REWARD):
        run.step(step).model.mkdir(parents=True)
        run.step(step).result_file.write_text(json.dumps({"seconds": 10.0, "eval/accuracy": 0.75, "eval/loss": 2.5}))
    weights = run.step(REWARD).model / "model.safetensors"
    weights.hardlink_to(reward_model) if reward_model else weights.touch()
    rows = [{"number": n, "reward/score_mean": rate * n, "kl/reference": kl} for n in range(1, 4)]
    run.step(PPO).metrics_file.write_text(lines(rows))
    (run.data / "prompts_eval.jsonl").write_text("the same\n")
    return run


@pytest.fixture
def grid(tmp_path) -> tuple[list[RunDirectory], list[str]]:
    """The runs of the page, and the command that compares them."""
    first, *forks, compares = commands()
    base = trained(tmp_path / "runs" / option(first, "--name")[0], {}, 0.1, 0.5)
    weights = base.step(REWARD).model / "model.safetensors"
    runs = []
    for place, command in enumerate(forks):
        assert option(command, "--from") == ["runs/grid"]
        config = load_config([], option(command, "--set"), {"model": "tiny"})
        settings = config.model_dump(mode="json", exclude={"model"})
        kl = KL[str(config.rlhf.kl.coefficient)][place % 3]
        path = tmp_path / "runs" / option(command, "--name")[0]
        runs.append(trained(path, settings, kl, 0.5 + place / 100, weights))
    return runs, compares


def test_the_documented_grid_is_one_table(grid, capsys, monkeypatch):
    runs, command = grid
    monkeypatch.setenv("COLUMNS", "100")
    assert command[:2] == ["compare", "runs/kl*"] and len(runs) == 6
    monkeypatch.chdir(runs[0].path.parents[1])
    compare_command([run.path for run in runs], Path(option(command, "--out")[0]), False, False, False)
    said = capsys.readouterr().out
    rows = [re.split(r"  +", line.strip()) for line in said.splitlines()]
    rows = rows[next(place for place, row in enumerate(rows) if row[0] == "run") :]
    assert rows[0][:4] == ["run", "coefficient", "seed", "win rate"] and rows[0][-1] == "out of bounds"
    assert rows[1][:4] == ["kl0.05-seed1", "0.05", "1", "50.0% (40.0% to 60.0%)"]
    assert rows[4][:4] == ["mean of 3", "0.05", "51.0% ± 1.0%", "7.00 ± 0.50"] and rows[4][-1] == "3 of 3"
    assert rows[8][:4] == ["mean of 3", "0.2", "54.0% ± 1.0%", f"2.50 ± {stdev(KL['0.2']):.2f}"]
    assert [row[-1] for row in rows[1:4]] == ["KL"] * 3 and "KL" not in {row[-1] for row in rows[5:8]}
    assert (
        "by learned reward" in said and "standard deviation" in said and "scale" not in said and "prompts" not in said
    )
    assert all(line == line[:100] for line in said.splitlines())
    page = Path("kl.html").read_text(encoding="utf-8")
    assert page.count("<svg viewBox") == 8 and "51.0% ± 1.0%" in page and 'aria-label="KL to the SFT model: ' in page
    assert "1 from 7 to 7; 2 from 2.5 to 2.5" in page  # the lines are means of the seeds


def test_json_and_csv_have_everything(grid, capsys):
    runs, _ = grid
    places = [run.path for run in runs]
    compare_command(places, None, True, False, False)
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["rlhf.seed"] for row in rows] == list("123123") and [row["group"] for row in rows] == list("111222")
    assert (
        float(rows[1]["win_rate_low"]) == pytest.approx(0.41)
        and rows[0]["kl"] == "6.5"
        and rows[0]["state"] == "finished"
    )
    assert rows[0]["out_of_bounds"].startswith("KL: 6.50 nats a reply from SFT") and rows[5]["out_of_bounds"] == ""
    assert rows[0]["reward/eval/accuracy"] == "0.75" and rows[0]["seconds"] == "20.0"
    compare_command(places, None, False, True, False)
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == ["rlhf.kl.coefficient", "rlhf.seed"] and len(found["runs"]) == 6
    assert found["groups"][0]["results"]["kl"] == {"mean": 7.0, "deviation": 0.5, "runs": 3}
    assert found["runs"][0]["results"]["win_rate"] == {"value": 0.5, "low": 0.4, "high": 0.6}
    with pytest.raises(UserError, match="--csv and --json"):
        compare_command(places, None, True, True, False)


def changed(run: RunDirectory, **settings) -> RunDirectory:
    stored = yaml.safe_load(run.config_file.read_text())
    run.config_file.write_text(yaml.safe_dump(stored | settings))
    return run


def test_what_cannot_be_compared_is_said(grid):
    (first, second, third, *_), _ = grid
    assert len(list(Comparison([result_of(run) for run in (first, second)]).notes())) == 2
    (second.data / "prompts_eval.jsonl").write_text("others\n")
    third.step(REWARD).result_file.write_text(json.dumps({"seconds": 11.0}))
    figures, _ = third.comparison_of(PPO)
    figures.write_text(figures.read_text().replace("learned reward", "reward of grid"))
    (third.step(PPO).path / "lengthened.jsonl").write_text(
        lines([{"number": 3, "lengths": {"rlhf.iterations": [3, 4]}}])
    )
    notes = list(Comparison([result_of(run) for run in (first, second, third)]).notes())
    assert "learned reward (kl0.05-seed1, kl0.05-seed2); reward of grid (kl0.05-seed3)" in notes[1]
    assert "not on one scale" in notes[2] and "held-out prompts are not the same" in notes[3]
    assert "kl0.05-seed3: step 3 was lengthened after iteration 3" in notes[4]


def test_the_seed_of_a_run_is_that_of_its_steps_and_what_teaches_nothing_parts_no_group(grid):
    (first, second, third, *_), _ = grid
    for seed, run in enumerate((first, second, third), 1):
        stored = yaml.safe_load(run.config_file.read_text())
        stored["rlhf"]["seed"] = -1
        changed(run, rlhf=stored["rlhf"], seed=seed, processes=1 + seed % 2, fork_of=f"/nowhere/{seed}")
    comparison = Comparison([result_of(run) for run in (first, second, third)])
    assert comparison.settings == ["processes", "seed"] and len(comparison.groups) == 1
    *_, cells = comparison.table()[1][-1]
    assert cells[:3] == ["mean of 3", "", ""]
    changed(third, dtype="bf16")
    assert len(Comparison([result_of(run) for run in (first, second, third)]).groups) == 2


def test_measured_otherwise_by_other_code_or_twice_with_one_seed(grid, tmp_path):
    (first, second, third, *_), _ = grid
    copy = RunDirectory(shutil.copytree(first.path, tmp_path / "copy"))
    for run, code, prompts in ((first, "a", 80), (second, "b", 80), (third, "a", 8), (copy, "a", 80)):
        start = {"number": 1, "time": "2026-01-31T12:00:00+00:00", "what": PPO.folder, "formulas": {"mine.py": code}}
        run.starts_file.write_text(lines([start]))
        file, _ = run.comparison_of(PPO)
        sampling = {"temperature": 1.0, "max_tokens": 16}
        evaluation = json.loads(file.read_text()) | {"prompts": prompts, "sampling": sampling}
        evaluation["win_rate"]["judge"] = "upbeat score (lexicon)"
        file.write_text(json.dumps(evaluation))
    second.step(REWARD).result_file.write_text(json.dumps({"seconds": 11.0}))
    comparison = Comparison([result_of(run) for run in (first, second, third, copy)])
    groups = [[comparison.name(result) for result in group.results] for group in comparison.groups]
    assert groups == [["kl0.05-seed1", "kl0.05-seed3", "copy"], ["kl0.05-seed2"]]
    _, same, _, drawn, scale, code = comparison.notes()
    assert same.startswith("kl0.05-seed1, copy have the same seeds")
    assert "; 8 prompts, temperature 1, at most 16 tokens (kl0.05-seed3)." in drawn
    assert "not on one scale" in scale  # which the learned reward is not, whoever judges
    assert code == "mine.py is not the same in all runs, or was changed on the way."
    alone = [note for note in Comparison([result_of(run) for run in (first, copy)]).notes() if "scale" in note]
    assert alone == []  # a copy of a run has its reward model


def test_a_mean_says_of_how_many_it_is(grid):
    (first, second, third, *_), _ = grid
    third.comparison_of(PPO)[0].unlink()
    *_, cells = Comparison([result_of(run) for run in (first, second, third)]).table()[1][-1]
    assert cells[0] == "mean of 3" and "6.75 ± 0.35 (2 of 3)" in cells and "75.0% ± 0.0%" in cells


def test_one_that_cannot_be_read_is_left_out_and_named(grid, capsys):
    (first, second, third, *_), _ = grid
    second.comparison_of(PPO)[0].write_text('{"win_rate": "much"}')
    (third.step(PPO).path / "lengthened.jsonl").write_text('{"number": 3}\n')
    compare_command([first.path, second.path, third.path], None, False, True, False)
    said = capsys.readouterr()
    assert [Path(each["run"]).name for each in json.loads(said.out)["runs"]] == ["kl0.05-seed1"]
    assert f"{second.path} is left out: A file of {second.path} holds what was never" in said.err
    assert f"{third.path} is left out: " in said.err
    with pytest.raises(UserError, match="left out"):
        compare_command([second.path], None, False, False, False)


def test_a_run_without_results_and_a_directory_of_runs(grid, capsys):
    runs, _ = grid
    new = runs[0].path.parent / "new"
    new.mkdir()
    (new / "config.yaml").write_text("model: tiny\nrlhf.kl.coefficient: 0.3\n")
    compare_command([runs[0].path.parent, new], None, False, True, False)
    found = json.loads(capsys.readouterr().out)["runs"]
    assert len(found) == 8 and [each["state"] for each in found if each["run"].endswith("new")] == ["stopped"]
    with pytest.raises(UserError, match="no directory"):
        compare_command([new / "nothing"], None, False, False, False)
    (new / "empty").mkdir()
    with pytest.raises(UserError, match="no run in"):
        compare_command([new / "empty"], None, False, False, False)


def test_names_are_as_short_as_they_can_be():
    assert list(short_names([Path("/a/b"), Path("/c/d")]).values()) == ["b", "d"]
    assert list(short_names([Path("/x/a/b"), Path("/x/c/b")]).values()) == ["a/b", "c/b"]
