"""starts.jsonl: what ran each time, where and when."""

import json
import subprocess

import pytest

from training import opening
from training.config_files import load_config
from training.opening import COMMAND_VARIABLE, checkout, read_starts, record_start, versions_of
from training.run_directory import RunDirectory
from training.steps import PPO, SFT


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    (tmp_path / "run").mkdir()
    return RunDirectory(tmp_path / "run")


def test_each_start_is_kept_with_what_ran_and_without_secrets(run, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def f(): ...")
    config = load_config([], ["model=m", f"rlhf.reward_function={tmp_path / 'mine.py'}:f"])
    command = ["rlhf-chat", "run", "--set", "rlhf.reward_url=http://a:geheim@h/?token=geheim", "--name", "two words"]
    monkeypatch.setenv(COMMAND_VARIABLE, json.dumps(command))
    monkeypatch.setenv("MY_SECRET", "geheim")
    for torch_version in ("1.0", "2.0"):
        monkeypatch.setattr(opening, "versions", lambda version=torch_version: {"torch": version})
        record_start(run, "step1_sft", config, 2)
    first, second = read_starts(run)
    assert "geheim" not in run.starts_file.read_text()
    assert first["command"] == "rlhf-chat run --set 'rlhf.reward_url=http://***@h/?token=***' --name 'two words'"
    assert (first["what"], first["processes"], first["versions"]["torch"]) == ("step1_sft", 2, "1.0")
    assert first["host"] and first["processor"] and first["time"].endswith("+00:00")
    assert list(first["reward_function"]) == ["mine.py"] and (first["number"], second["number"]) == (1, 2)
    made_by = {"torch": "0.1"}
    assert versions_of(run, SFT, made_by)["torch"] == "2.0" and versions_of(run, PPO, made_by) is made_by


def test_the_commit_is_that_of_the_code_not_of_whatever_lies_around_it(tmp_path):
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    code = tmp_path / "training"
    code.mkdir()
    (code / "steps.py").write_text("1")
    assert checkout(code) == ("", False)
    git("init", "-q")
    (tmp_path / "theirs").write_text("1")
    git("add", "theirs")
    git("commit", "-q", "-m", "theirs")
    assert checkout(code) == ("", False)  # an environment inside somebody's project
    git("add", "training")
    git("commit", "-q", "-m", "ours")
    assert checkout(code) == (git("rev-parse", "HEAD"), False)
    (code / "steps.py").write_text("2")
    assert checkout(code) == (git("rev-parse", "HEAD"), True)


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkout(tmp_path) == ("", False)
