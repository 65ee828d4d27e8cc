import resource
import subprocess
import sys
from pathlib import Path

import pytest

from applications.commands import parse_steps
from inference.errors import UserError
from training.config import RunConfig
from training.steps import DPO, PPO, REWARD, SFT


def test_help_is_quick_and_imports_nothing_heavy():
    program = (
        "import sys; sys.argv = ['rlhf-chat', '--help']\n"
        "from applications.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "chat" in done.stdout and done.stdout.strip().endswith("[]")
    any_help = "import typer; app = typer.Typer(); app.command()(print); app(['--help'])"
    ours, of_any = [], []
    while not ours or (min(ours) >= 4 * min(of_any) and len(ours) < 10):
        ours.append(processor_seconds(Path(sys.executable).with_name("rlhf-chat"), "--help"))
        of_any.append(processor_seconds(sys.executable, "-c", any_help))
    assert min(ours) < 4 * min(of_any)


def processor_seconds(*command: str | Path) -> float:
    """That a command takes, whatever else the machine does."""
    begun = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime - begun.ru_utime - begun.ru_stime


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
