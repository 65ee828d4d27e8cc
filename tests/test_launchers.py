"""Other launchers start the stage scripts: DeepSpeed's own, and torchrun's agents, one a node."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

import applications
import training
from benchmarks.kill_and_resume import metrics
from tests.test_pipeline import assert_like_metrics
from tests.warm import Forked, Python
from training.run_directory import RunDirectory
from training.steps import METHODS, PPO

PLAN = """
actor_generate: {mesh: 0-1, data: 2}
reference_score: {mesh: 1}
reward_score: {mesh: 0}
critic_score: {mesh: 0}
actor_train: {mesh: 0}
critic_train: {mesh: 1}
"""


def free_port() -> int:
    """Below those that the system hands out, so that nobody gets it meanwhile."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("no port is free")


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
def test_two_processes_by_the_deepspeed_launcher_follow_a_plan_and_train_as_one_does(tiny_run, tmp_path):
    run = tmp_path / "launched"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns(PPO.folder, "report*", "eval*"))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["rlhf"]["plan"] = yaml.safe_load(PLAN)
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    script = Path(training.__file__).parent / PPO.folder / "main.py"
    done = start_with_deepspeed(script, run, 2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_like_metrics(*(metrics(RunDirectory(path), PPO) for path in (tiny_run, run)))
    require_planned(run)
    state = json.loads((run / PPO.folder / "checkpoints" / "3" / "state.json").read_text())
    assert state["ranks"] == 2


def require_planned(run: Path) -> None:
    """In its newest iteration one rank trained the actor, the other the critic."""
    did = json.loads((run / PPO.folder / "iteration.json").read_text())["achieved"]
    trained = [{kind for kind, *_ in of_rank if kind.endswith("_train")} for of_rank in did]
    assert trained == [{"actor_train"}, {"critic_train"}]


LATE_AND_DYING = """
import builtins, io, os, time
if os.environ.get("RANK") == "1":
    stat, plain_open = os.stat, io.open

    def require_old(path):  # as on a node that is told of new files a second later
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith({run!r}) and "/." not in os.fspath(path):
            if time.time() - stat(path).st_mtime < 1.0:
                raise FileNotFoundError(2, "not there yet", os.fspath(path))

    def late_stat(path, *arguments, **named):
        require_old(path)
        return stat(path, *arguments, **named)

    def late_open(path, mode="r", *arguments, **named):
        if mode[0] == "r":
            require_old(path)
        return plain_open(path, mode, *arguments, **named)

    os.stat, io.open, builtins.open = late_stat, late_open, late_open

    if not os.path.exists({marker!r}) and os.environ.get("DIES"):
        from training.checkpoints import Checkpoints
        save = Checkpoints.save

        def die(self, number, *arguments):
            save(self, number, *arguments)
            if number == 1:
                plain_open({marker!r}, "w").close()
                os.kill(os.getppid(), 9)  # the agent, as if the node were gone
                time.sleep(300)  # its rank follows, before it does anything else

        Checkpoints.save = die
"""


def start_two_agents(start: Callable, script: str, run: Path, *arguments: str, **environment: str):
    """The README's line for two nodes, twice on this machine; how each agent ended, and what it said.

    The first one is where they meet, and has rank 0. `start` begins an interpreter: `start_cold` or `start_fork`.
    """
    port = free_port()
    file = Path(training.__file__).parent / script / "main.py"
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "1"]
    logs = [run.with_name(f"{script}.{port}.{node}.log") for node in (0, 1)]
    environment = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **environment}
    first = start([*launcher, *meeting, str(file), str(run), *arguments], logs[0], environment)
    while not is_listening(port):
        with suppress(subprocess.TimeoutExpired):
            first.wait(timeout=0.1)
            break
    second = start([*launcher, *meeting, str(file), str(run), *arguments], logs[1], environment)
    codes = [agent.wait(timeout=300) for agent in (first, second)]
    return [(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]


def start_cold(arguments: list[str], log_file: Path, environment: dict[str, str]) -> subprocess.Popen:
    with open(log_file, "w", encoding="utf-8") as log:
        return subprocess.Popen([sys.executable, *arguments], env={**os.environ, **environment}, stdout=log, stderr=log)


def start_fork(arguments: list[str], log_file: Path, environment: dict[str, str]) -> Forked:
    return Forked(Python(tuple(arguments)), log_file, **environment)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes take two GPUs, or none")
def test_two_nodes_train_as_one_process_does_with_files_that_show_late_and_one_that_is_left_alone(tiny_run, tmp_path):
    """Step 3 by a plan: actor and critic are trained on a node each, until one is lost."""
    run, marker = tmp_path / "nodes", tmp_path / "died"
    (tmp_path / "sitecustomize.py").write_text(LATE_AND_DYING.format(run=str(run), marker=str(marker)))
    environment = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    preset = Path(applications.__file__).parent / "presets" / "tiny.yaml"
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN)
    settings = ["--config", str(preset), "--plan", str(plan)]
    first = start_two_agents(start_cold, "step1_sft", run, *settings, **environment)
    second = start_two_agents(start_fork, "step2_reward", run, **environment)
    assert [code for code, _ in first + second] == [0] * 4, first + second
    assert sum(text.count("Data from chitchat") for _, text in first + second) == 1, "prepared once"
    (code, said), (killed, _) = start_two_agents(start_fork, "step3_rlhf", run, DIES="1", **environment)
    assert marker.exists() and killed == -9 and code > 0, said
    assert "Another process of this run, or its machine, is gone" in said and "to go on" in said
    require_planned(run)
    script, log = str(Path(training.__file__).parent / PPO.folder / "main.py"), tmp_path / "alone.log"
    refused = start_fork([script, str(run)], log, environment).wait(timeout=100)
    assert refused == 2 and "uses rank 1, but the cluster has ranks 0 to 0" in log.read_text()
    alone = start_fork([script, str(run), "--set", "rlhf.plan="], log, environment).wait(timeout=300)
    assert alone == 0 and "going on after iteration 1, which 2 processes wrote, with 1" in log.read_text()
    for step in METHODS["ppo"]:
        ours, theirs = (metrics(RunDirectory(place), step) for place in (tiny_run, run))
        for row in (*ours, *theirs):  # pairs give no gradient to what their scores have in common: it is rounding
            row.pop("eval/chosen", None), row.pop("eval/rejected", None)
        assert_like_metrics(ours, theirs)
