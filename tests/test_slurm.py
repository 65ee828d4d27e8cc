"""The job script that docs/slurm.md shows: what it asks of Slurm, and that it goes on under a real one."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.pages import ROOT, blocks

SCRIPT = ROOT / "docs" / "slurm" / "job.sh"
PROGRAM = '#!/bin/bash\necho "$(basename $0) $*" >> {log}\n'


def test_the_page_shows_the_script():
    assert blocks((ROOT / "docs" / "slurm.md").read_text(), "bash") == [SCRIPT.read_text()]


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
    done = subprocess.run(["bash", str(SCRIPT), "runs/a", "--model", "tiny"], env=environment, timeout=60)
    step = "srun python training/{}/main.py runs/a-3 --model tiny --set seed=3"
    assert done.returncode == ends
    assert log.read_text().splitlines() == [
        each if each.startswith("scontrol") else step.format(each) for each in commands
    ]
