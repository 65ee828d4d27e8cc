import resource
import subprocess
import sys
from pathlib import Path

import pytest

from applications.commands import parse_steps
from inference.errors import UserError
from training.config import DPO_STEP, RunConfig


def test_help_is_quick_and_imports_nothing_heavy():
    program = (
        "import sys; sys.argv = ['rlhf-chat', '--help']\n"
        "from applications.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
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
        ("1,2,3", "ppo", [1, 2, 3]),
        ("3,1", "ppo", [1, 3]),
        ("2,2", "ppo", [2]),
        (None, "ppo", [1, 2, 3]),
        (None, "dpo", [1, DPO_STEP]),
        ("2", "dpo", [DPO_STEP]),
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
