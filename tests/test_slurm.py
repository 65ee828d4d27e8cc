"""The job script of docs/several_nodes.md: what it asks of Slurm, and that it goes on under a real one."""

import getpass
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pages import ROOT
from tests.test_launchers import free_port

SCRIPT = ROOT / "docs" / "slurm" / "job.sh"
PROGRAM = '#!/bin/bash\necho "$(basename $0) $*" >> {log}\n'


def test_the_grace_ends_before_the_lead_of_the_signal_that_the_page_names():
    script = SCRIPT.read_text()
    lead, grace = (int(re.search(rf"{name}(\d+)", script)[1]) for name in ("--signal=TERM@", "RLHF_CHAT_GRACE="))
    assert f"option signal ({lead} seconds)" in " ".join((ROOT / "docs" / "several_nodes.md").read_text().split())
    assert grace < lead


@pytest.mark.parametrize(
    ("code", "ends", "commands"),
    [
        (0, 0, ["step1_sft", "step2_reward", "step3_rlhf"]),
        (143, 0, ["step1_sft", "scontrol requeue 7"]),
        (2, 2, ["step1_sft"]),
    ],
)
def test_a_step_is_followed_by_the_next_or_by_a_new_start_or_by_the_end(tmp_path: Path, code, ends, commands):
    log = tmp_path / "log"
    for name, line in (("srun", f"exit {code}"), ("scontrol", "")):
        (tmp_path / name).write_text(PROGRAM.format(log=log) + line)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    environment |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
    done = subprocess.run(["bash", str(SCRIPT), "runs/a", "--model", "tiny"], env=environment, timeout=60)
    step = "srun --nodes=2 --ntasks=8 python training/{}/main.py runs/a-3 --model tiny --set seed=3"
    assert done.returncode == ends
    assert log.read_text().splitlines() == [
        each if each.startswith("scontrol") else step.format(each) for each in commands
    ]


PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
NODES = ("node-1", "node-2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={place}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool.%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.%n.log
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=node-1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=node-2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@pytest.fixture
def slurm() -> Iterator[Callable[..., str]]:
    """Two nodes of Slurm on this machine; called with a command of Slurm, it returns what that prints."""
    if missing := [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]:
        pytest.skip(f"Slurm is not installed here (no {', '.join(missing)})")
    place = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # the path of a socket is short
    values = {"host": os.uname().nodename, "user": getpass.getuser(), "place": place}
    (place / "slurm.conf").write_text(CONFIGURATION.format(**values, ports=[free_port() for _ in range(3)]))
    (place / "munge.key").write_bytes(os.urandom(1024))
    (place / "munge.key").chmod(0o400)
    places = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
    munge = [f"--{option}={place}/munge.{name}" for option, name in places.items()]
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(place / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"}
    (place / "state").mkdir()
    place.chmod(0o755)
    daemons = []

    def call(*words: str, must: bool = True) -> str:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not must, (words, done.stdout, done.stderr)
        return done.stdout

    try:
        for words in (["munged", "-F", *munge], ["slurmctld", "-D"], *(["slurmd", "-D", "-N", n] for n in NODES)):
            daemons.append(subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL))
            wait_until((place / "munge.socket").exists, place / "munge.log")
        wait_until(
            lambda: call("sinfo", "--noheader", "--states=idle", "--format=%D", must=False) == "2\n",
            place / "slurmctld.log",
        )
        yield call
    finally:
        subprocess.run(["scancel", "--full", "--user", values["user"]], env=environment, timeout=60)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=60)
        shutil.rmtree(place)


def wait_until(happened: Callable[[], bool], log: Path) -> None:
    ends = time.monotonic() + 180
    while not happened():
        assert time.monotonic() < ends, log.exists() and log.read_text(encoding="utf-8")
        time.sleep(0.2)


def test_a_job_that_is_told_to_end_goes_on_with_another_number_of_tasks(slurm, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    settings = ["sft.max_steps=300", "sft.epochs=300", "sft.eval_every=0", "reward.max_steps=1", "rlhf.iterations=1"]
    words = [f"--output={log}", f"--chdir={ROOT}", "--nodes=2", str(SCRIPT), str(run), "--model", "tiny"]
    job = slurm("sbatch", "--parsable", *words, *(word for each in settings for word in ("--set", each))).strip()

    def says(sentence: str) -> bool:
        return log.exists() and sentence in log.read_text()

    def shows(text: str) -> bool:
        return text in slurm("scontrol", "show", "job", job)

    metrics = run / "step1_sft" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, log)
    slurm("scancel", "--signal=TERM", job)  # as before a limit: the tasks hear it, the script does not
    wait_until(lambda: shows("Restarts=1") and shows("JobState=PENDING"), log)
    assert says("Ended by SIGTERM after optimiser step"), log.read_text()
    for change in ("NumNodes=1", "NumTasks=1", "StartTime=now"):
        slurm("scontrol", "update", f"JobId={job}", change)
    wait_until(lambda: shows("JobState=COMPLETED") or shows("JobState=FAILED"), log)
    assert shows("JobState=COMPLETED") and says("going on after optimiser step"), log.read_text()
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [(start["what"], start["processes"]) for start in starts] == [
        ("step1_sft", 2), ("step1_sft", 1), ("step2_reward", 1), ("step3_rlhf", 1)
    ]  # fmt: skip
