"""Checkpoints that appear whole or not at all: the newest few stay and, with `keep=best`, the best."""

import atexit
import math
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.disk import writing
from inference.errors import UserError, typed
from training.distributed import Ranks
from training.inputs import local_model
from training.launchers import processes_option, wait_until_seen
from training.metrics import WARNING
from training.run_directory import (
    RunDirectory,
    StepDirectory,
    numbered,
    publish_directory,
    read_json,
    remove_directory,
    write_directory,
    write_json,
)
from training.steps import SFT, STEPS, Step
from training.trust import of_evaluation, require_yes

if TYPE_CHECKING:
    from training.hybrid_engine.stored_weights import WeightsBackup
    from training.stage import Stage

STATE_FILE = "state.json"
MISFITS = ("PytorchStreamReader", "loading state_dict", "size of tensor", "shape", "Invalid magic number")
"""What RuntimeErrors of torch and DeepSpeed say of a file that is damaged or does not fit the model; others are about
memory and peers."""


class Checkpoints:
    """The directory `checkpoints/` of one step."""

    what = "checkpoint"

    def __init__(self, directory: Path, keep: int, ranks: Ranks):
        self.directory = directory
        self.keep = keep
        self.ranks = ranks

    def save(self, number: int, write: Callable[[Path], None], state: dict[str, Any]) -> None:
        """Let all ranks call `write(directory)`, then give the checkpoint its name and remove old ones."""
        temporary = self.directory / f".{number}.tmp"
        older = self.gone_on_from.numbers()[-1:]
        goes_on = f"then the same command goes on from {f'checkpoint {older[0]}' if older else 'the start of the step'}"
        try:
            with writing(f"{self.what} {number}", self.directory, goes_on):
                self._write(number, temporary, write, state)
        except UserError:
            if self.ranks.size == 1:  # other ranks may still be writing; `newest` removes it at the next start
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _write(self, number: int, temporary: Path, write: Callable[[Path], None], state: dict[str, Any]) -> None:
        if self.ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.ranks.see(temporary)
        write(temporary)
        self.ranks.barrier("saving a checkpoint")  # those of other roles may still be writing
        sizes = {str(f.relative_to(temporary)): f.stat().st_size for f in temporary.rglob("*") if f.is_file()}
        of_ranks = self.ranks.gather(sizes, "saving a checkpoint")  # each rank sees what it has written
        if self.ranks.is_first:
            files = {name: size for of_rank in of_ranks for name, size in of_rank.items()}
            for name in files:
                wait_until_seen(temporary / name)
            write_json(temporary / STATE_FILE, {**state, "number": number, "ranks": self.ranks.size, "files": files})
            publish_directory(temporary, self.directory / str(number))
            for old in self.superfluous():
                remove_directory(self.directory / str(old))
        self.ranks.barrier("saving a checkpoint")

    @property
    def gone_on_from(self) -> "Checkpoints":
        """The checkpoints that a run goes on from when one cannot be written."""
        return self

    def superfluous(self) -> list[int]:
        """List the numbers of the checkpoints to remove."""
        return self.numbers()[: -self.keep]

    def numbers(self) -> list[int]:
        """List the numbers of the complete checkpoints, oldest first."""
        return numbered(self.directory)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return directory and state of the newest checkpoint, its files checked; None without one.

        Removes what an earlier process left half written.
        """
        if self.ranks.is_first:
            for pattern in (".*.tmp", ".*.old"):
                for left_over in self.directory.glob(pattern):
                    shutil.rmtree(left_over, ignore_errors=True)
        numbers = self.ranks.tell(self.numbers(), "a look at the checkpoints")
        if not numbers:
            return None
        directory = self.directory / str(numbers[-1])
        self.ranks.see(directory / STATE_FILE)
        way_out = self._way_out(directory)
        try:
            state = read_json(directory / STATE_FILE, way_out)
        except (OSError, UserError):
            state = {}
        if not {"number", "ranks", "files"} <= state.keys():
            raise UserError(f"The checkpoint {directory} is damaged ({STATE_FILE} cannot be read); {way_out}.")
        self.ranks.see(*(directory / name for name in state["files"]))
        for name, size in state["files"].items():
            file = directory / name
            if not file.is_file() or file.stat().st_size != size:
                raise UserError(f"The checkpoint {directory} is damaged ({name} is missing or cut); {way_out}.")
        by_deepspeed = any(name.endswith(".pt") for name in state["files"])
        if by_deepspeed and state["ranks"] != self.ranks.size:
            raise UserError(
                f"The checkpoint {directory} was written by {state['ranks']} processes in DeepSpeed's form (by an "
                f"earlier version, or with the optimiser on NVMe) and cannot go on with {self.ranks.size}; use "
                f"{processes_option(state['ranks'])}, or {way_out}."
            )
        return directory, state

    def reading(self, directory: Path) -> AbstractContextManager[None]:
        """Load the checkpoint `directory` inside: what is damaged or foreign in it becomes a UserError."""
        return reading(directory, self._way_out(directory))

    def _way_out(self, directory: Path) -> str:
        return f"delete {directory} to go on from {'the one before' if len(self.numbers()) > 1 else 'the start'}"


@contextmanager
def reading(directory: Path, way_out: str) -> Iterator[None]:
    """Load a checkpoint inside: what is damaged or foreign in it becomes a UserError with the way out."""

    def damaged(error: Exception) -> UserError:
        reason = f"{type(error).__name__} {str(error).strip()}".strip().splitlines()[0][:200].rstrip(".")
        return UserError(f"The checkpoint {directory} is damaged or of another model ({reason}); {way_out}.")

    try:
        yield
    except (OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise damaged(error) from error
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(error))
        if wanted is None:
            raise damaged(error) from error
        raise UserError(
            f"The checkpoint {directory} would run {wanted[1]}, which none of rlhf-chat asks for, so it was not "
            f"read: {way_out}, and go on only with runs of people you trust."
        ) from error
    except RuntimeError as error:
        if not any(text in str(error) for text in MISFITS):
            raise
        raise damaged(error) from error


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
        """Ask for the yes to what opening it would follow and fetch, if the run was not made here."""
        require_yes(self.run.path, of_evaluation(self.run, self.run.read_config(), ""), trusts)

    def model(self, trusts: bool = False) -> Path:
        """Return the model directory, made from the checkpoint when it is first asked for and removed with it."""
        return self.opened(trusts).model

    def opened(self, trusts: bool = False) -> StepDirectory:
        """Return the checkpoint as if it were a finished step: its model, and with LoRA its adapter. In a run that is
        not ours to write in they lie elsewhere until the command ends."""
        self.allow(trusts)
        directory = StepDirectory(self.path, self.step)
        if directory.model.is_dir():
            return directory
        if not os.access(self.path, os.W_OK):
            directory = StepDirectory(Path(tempfile.mkdtemp(prefix=f"{self.name}-")), self.step)
            atexit.register(shutil.rmtree, directory.path, ignore_errors=True)
        try:
            with writing(f"the model of {self.name}", directory.path, "then give the same command"):
                write_directory(directory.model, partial(self._write, adapter=directory.adapter), replaces=False)
        finally:
            if not (self.path / STATE_FILE).exists():  # training has deleted it meanwhile
                shutil.rmtree(self.path, ignore_errors=True)
                raise self.missing()
        return directory

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
        """Say where there is a model of the step all the same."""
        directory = self.run.step(self.step)
        if directory.is_finished:
            return f"The model that the step has left is {directory.model}."
        return f"rlhf-chat {self.step.command} {typed(self.run.path)} ends the step and leaves {directory.model}."

    def _write(self, model: Path, adapter: Path) -> None:
        """Write the model as the step writes its last one."""
        import torch

        import training.hybrid_engine.deepspeed_setup  # noqa: F401  transformers imports DeepSpeed to save: without a word
        from inference.chat_format import ChatFormat
        from inference.weights import quiet_transformers
        from training.hybrid_engine.fragments import FragmentReader
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
            weights = FragmentReader(self.path / "actor" if self.step.draws_samples else self.path).whole("weight")
        named = {name.removeprefix("model."): weight for name, weight in weights.items()}
        whole = load_causal_lm(base, chat_format, torch.float32)
        dtype = TORCH_DTYPES[config.save_dtype]
        with quiet_transformers():
            save_model(model, whole, chat_format, named, trained.lora, dtype, adapter_directory=adapter)


def checkpoint_of(target: str | Path) -> Checkpoint | None:
    """Find the checkpoint that `target` names; None for what names none. Raises UserError where it does not exist, or
    is of a model that scores."""
    named = re.fullmatch(r"(.+)@(\d+)", str(target))
    if named is None or Path(target).expanduser().exists():
        return None
    path = Path(named[1]).expanduser()
    of_step = next((step for step in STEPS if step.folder == path.resolve().name), None)
    run = RunDirectory(path.resolve().parent if of_step else path)
    if not run.config_file.is_file():
        return None
    checkpoint = Checkpoint(run, of_step or last_step(run), int(named[2]))
    if checkpoint.step.leaves_scorer:
        raise UserError(
            f"{target} is a checkpoint of a reward model, whose scale is measured when its step ends. "
            f"{checkpoint.instead()} One of {checkpoint.number} optimiser steps: rlhf-chat reward runs/NEW --from "
            f"{typed(run.path)} --set reward.max_steps={checkpoint.number}"
        )
    if checkpoint.number not in numbered(run.step(checkpoint.step).checkpoints):
        raise checkpoint.missing()
    return checkpoint


def last_step(run: RunDirectory) -> Step:
    return next((step for step in reversed(STEPS) if run.step(step).path.exists()), SFT)


Rank = tuple[float, ...]  # how good an evaluation is: a better one has a larger rank


class Best(Checkpoints):
    """The directory `best/` of one step: the weights of the best evaluation so far, without the optimiser's state.

    What was the best when a checkpoint was written stays as long as the checkpoint does, so that a run goes on from it
    with the best of then. All ranks call everything.
    """

    what = "the best model so far, that of"

    def __init__(
        self, stage: "Stage", weights: "WeightsBackup", rank: Callable[[Mapping[str, float]], Rank | None], unit: str
    ):
        """`rank` gives None for a model that must not be chosen; `unit` is what evaluations are counted in."""
        super().__init__(stage.directory.best, 1, stage.ranks)
        self.stage, self.weights, self.rank, self.unit = stage, weights, rank, unit
        self.number = -1
        """What the best model had learned when it was evaluated; -1: there is none yet."""
        self.evaluation: dict[str, float] = {}

    def go_on_after(self, number: int) -> None:
        """Forget what was evaluated after `number`."""
        if self.ranks.is_first:
            for later in self.numbers():
                if later > number:
                    remove_directory(self.directory / str(later))
        self.ranks.barrier("a look at the best model")
        if newest := self.newest():
            self.number, self.evaluation = newest[1]["number"], newest[1]["evaluation"]

    def look(self, number: int, evaluation: Mapping[str, float]) -> bool:
        """Save the present model where its evaluation is the best so far; returns whether it is."""
        rank = self.rank(evaluation)
        if rank is None or not all(map(math.isfinite, rank)):
            return False
        before = self.rank(self.evaluation) if self.number >= 0 else None
        if before is not None and rank <= before:
            return False
        measured = {name: value for name, value in evaluation.items() if name.startswith("eval/")}
        self.save(number, self.weights.save_present, {"evaluation": measured})
        self.number, self.evaluation = number, measured
        return True

    def put_back(self, number: int) -> None:
        """Replace the present model by the best one at the end, which comes after `number`."""
        step, newest = self.stage.directory.step, self.newest()
        if newest is None:
            return self.stage.display.say(f"{WARNING}{step.title}: no evaluation gave numbers: the last model is kept")
        directory, state = newest
        if state["number"] != number:
            with self.reading(directory):
                self.weights.load(directory)
            self.weights.put_back()
        which = f"the model after {self.unit} {state['number']} of {number} had the best evaluation and is kept"
        if state["number"] == 0:
            which = "no evaluation was better than the one before training, so that model is kept"
        self.stage.display.say(f"{WARNING * (state['number'] == 0)}{step.title}: {which}")

    @property
    def gone_on_from(self) -> Checkpoints:
        return self.stage.checkpoints

    def superfluous(self) -> list[int]:
        numbers = self.numbers()
        wanted = {max((n for n in numbers if n <= at), default=-1) for at in self.stage.checkpoints.numbers()}
        return [number for number in numbers[:-1] if number not in wanted]

    def _way_out(self, directory: Path) -> str:
        return f"delete {directory}, then the best of the others is kept"
