"""Commands and stage scripts that start at one instant: one of them works, the others say so and touch nothing."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from applications import pipeline
from applications.cli import main
from inference.errors import UserError
from tests.warm import fork_all
from training import stage_script as scripts
from training.run_directory import RunDirectory
from training.steps import SFT


@dataclass(frozen=True)
class Start:
    """A command or script whose work is replaced: it is written down and lasts until the other three have ended."""

    arguments: tuple[str, ...]
    at: float
    refused: bool = False

    def __call__(self) -> None:
        pipeline.run_pipeline = lambda run, config, steps: self.work(config.seed)
        scripts.prepare = lambda *_: None
        scripts.ORPHANS_END = 0.3
        sys.argv = ["rlhf-chat" if self.arguments[0] == "run" else "main.py", *self.arguments]
        time.sleep(max(0.0, self.at - time.time()))
        try:
            if self.arguments[0] == "run":
                main()
            else:
                sys.exit(scripts.run_stage(SFT, lambda stage: self.work(stage.config.seed)))
        finally:
            Path(f"ended-{os.getpid()}").touch()

    def work(self, seed: int) -> None:
        with open("worked", "a", encoding="utf-8") as worked:
            worked.write(f"{seed}\n")
        until = time.time() + 100
        while len(list(Path().glob("ended-*"))) < 3 and time.time() < until:
            time.sleep(0.05)
        if self.refused:
            raise UserError("The data are bad.")


def start_four(arguments: list[tuple[str, ...]], cwd: Path, refused: bool = False) -> list[tuple[int, str]]:
    at = time.time() + 0.3
    starts = [Start(each, at, refused) for each in arguments]
    return sorted((done.code, done.err) for done in fork_all(starts, [{}] * 4, cwd, "", 300))


@pytest.mark.parametrize("differ", [False, True])
def test_of_four_commands_one_trains(tmp_path, differ):
    seeds = [str(seed if differ else 1) for seed in range(4)]
    ended = start_four([("run", "--model", "tiny", "--name", "x", "--seed", seed) for seed in seeds], tmp_path)
    assert [code for code, _ in ended] == [0, 2, 2, 2], ended
    assert all(said.startswith("rlhf-chat: runs/x is in use by another command;") for _, said in ended[1:]), ended
    (seed,) = (tmp_path / "worked").read_text().split()
    assert RunDirectory(tmp_path / "runs" / "x").read_config().seed == int(seed)


def test_four_refused_commands_leave_nothing(tmp_path):
    ended = start_four([("run", "--model", "tiny", "--name", "x")] * 4, tmp_path, refused=True)
    assert [code for code, _ in ended] == [2] * 4
    assert sum("The data are bad." in said for _, said in ended) == 1 and len((tmp_path / "worked").read_text()) == 2
    assert not (tmp_path / "runs").exists()


def test_of_four_scripts_one_trains(tmp_path):
    ended = start_four([("x", "--set", "model=tiny", "--set", f"seed={seed}") for seed in range(4)], tmp_path)
    assert [code for code, _ in ended] == [0, 2, 2, 2], ended
    for _, said in ended[1:]:
        assert any(reason in said for reason in ("in use by another", "being written by another", "other settings")), (
            said
        )
    (seed,) = (tmp_path / "worked").read_text().split()
    assert RunDirectory(tmp_path / "x").read_config().seed == int(seed)
    assert not (tmp_path / "x" / "step1_sft" / "error.json").exists()
