"""How a stage's end reaches the command, whatever ended it."""

import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from applications import commands, launch, pipeline, profile
from applications.cli import main
from applications.fit import Machine
from applications.launch import child_environment, first_dead_rank, last_error
from inference.errors import UserError
from training.run_directory import RunDirectory
from training.steps import PPO
from training.termination import StageFailed

FAILS = """
import json, sys
json.dump({"sentence": "Your function failed.", "code": 2, "traceback": "line 7, in score"}, open(sys.argv[1], "w"))
sys.exit(1)
"""


def test_a_traceback_of_the_users_own_code_is_kept_beside_the_sentence(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    error_file = run.step(PPO).error_file
    (tmp_path / "fails.py").write_text(FAILS)
    monkeypatch.setattr(
        launch, "stage_command", lambda *_: [sys.executable, str(tmp_path / "fails.py"), str(error_file)]
    )
    with pytest.raises(UserError) as raised:
        launch.run_stage_script("step3_rlhf", run, 1)
    assert str(raised.value) == "Your function failed."
    assert "line 7, in score" in "".join(traceback.format_exception(raised.value))  # what --debug shows


@pytest.mark.parametrize("script", ["preparation", "step3_rlhf"])
def test_code_0_without_a_result_is_a_failure(tmp_path, monkeypatch, script):
    (tmp_path / "ends.py").write_text("import os; os._exit(0)")  # as in a reward file
    monkeypatch.setattr(launch, "stage_command", lambda *_: [sys.executable, str(tmp_path / "ends.py")])
    run = RunDirectory(tmp_path)
    with pytest.raises(StageFailed, match=f"^{script} ended with code 0 and left no result; "):
        launch.run_stage_script(script, run, 1)
    run.data.mkdir()
    run.step(PPO).model.mkdir(parents=True)
    run.step(PPO).result_file.write_text("{}")
    launch.run_stage_script(script, run, 1)


DIES = """
import os, signal, sys, time
sys.stderr.write("ValueError: not what ended it\\n")
if os.environ.get("MASTER_ADDR", "127.0.0.1") != "127.0.0.1":
    sys.exit("ranks meet under a name of this machine, which may lead nowhere")
if os.environ.get("RANK", "1") == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)  # as in a collective that will not end
"""


@pytest.mark.parametrize(("processes", "who"), [(1, "step1_sft"), (2, "rank 1 of step1_sft")])
def test_a_process_that_is_killed_is_named_with_its_signal_and_the_way_on(tmp_path, monkeypatch, processes, who):
    (tmp_path / "dies.py").write_text(DIES)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes > 1 else []
    monkeypatch.setattr(launch, "stage_command", lambda *_: [sys.executable, *launcher, str(tmp_path / "dies.py")])
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(StageFailed) as raised:
        launch.run_stage_script("step1_sft", run, processes)
    said = str(raised.value)
    assert said.startswith(f"{who} was killed by SIGKILL (signal 9), most often because memory ran out (try a smaller ")
    assert f"; rlhf-chat sft {run.path} begins the step again, and the log is {run.path}" in said
    assert not processes_with(str(tmp_path / "dies.py"))


def processes_with(argument: str) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if argument in (p.info["cmdline"] or [])]


REPORT = """
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Failures:
[1]:
  time      : 2026-01-01_00:00:00
  host      : here
  rank      : {0} (local_rank: {0})
  exitcode  : {1} (pid: 12)
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  host      : here
  rank      : {2} (local_rank: {2})
  exitcode  : {3} (pid: 11)
"""


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ((1, -9, 0, 1), (1, -9)),  # rank 0 failed because it missed rank 1
        ((1, -15, 0, 1), (0, 1)),  # the launcher ended rank 1 after rank 0 had failed
        ((1, 1, 0, 1), (0, 1)),
    ],
)
def test_the_rank_that_is_to_blame(report, expected):
    assert first_dead_rank(REPORT.format(*report)) == expected
    assert first_dead_rank("no launcher") is None


def test_the_last_error_of_a_log_is_not_the_launchers():
    said = "[rank1]: RuntimeError: shapes (2, 3) differ\n" + REPORT.format(1, 1, 0, 1)
    assert last_error(said) == "RuntimeError: shapes (2, 3) differ"
    assert last_error("all is well") == ""


def test_what_another_launcher_has_set_is_not_handed_on(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "7")
    environment = child_environment()
    assert "CUDA_VISIBLE_DEVICES" in environment
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & environment.keys()


def test_more_processes_than_cores_are_slow_and_refused_only_where_memory_ends_or_they_are_measured(monkeypatch):
    said: list[str] = []
    display = pipeline.Display(quiet=True)
    monkeypatch.setattr(display, "say", said.append)
    monkeypatch.setattr(pipeline.Machine, "here", lambda: Machine(cores=2, memory=24 * 2**30))
    pipeline.look_at_processes(2, display)
    assert not said
    pipeline.look_at_processes(5, display)
    assert said == ["Warning: 5 processes share 2 cores and wait for each other; --processes 2 is faster."]
    with pytest.raises(
        UserError, match=r"^99 processes take 48 GiB before any model, .* has 24 GiB: use --processes 49 at most"
    ):
        pipeline.look_at_processes(99, display)
    with pytest.raises(UserError, match=r"^5 processes would wait for each other on 2 cores: use --processes 2 "):
        profile.profile_command(5, None)


@pytest.fixture
def takes_ctrl_c() -> Iterator[None]:
    """Also where SIGINT is ignored, as in jobs that a shell has put into the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def signal_while_waiting(monkeypatch, number: signal.Signals, file: Path) -> list[float | None]:
    """This process gets the signal as soon as it waits for the script that it started and `file` is there.

    Returns how long it has waited for the script each time, at most.
    """
    start, waits = launch.start, []

    def start_script(*arguments):
        process = start(*arguments)
        wait = process.wait

        def wait_for_script(timeout=None):
            waits.append(timeout)
            while not file.exists():
                time.sleep(0.01)
            if len(waits) == 1:
                signal.raise_signal(number)
            return wait(timeout)

        process.wait = wait_for_script
        return process

    monkeypatch.setattr(launch, "start", start_script)
    monkeypatch.setattr(launch, "can_fork", lambda: False)
    return waits


@pytest.mark.usefixtures("takes_ctrl_c")
def test_ctrl_c_ends_the_stage_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    begun = tmp_path / "begun"
    program = "import sys, time; open(sys.argv[1], 'w'); time.sleep(600)"
    monkeypatch.setattr(launch, "stage_command", lambda *_: [sys.executable, "-c", program, str(begun)])
    signal_while_waiting(monkeypatch, signal.SIGINT, begun)
    run = RunDirectory(tmp_path)
    monkeypatch.setattr(commands, "step_command", lambda *_, **_more: launch.run_stage_script("step1_sft", run, 1))
    monkeypatch.setattr("sys.argv", ["rlhf-chat", "sft", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "\nrlhf-chat: stopped; the same command goes on.\n"
    assert not processes_with(str(begun))


@pytest.mark.usefixtures("takes_ctrl_c")
def test_ctrl_c_while_models_are_loaded_to_be_served(tmp_path, monkeypatch, capsys):
    from inference.chat_model import ChatModel

    (tmp_path / "config.json").write_text('{"architectures": ["OPTForCausalLM"]}')
    monkeypatch.setattr(ChatModel, "load", lambda path: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr("sys.argv", ["rlhf-chat", "serve", str(tmp_path), "--port", "0"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130 and capsys.readouterr().err == "\nrlhf-chat: stopped.\n"
