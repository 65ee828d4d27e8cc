"""`rlhf-chat clean`: what goes and what stays, of run directories made by hand."""

import os
from pathlib import Path

import pytest
import yaml

from applications.clean import clean_command
from inference.errors import UserError
from training.changes import PLAN
from training.run_directory import RunDirectory
from training.steps import PPO, REWARD, SFT


def fill(directory: Path, size: int) -> None:
    directory.mkdir(parents=True)
    (directory / "weights").write_bytes(b"x" * size)


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """Step 1 is finished, step 3 was stopped after iteration 12; kilobytes of each kind."""
    run = RunDirectory(tmp_path / "a")
    run.data.mkdir(parents=True)
    run.config_file.write_text(yaml.safe_dump({"model": "tiny"}))
    fill(run.step(SFT).model, 100_000)
    run.step(SFT).result_file.write_text("{}")
    for number in (4, 8, 12):
        fill(run.step(PPO).checkpoints / str(number), 10_240)
    fill(run.step(SFT).checkpoints / "40", 1024)
    for number in (0, 6, 9):
        fill(run.step(PPO).best / str(number), 2048)
    fill(run.tokens, 512)
    fill(run.step(PPO).path / ".model.tmp", 3072)
    fill(run.step(PPO).checkpoints / ".4.old", 3072)
    fill(run.step(REWARD).path / ".model.old", 7)
    return run


def names(run: RunDirectory) -> set[str]:
    found = {str(path.parent.relative_to(run.path)) for path in run.path.rglob("weights")}
    assert {"step1_sft/model", "step2_reward/.model.old"} <= found  # the latter may be the only one
    return found - {"step1_sft/model", "step2_reward/.model.old"}


def test_a_pipe_is_only_told(run, capsys):
    before = names(run)
    clean_command([run.path], False, False, False)
    said = capsys.readouterr().out
    assert names(run) == before and "Nothing was deleted; --yes frees 30 KiB in 1 run" in said
    assert "20 KiB: 2 checkpoints; 4.0 KiB: 2 best models so far; 512 B: tokens of the rows" in said
    assert "6.0 KiB: 2 left by processes that were killed" in said
    assert f"{run.step(PPO).path}@4, {run.step(PPO).path}@8 cannot be opened any more" in said
    assert "begins again" not in said and "made longer" not in said


def test_the_newest_checkpoint_stays_with_the_best_model_of_then(run, capsys):
    clean_command([run.path], False, True, False)
    assert names(run) == {"step3_rlhf/checkpoints/12", "step3_rlhf/best/9", "step1_sft/checkpoints/40"}
    assert "Freed 30 KiB in 1 run." in capsys.readouterr().out
    clean_command([run.path], False, True, False)
    assert "nothing to free" in capsys.readouterr().out


def test_with_all_no_model_goes_and_what_is_lost_is_said(run, capsys):
    clean_command([run.path], True, True, False)
    said = capsys.readouterr().out
    assert names(run) == set()
    assert "step 3 begins again: 12 iterations of it are lost" in said and "step 1 cannot be made longer" in said


def test_a_run_in_use_is_left_as_it_is(run, tmp_path, capsys):
    other = RunDirectory(tmp_path / "b")
    other.path.mkdir()
    other.config_file.write_text("model: tiny\n")
    fill(other.step(SFT).checkpoints / "1", 10)
    before = names(run)
    with run.step(PPO).locked():
        clean_command([tmp_path], True, True, False)
        assert "is left as it is" in capsys.readouterr().err and names(run) == before
        assert not (other.step(SFT).checkpoints / "1").exists()
        with pytest.raises(UserError, match="still being written"):
            clean_command([run.path], True, True, False)


def test_what_lies_elsewhere_too_frees_nothing_and_stays_there(run, tmp_path, capsys):
    weights = run.step(PPO).checkpoints / "4" / "weights"
    os.link(weights, tmp_path / "fork")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "7").mkdir()
    os.symlink(tmp_path / "precious", run.step(REWARD).checkpoints)
    clean_command([run.path], True, True, True)
    assert "Freed 34 KiB" in capsys.readouterr().out  # and not 44
    assert (tmp_path / "fork").stat().st_size == 10_240 and (tmp_path / "precious" / "7").is_dir()


def test_what_a_clean_that_was_killed_left_is_freed_by_the_next(run, capsys):
    os.rename(run.step(PPO).checkpoints / "8", run.step(PPO).checkpoints / ".8.old")
    clean_command([run.path], False, True, False)
    assert "16 KiB: 3 left by processes that were killed" in capsys.readouterr().out
    assert names(run) == {"step3_rlhf/checkpoints/12", "step3_rlhf/best/9", "step1_sft/checkpoints/40"}


def test_nobody_is_told_of_checkpoints_that_nothing_opens(run, capsys):
    for number in (1, 2):
        fill(run.step(REWARD).checkpoints / str(number), 10)
    clean_command([run.path], True, False, False)
    said = capsys.readouterr().out
    assert "step2_reward@" not in said and "step 2 begins again: 2 optimiser steps of it are lost" in said


def test_a_run_that_is_being_made_longer_and_one_not_trusted_do_not_keep_others_from_it(run, tmp_path, capsys):
    longer, foreign = RunDirectory(tmp_path / "b"), RunDirectory(tmp_path / "c")
    for other in (longer, foreign):
        fill(other.step(SFT).checkpoints / "1", 10)
        other.config_file.write_text("model: tiny\n")
    (longer.path / PLAN).write_text("{}")
    foreign.starts_file.symlink_to("/etc/hostname")
    clean_command([tmp_path], True, True, False)
    said = capsys.readouterr().err
    assert f"{longer.path} is left as it is: it is being made longer" in said and "which leads to /etc" in said
    assert (longer.step(SFT).checkpoints / "1").is_dir() and (foreign.step(SFT).checkpoints / "1").is_dir()
    assert names(run) == set()


def test_a_terminal_is_asked(run, monkeypatch, capsys):
    before = names(run)
    answers = iter(("n\n", "y\n"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin.readline", lambda: next(answers), raising=False)
    clean_command([run.path], False, False, False)
    assert names(run) == before
    clean_command([run.path], False, False, False)
    assert len(names(run)) == 3 and "[y/N]" in capsys.readouterr().out
