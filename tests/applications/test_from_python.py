"""Runs from Python: the notebook, several processes, Ctrl+C, a kernel that dies, and what a callable raises."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path

import pytest

from applications import from_python as module
from applications.from_python import TOKEN_VARIABLE, Run, Served, load_settings, train
from applications.from_run import from_run
from inference.errors import UserError
from tests.warm import ROOT, Done, fork_all, fork_python
from training.config_files import nested
from training.launchers import PARENT_VARIABLE
from training.reward_sources import RewardEndpoint, RewardFailed
from training.run_directory import RunDirectory
from training.termination import StageFailed

LITTLE = {"rlhf.advantage": "rloo", "rlhf.samples_per_prompt": 2, "sft.max_steps": 1, "evaluation.prompts": 0}


def in_a_kernel(function: Callable[[], object], directory: Path) -> Done:
    """Call `function` in a process of its own, in which nothing of a test's is."""
    return fork_all([partial(kernel, function)], [{}], directory, "", 300)[0]


def kernel(function: Callable[[], object]) -> None:
    fork_python()
    function()


def cells() -> list[str]:
    """Of the notebook, those with code."""
    notebook = json.loads((ROOT / "docs" / "python.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_notebook_twice() -> None:
    names: dict = {}
    for _ in range(2):
        for cell in cells():
            exec(compile(cell, "docs/python.ipynb", "exec"), names)
        assert list(names["metrics"].index) == [1, 2, 3]
        assert list(names["rollouts"]["number"]) == sorted([1, 2, 3] * 16)
        assert (names["metrics"]["reward/score_mean"] < 0).all()


def test_the_notebook_runs_twice_in_one_kernel(tmp_path):
    done = in_a_kernel(run_notebook_twice, tmp_path)
    assert done.code == 0, done.out + done.err
    printed = re.findall(r"^(\d) (-\d+\.\d+) (\d+\.\d+)$", done.out, re.MULTILINE)
    assert [number for number, *_ in printed] == list("123") * 2 and printed[:3] == printed[3:]


def fail_then_die() -> None:
    """The callable raises before anything trains, then its process is gone in the first iteration."""
    asked: list[int] = []

    def refuses(prompts, responses):
        raise LookupError("no such judge")

    def dies(prompts, responses):
        asked.append(len(responses))
        return [float(len(text)) for text in responses] if len(asked) == 1 else os._exit(9)

    settings = load_settings("tiny", LITTLE)
    with pytest.raises(LookupError, match=r"^no such judge$"):
        train("run", settings, reward=refuses, quiet=True).wait()
    train("run", settings, reward=dies, quiet=True).wait()


def go_on() -> None:
    """Two processes ask here; Ctrl+C comes in the second iteration, and the same call goes on."""
    asked = []

    def interrupts(prompts, responses):
        asked.append((os.getpid(), prompts[0][-1]["role"], len(responses)))
        if len(asked) == 5:  # a trial, and two questions an iteration
            os.kill(os.getpid(), signal.SIGINT)
        return [float(len(text)) for text in responses]

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in jobs that a shell has put into the background
    settings = load_settings("run", {"processes": 2})
    seen = []
    with pytest.raises(KeyboardInterrupt):
        seen += [iteration["number"] for iteration in train("run", settings, reward=interrupts).iterations()]
    run = train("run", settings, reward=interrupts, quiet=True)
    numbers = [iteration["number"] for iteration in run.iterations()]
    assert numbers == [1, 2, 3], (seen, numbers)
    assert {(pid, role) for pid, role, _ in asked} == {(os.getpid(), "user")}
    assert {count for *_, count in asked[1:5]} == {8}  # of 16 samples, half for each process
    assert not run.is_running and list(run.metrics("sft").index) == [0, 1]
    with pytest.raises(UserError, match="callable: give it as reward"):
        train("run")


def test_a_kernel_dies_and_another_goes_on_with_two_processes_through_ctrl_c(tmp_path):
    died = in_a_kernel(fail_then_die, tmp_path)
    assert died.code == 9, died.out + died.err
    run = RunDirectory(tmp_path / "run")
    with run.locked(60), run.step(run.read_config().steps[-1]).locked(60):  # nothing trains on without its kernel
        assert TOKEN_VARIABLE in run.config_file.read_text()
    done = in_a_kernel(go_on, tmp_path)
    assert done.code == 0, done.out + done.err
    assert "rlhf" in done.out.lower()  # what the command says is shown


@pytest.fixture
def served():
    server = Served(lambda prompts, responses: (float(len(text)) for text in responses))
    yield server
    server.shutdown()
    server.server_close()


def test_only_who_knows_the_secret_is_answered(served, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, served.token)
    assert served.token not in served.address
    ask = RewardEndpoint(served.address, 10.0, 0).scores
    assert ask([[], []], ["one", "seven"], [{}, {}]) == [3.0, 5.0]
    monkeypatch.setenv(TOKEN_VARIABLE, "guessed")
    with pytest.raises(RewardFailed, match="HTTP 401"):
        ask([[]], ["one"], [{}])
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"http://127.0.0.1:{served.server_address[1]}/", b"{}", timeout=10)
    assert served.error is None


def test_what_is_no_score_is_refused():
    with pytest.raises(UserError, match=r"must take \(prompts, responses\)"):
        Served(lambda prompts: [])
    server = Served(lambda prompts, responses: [float("nan")])
    with pytest.raises(RewardFailed, match="returned nan"):
        server.scores([[]], ["one"], [{}])
    assert "returned nan" in str(server.error)
    server.shutdown()
    server.server_close()


def test_settings_and_runs_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"no setting 'rlhf\.kl\.coef': did you mean 'rlhf\.kl\.coefficient'"):
        load_settings("tiny", {"rlhf": {"kl.coef": 1}})
    with pytest.raises(UserError, match=r"'rlhf\.kl\.target' is there twice"):
        load_settings("tiny", {"rlhf.kl.target": 1, "rlhf": {"kl": {"target": 2}}})
    assert load_settings("tiny", {"data.split": (1, 1, 2), "rlhf.ptx.source": tmp_path}).rlhf.ptx.source == str(
        tmp_path
    )
    with pytest.raises(UserError, match="not a run directory"):
        train(tmp_path / "run")
    with pytest.raises(UserError, match="There is no step 'ppo': the steps are sft, reward, rlhf, dpo"):
        Run(tmp_path).metrics("ppo")


@pytest.mark.parametrize(
    ("group", "name", "value", "sentence"),
    [
        ("rlhf.kl", "target", -1, r"^Setting target: must be greater than or equal to 0 \(got -1\)\.$"),
        ("rlhf", "iterations", "many", r"^Setting iterations: must be a whole number \(got 'many'\)\.$"),
        ("rlhf.kl", "tarjet", 1, r"no setting 'tarjet': did you mean 'target'"),
        ("", "processes", 10**6, r"^These settings do not fit together: an iteration of 8 samples leaves [^[\n]*$"),
    ],
)
def test_a_wrong_assignment_is_refused_and_changes_nothing(group, name, value, sentence):
    settings = load_settings("tiny")
    place = attrgetter(group)(settings) if group else settings
    with pytest.raises(UserError, match=sentence):
        setattr(place, name, value)
    assert settings == load_settings("tiny")


def test_groups_that_were_assigned_to_fit_no_more_are_refused(tmp_path):
    settings = load_settings("tiny")
    settings.rlhf.min_response_tokens = settings.data.max_response_tokens
    with pytest.raises(UserError, match=r"rlhf\.min_response_tokens=16 must be less than"):
        train(tmp_path / "run", settings)


@pytest.mark.parametrize(
    ("settings", "reward", "sentence"),
    [
        ({"rlhf.reward_weights.url": 0}, len, r"never be asked, as rlhf\.reward_weights\.url is 0"),
        ({"method": "dpo"}, len, "never be asked, as method=dpo"),
        ({}, 3, r"The reward is 3; it must be a function of \(prompts, responses\)"),
    ],
)
def test_a_reward_that_cannot_be_asked_is_refused(tmp_path, settings, reward, sentence):
    with pytest.raises(UserError, match=sentence):
        train(tmp_path / "run", load_settings("tiny", settings), reward=reward)


@pytest.fixture
def begun(monkeypatch) -> list[tuple]:
    found: list[tuple] = []
    monkeypatch.setattr(module, "Training", lambda *given: found.append(given))
    return found


def test_what_a_fork_takes_out_of_a_mapping_is_gone(tmp_path, begun):
    parent = load_settings("tiny", {"rlhf.actor.deepspeed": {"dump_state": True, "fp16": {"loss_scale": 2}}})
    parent.rlhf.plan = {"rollout": {"mesh": 0}}
    RunDirectory(tmp_path / "a").write_config(parent, {})
    settings = load_settings(tmp_path / "a")
    settings.rlhf.plan, settings.rlhf.actor.deepspeed = {}, {"fp16": {"hysteresis": 3}}
    train(tmp_path / "b", settings, parent=tmp_path / "a")
    _, fork, _ = from_run(tmp_path / "a", tmp_path / "b", [], [], nested(begun[0][2]), False)
    assert fork.rlhf == settings.rlhf


def test_a_run_of_somebody_else_is_trained_with_a_yes(tmp_path, monkeypatch):
    RunDirectory(tmp_path / "a").write_config(load_settings("tiny"), {})
    (tmp_path / "a" / "data").symlink_to(tmp_path)
    settings = load_settings("tiny")
    with pytest.raises(UserError, match="follow data"):
        train(tmp_path / "a", settings)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StageFailed, match="code 1"):
        train(tmp_path / "a", settings, trust=True).wait()


def test_a_fork_is_given_what_differs_from_its_parent(tmp_path, begun):
    RunDirectory(tmp_path / "a").write_config(load_settings("tiny"), {})
    settings = load_settings(tmp_path / "a", {"rlhf.kl.target": 2, "data.split": [2, 4, 4]})
    train(tmp_path / "b", settings, parent=tmp_path / "a", steps=["rlhf"])
    _, _, given, options, *_ = begun[0]
    assert given == {"rlhf.kl.target": 2.0}
    assert options == ["--steps=rlhf", "--from", str(tmp_path / "a"), "--fork"]
    train(tmp_path / "b", parent=tmp_path / "a")
    assert begun[1][1] == load_settings(tmp_path / "a") and begun[1][2] == {}


def test_what_the_command_starts_is_not_the_command_again(monkeypatch):
    """multiprocessing runs the program's file in its processes, under this name."""
    monkeypatch.setattr("rlhf_chat.main", lambda: pytest.fail("the command has begun again"))
    runpy.run_path(str(ROOT / "rlhf_chat" / "__main__.py"), run_name="__mp_main__")


def test_the_command_ends_with_the_process_that_it_trains_for():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    command = [sys.executable, "-m", "rlhf_chat", "run", "--model", "opt-13b", "--dry-run"]
    done = subprocess.run(command, env={**os.environ, PARENT_VARIABLE: str(gone.pid)}, capture_output=True, timeout=60)
    assert done.returncode == 70


def test_importing_it_imports_little():
    program = "import rlhf_chat, sys; print({'torch', 'pydantic', 'applications.from_python'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
