import resource
import subprocess
import sys
from pathlib import Path

import pytest

from applications.commands import parse_steps
from inference.errors import UserError
from training.config import RunConfig
from training.steps import DPO, PPO, REWARD, SFT


def test_help_is_quick_and_no_command_imports_anything_heavy_before_it_needs_it():
    program = (
        "import sys; sys.argv = ['rlhf-chat', '--help']\n"
        "from applications.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "import applications.commands\n"
        "print(sorted({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "chat" in done.stdout and done.stdout.strip().endswith("[]")
    seconds = [1.0]
    while min(seconds) >= 0.5 and len(seconds) <= 10:  # of the processor: other work counts little
        begun = processor_seconds()
        subprocess.run([Path(sys.executable).with_name("rlhf-chat"), "--help"], capture_output=True, check=True)
        seconds.append(processor_seconds() - begun)
    assert min(seconds) < 0.5


def processor_seconds() -> float:
    """That ended child processes have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    ("text", "method", "steps"),
    [
        ("1,2,3", "ppo", [SFT, REWARD, PPO]),
        ("3,1", "ppo", [SFT, PPO]),
        ("2,2", "ppo", [REWARD]),
        (None, "ppo", [SFT, REWARD, PPO]),
        (None, "dpo", [SFT, DPO]),
        ("2", "dpo", [DPO]),
    ],
)
def test_steps(text, method, steps):
    assert parse_steps(text, RunConfig(model="tiny", method=method)) == steps


@pytest.mark.parametrize(
    ("text", "method"), [("", "ppo"), ("0", "ppo"), ("1,4", "ppo"), ("one", "ppo"), ("1,,2", "ppo"), ("3", "dpo")]
)
def test_bad_steps(text, method):
    with pytest.raises(UserError, match="--steps takes some of 1,2"):
        parse_steps(text, RunConfig(model="tiny", method=method))
