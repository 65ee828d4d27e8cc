"""What a step works with: settings, ranks, run directory, rows, tokens, models, journals, checkpoints."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from inference.chat_format import ChatFormat
from inference.disk import writing
from inference.errors import UserError, typed
from inference.streams import RedactedLines
from training.changes import not_planned_so
from training.checkpoints import Checkpoints
from training.checks import require_positions
from training.config import RunConfig
from training.data.prepare import COUNTS_FILE, prepare_data
from training.data.rows import read_rows, require_rows
from training.data.token_cache import TokenCache, TokenPair, TokenRows, left_out
from training.distributed import Ranks
from training.inputs import local_model
from training.metrics import Display, Journal, NullJournal, metrics_journal
from training.models.loading import TORCH_DTYPES, require_same_tokens, resolve_dtype, save_model
from training.role_settings import LoRASettings
from training.run_directory import RunDirectory, StepDirectory, write_directory, write_json
from training.steps import PAIRS, Step, TrainingRows
from training.termination import TERMINATION, Terminated

if TYPE_CHECKING:  # DeepSpeed takes seconds to import, and the preparation does without
    from training.hybrid_engine.zero_engine import ZeroEngine


class Diverged(Exception):
    """A loss is no longer a number: where, on which rows, and the last good checkpoint."""


@dataclass
class Stage:
    config: RunConfig
    ranks: Ranks
    run: RunDirectory
    directory: StepDirectory
    dtype: torch.dtype
    display: Display
    metrics: Journal
    samples: Journal
    checkpoints: Checkpoints
    started: float

    @property
    def settings(self) -> Any:
        return self.config.of_step(self.directory.step)

    @property
    def seed(self) -> int:
        return self.config.seed_of(self.directory.step)

    def model_directory(self, source: str) -> Path:
        """Return a model's local directory; the first rank fetches it, then one of each other node; others wait."""
        for fetches in (self.ranks.is_first, self.ranks.is_first_of_node):
            if fetches:
                local_model(self.run, source, self.display.say)
            self.ranks.barrier(f"fetching {source}")
        directory = local_model(self.run, source, lambda line: None)
        require_positions(source, directory, self.config.data)
        return directory

    def earlier_model(self, step: Step) -> Path:
        """Return the model that an earlier step left, or the finished one that the settings name instead."""
        if given := self.config.given_model(step):
            return self.model_directory(given)
        left = self.run.step(step)
        self.ranks.see(left.result_file, left.model)
        return self.run.require_model(step)

    def own_reference(self) -> Path | None:
        """Return what KL and log-ratios count from, where that is not the SFT model."""
        own = self.config.reference_model
        return self.model_directory(own) if own else None

    def chat_format(self, actor: Path, scorer: Path | None = None) -> ChatFormat:
        """Load the actor's format, which all steps use. Raises UserError where the scorer's tokens differ."""
        chat_format = ChatFormat.load(actor)
        if scorer is not None:
            require_same_tokens(chat_format, ChatFormat.load(scorer), str(actor), str(scorer))
        for note in chat_format.notes:
            self.display.say(note)
        return chat_format

    def rows(self, chat_format: ChatFormat) -> tuple[list[dict], list[dict]]:
        """Read training and evaluation rows of this step. Raises UserError where there is nothing to train on."""
        if self.ranks.is_first:
            prepare_data(self.config.data, self.config.split_seed, self.run.data, chat_format, self.display.say)
        self.ranks.barrier("preparing the data")
        step = self.directory.step
        files = [self.run.data / f"{step.rows.name}_{part}.jsonl" for part in ("train", "eval")]
        self.ranks.see(*files, self.run.data / COUNTS_FILE)
        require_rows(self.run.data, step, self.settings.keep, self.config.rows_of(step))
        train, held_out = map(read_rows, files)
        return train, held_out

    def tokens(self, rows: list[dict], kind: TrainingRows, chat_format: ChatFormat) -> TokenRows:
        """Return the tokens of each row's texts; the first rank makes them, all read them."""
        cache = TokenCache(self.run.tokens, rows, kind.parts, chat_format, self.config.data)
        if self.ranks.is_first:
            cache.fill(self.display)
        self.ranks.barrier("making tokens of the rows")
        self.ranks.see(cache.file)
        return cache.read()

    def token_pairs(self, rows: list[dict], chat_format: ChatFormat) -> list[TokenPair]:
        """Turn rows of pairs into tokens, without those that differ only beyond data.max_response_tokens. Raises
        UserError for answers with a label, which are no pairs."""
        if any("chosen" not in row for row in rows):
            raise UserError(
                f"Step {self.directory.step.label} needs pairs, and {self.run.data} has answers with a label each, for "
                f"dpo.loss=kto: make a run of its own for it (rlhf-chat run --from {typed(self.run.path)} --fork with "
                f"another --method or dpo.loss), which makes pairs of them."
            )
        tokens = self.tokens(rows, PAIRS, chat_format)
        pairs = [TokenPair.of(row, of_row, i) for i, (row, of_row) in enumerate(zip(rows, tokens, strict=True))]
        different = [pair for pair in pairs if pair.differs]
        if len(different) < len(pairs):
            self.display.say(left_out(len(pairs) - len(different), len(pairs), self.config.data.max_response_tokens))
        return different

    def journal(self, name: str) -> Journal:
        """Open a file of JSON lines in the step's directory; only the first rank writes it."""
        return Journal(self.directory.path / name) if self.ranks.is_first else NullJournal()

    def save_trained(
        self,
        engine: "ZeroEngine",
        load: Callable[[], PreTrainedModel],
        chat_format: ChatFormat,
        extra_config: dict[str, float] | None = None,
    ) -> None:
        """Write the step's model (and adapter): what `load` gives, with the engine's trained weights in it."""
        targets = self.directory.model, self.directory.adapter
        weights, lora = engine.trained_weights(), engine.settings.lora
        self.save_weights(weights, lora, targets, load, chat_format, extra_config, self.ranks)

    def save_weights(
        self,
        weights: dict[str, Tensor],
        lora: LoRASettings,
        targets: tuple[Path, Path],
        load: Callable[[], PreTrainedModel],
        chat_format: ChatFormat,
        extra_config: dict[str, float] | None = None,
        members: Ranks | None = None,
    ) -> None:
        """Let the first of `members` (ranks that have the role; None elsewhere) write a model and its adapter to
        `targets`: what `load` gives, with `weights` in it. All ranks call it.
        """
        model, adapter = targets
        dtype = TORCH_DTYPES[self.config.save_dtype]

        def write(directory: Path) -> None:
            save_model(directory, load(), chat_format, weights, lora, dtype, extra_config, adapter)

        if members is not None and members.is_first:
            with members.as_world(), writing(f"the model of {self.directory.path.name}", self.directory.path):
                write_directory(model, write)
        self.ranks.barrier("saving the model")

    def say_goes_on(self, name: str, unit: str, state: dict[str, Any]) -> None:
        """Say after which optimiser step or iteration (`unit`) the state of a checkpoint is, and who wrote it."""
        wrote, ranks = state["ranks"], self.ranks.size
        by_others = f", which {wrote} process{'es' * (wrote > 1)} wrote, with {ranks}" if wrote != ranks else ""
        self.display.say(f"{name}: going on after {unit} {state['number']}{by_others}")
        if sentence := not_planned_so(self.directory):
            self.display.say(sentence)

    def expect_checkpoints(self, unit: str) -> None:
        """From now on SIGTERM waits, within its grace, until an optimiser step or iteration (`unit`) has ended."""
        TERMINATION.unit, TERMINATION.newest = unit, partial(goes_on, self.checkpoints)

    def told_to_end(self) -> bool:
        """Whether SIGTERM has come to any rank; all ranks call it, at the end of each optimiser step or iteration."""
        return bool(self.ranks.sum(torch.tensor([float(TERMINATION.is_asked)]), "whether to go on"))

    def terminated(self, number: int) -> Terminated:
        """Make the exception that ends the step after a checkpoint that SIGTERM has asked for."""
        return Terminated(f"Ended by SIGTERM after {TERMINATION.unit} {number}: {goes_on(self.checkpoints)}.")

    def finish(self, result: dict) -> None:
        """Mark the step as done. `result` is what later steps and people read."""
        if self.ranks.is_first:
            write_json(self.directory.result_file, {**result, "seconds": round(time.time() - self.started, 1)})
        self.ranks.barrier("the end of the step")

    def diverged(self, number: int, what: str, rows: list[int]) -> Diverged:
        """Make the error for a loss that is not finite. `rows` of the training data, from 0, go into diverged.json."""
        newest = self.checkpoints.numbers()[-1:]
        last = (
            f"the last good checkpoint is {self.directory.checkpoints / str(newest[0])}" if newest else "no checkpoint"
        )
        file = f"data/{self.directory.step.rows.name}_train.jsonl"
        write_json(self.directory.path / "diverged.json", {"number": number, "what": what, "rows": rows, "file": file})
        return Diverged(
            f"{what} at {self.directory.path.name} {number}; its rows are in {self.directory.path / 'diverged.json'}, "
            f"{last}; the usual cure is a lower learning rate or dtype=fp32, in a new run."
        )


def read_at_once(measured: Sequence[Mapping[str, Tensor]]) -> list[dict[str, float]]:
    """Read scalars that micro-batches left on their device, by name, in one copy from there; as exact as one by one."""
    scalars = [scalar.detach().double() for of_one in measured for scalar in of_one.values()]
    values = iter(torch.stack(scalars).tolist() if scalars else [])
    return [{name: next(values) for name in of_one} for of_one in measured]


def goes_on(checkpoints: Checkpoints) -> str:
    """Say from where the same command goes on."""
    newest = checkpoints.numbers()[-1:]
    where = f"from {checkpoints.directory / str(newest[0])}" if newest else "from the start of the step"
    return f"the same command goes on {where}"


def make_stage(run: RunDirectory, step: Step, config: RunConfig, ranks: Ranks) -> Stage:
    directory = run.step(step)
    if ranks.is_first:
        directory.error_file.unlink(missing_ok=True)
    quiet_libraries(directory.log_file, ranks.is_first)
    torch.manual_seed(config.seed_of(step))
    return Stage(
        config=config,
        ranks=ranks,
        run=run,
        directory=directory,
        dtype=resolve_dtype(config.dtype, ranks.device),
        display=Display(quiet=not ranks.is_first, log=directory.log_file),
        metrics=metrics_journal(run, directory, config) if ranks.is_first else NullJournal(),
        samples=Journal(directory.samples_file) if ranks.is_first else NullJournal(),
        checkpoints=Checkpoints(directory.checkpoints, config.of_step(step).keep_checkpoints, ranks),
        started=time.time(),
    )


def quiet_libraries(log_file: Path, first: bool) -> None:
    """Let libraries log to the step's log.txt; the terminal is for progress."""
    handler = logging.FileHandler(log_file) if first else logging.NullHandler()
    handler.setFormatter(RedactedLines())
    logging.captureWarnings(True)
    transformers.utils.logging.disable_progress_bar()
    for name in ("DeepSpeed", "transformers", "py.warnings", "torch", "accelerate", "peft"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
