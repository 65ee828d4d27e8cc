"""The model of a checkpoint, `runs/a@12` or `runs/a/step1_sft@40`, as a model directory that all else can open."""

import atexit
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from inference.disk import writing
from inference.errors import UserError, typed
from training.checkpoints import STATE_FILE
from training.inputs import local_model
from training.run_directory import RunDirectory, StepDirectory, numbered, write_directory
from training.steps import SFT, STEPS, Step
from training.trust import require_yes
from training.uses import of_evaluation


@dataclass(frozen=True)
class Checkpoint:
    run: RunDirectory
    step: Step
    number: int

    @property
    def name(self) -> str:
        """`rlhf@12`."""
        return f"{self.step.command}@{self.number}"

    @property
    def path(self) -> Path:
        return self.run.step(self.step).checkpoints / str(self.number)

    def allow(self, trusts: bool) -> None:
        """Get the yes to what opening it would follow and fetch, if the run was not made here."""
        require_yes(self.run.path, of_evaluation(self.run, self.run.read_config(), ""), trusts)

    def model(self, trusts: bool = False) -> Path:
        """The model directory, made from the checkpoint when it is first asked for; it goes with the checkpoint."""
        return self.opened(trusts).model

    def opened(self, trusts: bool = False) -> StepDirectory:
        """The checkpoint as if it were a finished step: its model, and with LoRA its adapter. In a run that is not
        ours to write in they lie elsewhere until the command ends."""
        self.allow(trusts)
        place = StepDirectory(self.path, self.step)
        if place.model.is_dir():
            return place
        if not os.access(self.path, os.W_OK):
            place = StepDirectory(Path(tempfile.mkdtemp(prefix=f"{self.name}-")), self.step)
            atexit.register(shutil.rmtree, place.path, ignore_errors=True)
        try:
            with writing(f"the model of {self.name}", place.path, "then give the same command"):
                write_directory(place.model, partial(self._write, adapter=place.adapter), replaces=False)
        finally:
            if not (self.path / STATE_FILE).exists():  # training has deleted it meanwhile
                shutil.rmtree(self.path, ignore_errors=True)
                raise self.missing()
        return place

    def missing(self) -> UserError:
        last = last_step(self.run)
        listed = ", ".join(
            f"{self.run.path}{'' if step is last else f'/{step.folder}'}@{number}"
            for step in STEPS
            for number in numbered(self.run.step(step).checkpoints)
            if not step.leaves_scorer
        )
        there = f"there are: {listed or 'none'}"
        return UserError(f"{self.run.path} has no checkpoint {self.number} of {self.step.folder}; {there}.")

    def instead(self) -> str:
        """Where there is a model of the step all the same."""
        directory = self.run.step(self.step)
        if directory.is_finished:
            return f"The model that the step has left is {directory.model}."
        return f"rlhf-chat {self.step.command} {typed(self.run.path)} ends the step and leaves {directory.model}."

    def _write(self, model: Path, adapter: Path) -> None:
        """As the step writes the last one."""
        import torch

        import training.hybrid_engine.deepspeed_setup  # noqa: F401  transformers imports DeepSpeed to save: without a word
        from inference.chat_format import ChatFormat
        from inference.weights import quiet_transformers
        from training.checkpoints import reading
        from training.hybrid_engine.fragments import Written
        from training.models.loading import TORCH_DTYPES, load_causal_lm, save_model

        config, settings = self.run.read_config(), self.run.read_config().of_step(self.step)
        trained = settings.actor if self.step.draws_samples else settings.optimizer
        given = config.model if self.step is SFT else config.given_model(SFT)
        base = local_model(self.run, given, lambda line: None) if given else self.run.require_model(SFT)
        chat_format = ChatFormat.load(base)
        if any(self.path.rglob("*.pt")):
            raise UserError(
                f"{self.path} was written by DeepSpeed itself (by an earlier version of rlhf-chat, or with the "
                f"optimiser on NVMe): only training goes on from it. {self.instead()}"
            )
        with reading(self.path, "choose another one"):
            weights = Written(self.path / "actor" if self.step.draws_samples else self.path).whole("weight")
        named = {name.removeprefix("model."): weight for name, weight in weights.items()}
        whole = load_causal_lm(base, chat_format, torch.float32)
        dtype = TORCH_DTYPES[config.save_dtype]
        with quiet_transformers():
            save_model(model, whole, chat_format, named, trained.lora, dtype, adapter_directory=adapter)


def checkpoint_of(target: str | Path) -> Checkpoint | None:
    """The checkpoint that `target` names; None for what names none. Raises UserError where it is not there, or is of
    a model that scores."""
    named = re.fullmatch(r"(.+)@(\d+)", str(target))
    if named is None or Path(target).expanduser().exists():
        return None
    place = Path(named[1]).expanduser()
    of_step = next((step for step in STEPS if step.folder == place.resolve().name), None)
    run = RunDirectory(place.resolve().parent if of_step else place)
    if not run.config_file.is_file():
        return None
    found = Checkpoint(run, of_step or last_step(run), int(named[2]))
    if found.step.leaves_scorer:
        raise UserError(
            f"{target} is a checkpoint of a reward model, whose scale is measured when its step ends. "
            f"{found.instead()} One of {found.number} optimiser steps: rlhf-chat reward runs/NEW --from "
            f"{typed(run.path)} --set reward.max_steps={found.number}"
        )
    if found.number not in numbered(run.step(found.step).checkpoints):
        raise found.missing()
    return found


def last_step(run: RunDirectory) -> Step:
    """The last one that was begun."""
    return next((step for step in reversed(STEPS) if run.step(step).path.exists()), SFT)
