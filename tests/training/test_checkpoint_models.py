"""Checkpoints by name: which step is meant, two who open one at once, and one that training deletes meanwhile."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from inference.errors import UserError
from inference.families import build_tiny_model
from training.checkpoints import Checkpoint, checkpoint_of
from training.config_files import load_config
from training.opening import open_run
from training.run_directory import RunDirectory
from training.steps import PPO, REWARD, SFT


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """With two checkpoints of step 1."""
    run = RunDirectory(tmp_path / "a")
    open_run(run, load_config([], ["model=m"]))
    for number in (3, 6):
        (run.step(SFT).checkpoints / str(number)).mkdir(parents=True)
        (run.step(SFT).checkpoints / str(number) / "state.json").write_text("{}")
    return run


def opened(run: RunDirectory) -> Checkpoint:
    found = checkpoint_of(f"{run.path}@6")
    assert found is not None
    return found


def test_a_number_alone_is_of_the_last_step_that_was_begun(run):
    assert opened(run).name == "sft@6"
    run.step(REWARD).path.mkdir()
    with pytest.raises(UserError, match="of a reward model"):
        opened(run)
    run.step(PPO).path.mkdir()
    with pytest.raises(UserError, match=r"no checkpoint 6 of step3_rlhf; there are: .*/step1_sft@3, .*/step1_sft@6\.$"):
        opened(run)


def test_what_opens_as_no_model_is_refused_with_what_there_is_instead(run):
    build_tiny_model(run.path / "tiny")
    run.write_config(load_config([], [f"model={run.path / 'tiny'}"]), {})
    for step, sentence in (
        (REWARD, r"reward model.*\. rlhf-chat reward .*/a ends the step .* --from .*/a --set reward\.max_steps=6$"),
        (SFT, r"by DeepSpeed itself.*\. rlhf-chat sft .*/a ends the step and leaves .*/a/step1_sft/model\.$"),
    ):
        (place := run.step(step).checkpoints / "6").mkdir(parents=True, exist_ok=True)
        for name in ("state.json", "zero_states.pt"):
            (place / name).write_text("{}")
        target = f"{run.step(step).path}@6"
        for given in (sentence, rf"\. The model that the step has left is {run.step(step).model}\."):
            with pytest.raises(UserError, match=given):
                checkpoint_of(target).model()
            run.step(step).model.mkdir(exist_ok=True)
            run.step(step).result_file.write_text("{}")


def test_two_who_open_it_at_once_make_it_once(run, monkeypatch):
    made = []

    def slowly(self: Checkpoint, model: Path, adapter: Path) -> None:
        (model / "weights").write_text("first")
        made.append(model)
        time.sleep(0.3)
        (model / "weights").write_text("whole")

    monkeypatch.setattr(Checkpoint, "_write", slowly)
    with ThreadPoolExecutor() as pool:
        models = list(pool.map(lambda _: opened(run).model(), range(2)))
    assert [(model / "weights").read_text() for model in models] == ["whole"] * 2 and len(made) == 1
    assert {file.name for file in opened(run).path.iterdir()} == {"model", "state.json"}


def test_one_that_training_deletes_meanwhile_is_gone(run, monkeypatch):
    found = opened(run)

    def deleted(self: Checkpoint, model: Path, adapter: Path) -> None:
        shutil.rmtree(self.path)
        raise UserError(f"The checkpoint {self.path} is damaged")

    monkeypatch.setattr(Checkpoint, "_write", deleted)
    with pytest.raises(UserError, match=r"no checkpoint 6 of step1_sft; there are: .*a@3\.$"):
        found.opened()
    with pytest.raises(UserError, match="no checkpoint 6"):  # before it began
        found.opened()
    assert not found.path.exists()
