"""keep=best: which model stays on the disk, and that it is the one that is left in the end."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from inference.chat_format import ChatFormat
from inference.errors import UserError
from inference.families import build_tiny_model
from tests.supervised_steps import make_run, result_of, settings_of, stage_of
from tests.training.step1_sft.test_sft import HELD_OUT, TRAIN, by_hand
from training import supervised
from training.checkpoints import Best, Checkpoints
from training.config_files import load_config
from training.distributed import Ranks
from training.run_directory import RunDirectory
from training.step1_sft import sft
from training.steps import SFT

SETTINGS = ["optimizer.learning_rate=0.02", "optimizer.schedule=constant", "optimizer.warmup=0", "epochs=4"]


class Weights:
    """One number in place of weights."""

    def __init__(self) -> None:
        self.now, self.kept = 0, 0

    def save_present(self, directory: Path) -> None:
        (directory / "0.pt").write_text(str(self.now))

    def load(self, directory: Path) -> None:
        self.kept = int((directory / "0.pt").read_text())

    def put_back(self) -> None:
        self.now = self.kept


@pytest.fixture
def stage(tmp_path):
    ranks, said = Ranks(0, 1, torch.device("cpu")), []
    directory = RunDirectory(tmp_path).step(SFT)
    display = SimpleNamespace(say=said.append)
    return SimpleNamespace(
        ranks=ranks, directory=directory, checkpoints=Checkpoints(directory.checkpoints, 2, ranks), display=display
    )


def best_of(stage: Any, weights: Weights) -> Best:
    found = Best(stage, weights, lambda evaluation: (evaluation["eval/accuracy"],), "optimiser step")
    stage.directory.path.mkdir(exist_ok=True)
    found.go_on_after(max(stage.checkpoints.numbers(), default=-1))
    return found


def learn(stage: Any, weights: Weights, values: dict[int, float], checkpoints: tuple[int, ...] = ()) -> Best:
    """The numbers at which something is evaluated, and what is found."""
    best = best_of(stage, weights)
    for number, value in values.items():
        weights.now = number
        best.look(number, {"eval/accuracy": value, "time/evaluate": 1.0})
        if number in checkpoints:
            stage.checkpoints.save(number, lambda directory: None, {})
    return best


def test_the_first_of_the_best_is_left_and_no_other_stays_on_the_disk(stage):
    weights = Weights()
    best = learn(stage, weights, {0: 0.1, 1: 0.5, 2: float("nan"), 3: 0.5, 4: 0.4})
    best.put_back(4)
    assert (weights.now, best.number, best.evaluation) == (1, 1, {"eval/accuracy": 0.5})
    assert best.numbers() == [1]


def test_a_run_goes_on_with_the_best_of_its_checkpoint(stage):
    """That of every checkpoint stays; what came after the newest one is forgotten."""
    learn(stage, Weights(), {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.2, 4: 0.4, 5: 0.5, 6: 0.6}, checkpoints=(1, 3, 4))
    again = best_of(stage, Weights())
    assert (again.number, again.numbers()) == (4, [2, 4])  # of checkpoint 3 and of checkpoint 4
    (stage.checkpoints.directory / "4").rename(stage.checkpoints.directory / ".gone")
    assert best_of(stage, Weights()).evaluation == {"eval/accuracy": 0.3}


def test_a_damaged_one_is_a_sentence(stage):
    best = learn(stage, Weights(), {0: 0.1, 1: 0.2})
    (best.directory / "1" / "0.pt").write_text("")
    with pytest.raises(UserError, match=r"best/1 is damaged .*delete .*best/1, then the best of the others is kept"):
        best.put_back(1)


@pytest.mark.parametrize("key", ["sft", "reward", "dpo", "rlhf"])
def test_without_evaluations_there_is_no_best(key):
    with pytest.raises(UserError, match="keep=best chooses by evaluations on the way, so eval_every must be over 0"):
        load_config([], ["model=tiny", f"{key}.keep=best", f"{key}.eval_every=0"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("best") / "tiny"
    build_tiny_model(directory)
    return directory


def train(place: Path, tiny: Path, ranks: Ranks, killed_at: int = 0) -> tuple[RunDirectory, list[dict]]:
    """Step 1 with keep=best; its evaluations."""
    run = RunDirectory(place) if place.exists() else make_run(place, "sft", TRAIN, HELD_OUT)
    ours = [f"sft.{each}" for each in (*SETTINGS, "keep=best", "checkpoint_every=2", "eval_every=1")]
    stage = stage_of(run, SFT, [f"model={tiny}", *settings_of("sft"), *ours], ranks)
    batches = supervised.train_batch

    def until(stage, task, batch, budget, number):
        if number == killed_at:
            raise KeyboardInterrupt
        return batches(stage, task, batch, budget, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised, "train_batch", until)
        with contextlib.suppress(KeyboardInterrupt):
            sft.train(stage)
    lines = [json.loads(line) for line in run.step(SFT).metrics_file.read_text().splitlines()]
    return run, [line for line in lines if "eval/loss" in line]


def test_step_1_leaves_the_model_with_the_lowest_loss_killed_or_not(tiny, one_rank):
    run, evaluations = train(tiny.parent / "whole", tiny, one_rank)
    losses = [line["eval/loss"] for line in evaluations]
    lowest = losses.index(min(losses))
    print(losses)
    assert 0 < lowest < len(losses) - 1
    result = result_of(run, SFT)
    assert (result["kept"], result["eval/loss"]) == (lowest, losses[lowest])
    model = AutoModelForCausalLM.from_pretrained(run.step(SFT).model)
    with torch.no_grad():
        assert float(by_hand(model, HELD_OUT, ChatFormat.load(tiny))[0]) == pytest.approx(losses[lowest], abs=1e-4)
    train(tiny.parent / "killed", tiny, one_rank, killed_at=lowest + 2)
    killed, again = train(tiny.parent / "killed", tiny, one_rank)
    assert [line["eval/loss"] for line in again] == losses
    files = [each.step(SFT).model / "model.safetensors" for each in (run, killed)]
    assert files[0].read_bytes() == files[1].read_bytes()
