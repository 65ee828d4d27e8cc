"""SIGTERM: a sentence at once, a checkpoint where the grace reaches, the newest one named where it does not."""

import os
import signal
import subprocess
import sys

import pytest

from applications import commands, launch
from applications.cli import main
from inference.errors import UserError
from inference.families import build_tiny_model
from tests.applications.test_launch import signal_while_waiting
from tests.supervised_steps import make_run, metrics_of, settings_of, stage_of
from tests.training.step1_sft.test_sft import HELD_OUT, TRAIN
from training import termination
from training.distributed import Ranks
from training.run_directory import RunDirectory
from training.step1_sft import sft
from training.steps import SFT
from training.termination import TERMINATION, Terminated

WORKS = """
import sys, threading, time
from training.termination import TERMINATION
TERMINATION.answer()
TERMINATION.unit = sys.argv[1]
TERMINATION.newest = lambda: "the same command goes on from checkpoint 7"
print("begun", flush=True)
lock = threading.Lock()
lock.acquire()
lock.acquire()  # no handler runs while the main thread is in there
"""


@pytest.mark.parametrize(
    ("unit", "seconds", "expected"),
    [
        ("", 25, ["Ended by SIGTERM: the same command goes on from checkpoint 7."]),
        ("iteration", 0, ["Ended by SIGTERM: the same command goes on from checkpoint 7."]),
        (
            "iteration",
            0.5,
            [
                "SIGTERM: a checkpoint follows if the iteration that runs now ends within 0.5 s.",
                "Ended by SIGTERM: the iteration took longer than 0.5 s, and "
                "the same command goes on from checkpoint 7.",
            ],
        ),
    ],
)
def test_a_script_answers_while_its_main_thread_is_busy(unit, seconds, expected):
    environment = {**os.environ, "RLHF_CHAT_GRACE": str(seconds)}
    environment.pop("RLHF_CHAT_PARENT", None)
    process = subprocess.Popen(
        [sys.executable, "-c", WORKS, unit], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.terminate()
    assert process.communicate(timeout=120)[1].splitlines() == expected and process.returncode == 143


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
def test_a_grace_that_is_none(monkeypatch, text):
    monkeypatch.setenv("RLHF_CHAT_GRACE", text)
    with pytest.raises(UserError, match=f"RLHF_CHAT_GRACE={text} must be seconds"):
        termination.grace()


def test_a_checkpoint_of_the_running_optimiser_step_and_the_same_end(tmp_path, monkeypatch, one_rank: Ranks):
    build_tiny_model(tmp_path / "tiny")
    settings = [f"model={tmp_path / 'tiny'}", *settings_of("sft"), "sft.dropout=0.3"]
    runs = [make_run(tmp_path / name, "sft", TRAIN, HELD_OUT) for name in ("whole", "terminated")]
    sft.train(stage_of(runs[0], SFT, settings, one_rank))
    stage = stage_of(runs[1], SFT, settings, one_rank)
    write = stage.metrics.write

    def writes(number, values):
        write(number, values)
        monkeypatch.setattr(TERMINATION, "is_asked", number == 3 and "loss" in values)

    monkeypatch.setattr(stage.metrics, "write", writes)
    with pytest.raises(Terminated, match=r"^Ended by SIGTERM after optimiser step 3: .*/checkpoints/3\.$"):
        sft.train(stage)
    monkeypatch.setattr(TERMINATION, "is_asked", False)
    sft.train(stage_of(runs[1], SFT, settings, one_rank))
    assert metrics_of(runs[1], SFT) == metrics_of(runs[0], SFT)
    weights = [(run.step(SFT).model / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]


ANSWERS = """
import json, signal, sys, time
def answer(*_):
    if sys.argv[2]:
        json.dump({"sentence": "Ended by SIGTERM after iteration 3: it goes on.", "code": 143}, open(sys.argv[1], "w"))
        sys.exit(1)
signal.signal(signal.SIGTERM, answer)
open(sys.argv[3], "w")
while True: time.sleep(0.1)
"""


@pytest.mark.parametrize("answers", ["yes", ""])
def test_the_command_hands_it_on_and_ends_with_143(tmp_path, monkeypatch, capsys, answers):
    run = RunDirectory(tmp_path)
    begun = tmp_path / "begun"
    script = [sys.executable, "-c", ANSWERS, str(run.step(SFT).error_file), answers, str(begun)]
    waits = signal_while_waiting(monkeypatch, signal.SIGTERM, begun)
    monkeypatch.setenv("RLHF_CHAT_GRACE", "1")
    monkeypatch.setattr(launch, "LAUNCHER_SECONDS", 0)
    monkeypatch.setattr(launch, "stage_command", lambda *_: script)
    monkeypatch.setattr(commands, "step_command", lambda *_, **_more: launch.run_stage_script("step1_sft", run, 1))
    monkeypatch.setattr("sys.argv", ["rlhf-chat", "sft", str(tmp_path)])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert said[0] == "rlhf-chat: SIGTERM: a checkpoint follows if one is reached within 1 s."
    sentence = "after iteration 3: it goes on" if answers else ": the same command goes on"
    assert said[1].startswith("rlhf-chat: Ended by SIGTERM") and sentence in said[1] and len(said) == 2
    assert waits == [None, 1.0] + [None] * (not answers)  # who does not answer is killed
