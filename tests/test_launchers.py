"""DeepSpeed's own launcher starts the stage scripts (torchrun's agents: test_pipeline.py)."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import training
from benchmarks.kill_and_resume import metrics
from training.run_directory import RunDirectory


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_with_deepspeed(script: Path, run: Path, processes: int) -> subprocess.CompletedProcess:
    """`deepspeed --num_accelerators N script run`; on a machine without a GPU it needs DS_ACCELERATOR=cpu."""
    launcher = [sys.executable, str(Path(sys.executable).with_name("deepspeed"))]
    options = ["--num_accelerators", str(processes), "--master_port", str(free_port())]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    return subprocess.run(
        [*launcher, *options, str(script), str(run)],
        cwd=run.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes take two GPUs, or none")
def test_two_processes_by_the_deepspeed_launcher_train_as_one_does(tiny_run, tmp_path):
    run = tmp_path / "launched"
    run.mkdir()
    shutil.copy(tiny_run / "config.yaml", run / "config.yaml")
    shutil.copytree(tiny_run / "data", run / "data")
    script = Path(training.__file__).parent / "step1_sft" / "main.py"
    done = start_with_deepspeed(script, run, 2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ours, theirs = ([row for row in metrics(RunDirectory(path), 1) if "eval/loss" in row] for path in (tiny_run, run))
    assert [row["number"] for row in theirs] == [row["number"] for row in ours] == [0, 3, 6]
    for a, b in zip(ours, theirs, strict=True):
        assert b["eval/loss"] == pytest.approx(a["eval/loss"], rel=1e-4)
    state = json.loads((run / "step1_sft" / "checkpoints" / "6" / "state.json").read_text())
    assert state["ranks"] == 2
