"""`rlhf-chat runs`: states, times and results, of run directories made by hand."""

import json
import os
import time
from datetime import UTC, datetime, timedelta

import pytest

from applications.runs import ago, find_runs, listed, runs_command
from inference.errors import UserError
from tests.applications.test_report_table import RLHF, SFT, WIN
from tests.applications.test_rounds import make_run
from training import steps
from training.run_directory import RunDirectory
from training.steps import PPO, REWARD
from training.termination import EXIT_TERMINATED

BEGUN = datetime(2026, 1, 31, 12, tzinfo=UTC)


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def start(what: str, minute: float) -> dict:
    return {"number": 1, "what": what, "time": (BEGUN + timedelta(minutes=minute)).isoformat(timespec="seconds")}


def at(minute: float) -> float:
    return BEGUN.timestamp() + 60 * minute


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """Steps 1 and 2 are finished, step 3 was stopped in iteration 2 and again in iteration 4."""
    run = make_run(tmp_path / "runs" / "a", REWARD, {}, rlhf={"iterations": 9}, seed=7)
    run.comparison_of(REWARD)[0].unlink()
    run.step(REWARD).result_file.write_text(json.dumps({"seconds": 30.0}))
    run.step(steps.SFT).model.mkdir(parents=True)
    run.step(steps.SFT).result_file.write_text(json.dumps({"seconds": 100.0}))
    starts = start("preparation", 0), start("step1_sft", 1), start("step2_reward", 3)
    starts = *starts, start("step3_rlhf", 10), start("step3_rlhf", 60)
    run.starts_file.write_text(lines(*starts))
    run.step(PPO).path.mkdir()
    rows = [{"number": n, "time/unix": at(minute)} for n, minute in ((1, 11), (2, 12), (3, 61), (4, 62.5))]
    rows[-1] |= {"reward/score_mean": 0.5, "kl/reference": 1.25}
    run.step(PPO).metrics_file.write_text(lines(*rows) + '{"number": 5, "cut sh')
    return run


def test_a_run_that_was_stopped(run):
    found = listed(run)
    assert (found.state, found.step, found.result) == ("stopped", "rlhf 4/9", "score 0.5, KL 1.25")
    assert found.seconds == 100 + 30 + 2 * 60 + 2.5 * 60  # the hour between the two starts is nobody's work
    assert (found.seed, found.method, found.model) == (7, "ppo", "tiny") and found.started == start("", 0)["time"]
    run.step(PPO).error_file.write_text(json.dumps({"code": EXIT_TERMINATED, "sentence": "Ended by SIGTERM"}))
    assert listed(run).state == "stopped"


def test_starts_of_the_parent_and_lines_that_are_none(run):
    begun = listed(run).started
    before = start("step1_sft", -90) | {"of": "/runs/parent"}
    run.starts_file.write_text(
        lines(before, {"number": 2}, start("", 0) | {"time": "noon"}) + run.starts_file.read_text()
    )
    assert (listed(run).started, listed(run).state) == (begun, "stopped")


def test_a_run_that_failed(run):
    run.step(PPO).error_file.write_text(json.dumps({"code": 3, "sentence": "loss is not finite at step3_rlhf 5"}))
    assert (listed(run).state, listed(run).result) == ("failed", "loss is not finite at step3_rlhf 5")


def test_a_run_that_somebody_works_in(run):
    with run.step(PPO).locked():
        assert listed(run).state == "running"
    assert listed(run).state == "stopped"


def test_a_finished_run(run):
    run.step(PPO).model.mkdir()
    run.step(PPO).result_file.write_text(json.dumps({"seconds": 200.0}))
    run.comparison_of(PPO)[0].write_text(json.dumps({"prompts": 80, "sft": SFT, "rlhf": RLHF, "win_rate": WIN}))
    found = listed(run)
    assert (found.state, found.step, found.seconds) == ("finished", "rlhf", 100 + 30 + 2 * 60 + 200)
    assert found.result == "76.2% (70.3% to 82.2%), learned reward" and found.win_rate == WIN


def test_what_has_two_names_takes_its_room_once(run):
    before = listed(run).bytes
    (run.data / "rows").write_bytes(b"x" * 5000)
    os.link(run.data / "rows", run.data / "same")
    (run.data / "elsewhere").symlink_to("/bin/sh")
    assert before + 5000 < listed(run).bytes < before + 5100  # and the link's own few bytes


def test_one_that_cannot_be_read_does_not_hide_the_others(run, capsys):
    other = make_run(run.path.parent / "folder" / "b", PPO, {})
    other.config_file.write_text("model: tiny\nsft: {epoch: 2}\n")
    foreign = make_run(run.path.parent / "c", PPO, {})
    foreign.starts_file.symlink_to("/etc/hostname")
    (run.path.parent / ".hidden").mkdir()
    damaged = make_run(run.path.parent / "d", PPO, {"win_rate": "much"})
    runs_command(run.path.parent, as_json=True)
    found = {each["run"].rpartition("/")[2]: each for each in json.loads(capsys.readouterr().out)}
    assert found.keys() == {"a", "b", "c", "d"} and found["a"]["state"] == "stopped"
    assert found["b"]["state"] == found["c"]["state"] == "unreadable"
    assert f"A file of {damaged.path} holds what was never written there (TypeError" in found["d"]["result"]
    assert "sft.epochs" in found["b"]["result"] and "starts.jsonl, which leads to" in found["c"]["result"]


def test_what_was_written_last_comes_first(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    make_run(run.path.parent / "b", PPO, {})
    later = time.time() + 60
    os.utime(run.config_file, (later, later))
    runs_command(run.path.parent, as_json=False)
    heading, first, second = capsys.readouterr().out.splitlines()
    assert heading.split() == ["run", "state", "step", "begun", "trained", "size", "result"]
    assert "runs/a" in first and "6:40" in first and "runs/b" in second and "rlhf 4/9" in first


def test_where_there_are_none(tmp_path, capsys):
    runs_command(tmp_path, as_json=False)
    assert "rlhf-chat run" in capsys.readouterr().out
    with pytest.raises(UserError, match="no directory"):
        find_runs(tmp_path / "nowhere")


def test_ages():
    def before(**passed: float) -> str:
        return ago((datetime.now(UTC) - timedelta(**passed)).isoformat())

    assert [before(seconds=100), before(minutes=90), before(hours=47), before(days=3)] == [
        "100 s",
        "90 min",
        "47 h",
        "3 d",
    ]
