"""What the stage scripts share: arguments, ranks, run directory, settings, data, journals, the way errors end.

python training/step1_sft/main.py runs/demo                                   one process, settings from the run
torchrun --nproc-per-node 2 training/step1_sft/main.py runs/new --config my.yaml --set sft.epochs=2
"""

import argparse
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from inference.chat_format import ChatFormat
from inference.disk import file_sentence, writing
from inference.errors import EXIT_DIVERGED, EXIT_USER_ERROR, UserError
from inference.model_store import resolve_model
from training.checkpoints import Checkpoints
from training.checks import require_positions
from training.config import EMBEDDED_DATA, RunConfig
from training.config_files import load_config, read_yaml
from training.data.prepare import COUNTS_FILE, prepare_data
from training.data.rows import read_rows, require_rows
from training.data.token_cache import TokenCache, TokenRows
from training.data.token_pairs import PARTS, TokenPair, left_out
from training.distributed import Ranks, is_lost_peer, share_cores, start_ranks, stop_ranks
from training.error_report import leave_report
from training.inputs import changed_inputs
from training.lineage import inherit
from training.merging import merge
from training.metrics import WARNING, Display, Journal, NullJournal
from training.models.loading import (
    TORCH_DTYPES,
    require_same_tokens,
    resolve_dtype,
    save_model,
)
from training.opening import open_run
from training.paths import found_from_anywhere
from training.preparation.prepare import prepare
from training.role_settings import LoRASettings
from training.run_directory import RunDirectory, StepDirectory, write_directory, write_json
from training.starts import record_start
from training.steps import STEPS, Step
from training.termination import EXIT_TERMINATED, TERMINATION, Terminated, grace, say
from training.tracking import metrics_journal
from training.watchdog import PARENT_VARIABLE

if TYPE_CHECKING:  # DeepSpeed takes seconds to import, and the preparation does without
    from training.hybrid_engine.zero_engine import ZeroEngine


T = TypeVar("T")
PRESETS = Path(__file__).parent.parent / "applications" / "presets"
"""Files of settings, the command's; nothing of it is imported."""
ORPHANS_END = 2.0
"""Seconds in which the ranks of a killed launcher have ended themselves; a new one takes longer to start."""


class Diverged(Exception):
    """A loss is no longer a number: where, on which rows, and the last good checkpoint."""


class RefusedOnFirst(UserError):
    """What the first rank refused, on the others: the first one prints it."""


@dataclass
class Stage:
    """Everything a step needs to begin."""

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
    def storage_dtype(self) -> torch.dtype:
        """Number format of the models that the run leaves behind."""
        return TORCH_DTYPES[self.config.save_dtype]

    @property
    def settings(self) -> Any:
        """Those of the step."""
        return self.config.of_step(self.directory.step)

    def model_directory(self, source: str) -> Path:
        """The local directory of a model; the first rank fetches it, then one of each other node, the others wait."""
        for fetches in (self.ranks.is_first, self.ranks.is_first_of_node):
            if fetches:
                resolve_model(source, self.display.say)
            self.ranks.barrier(f"fetching {source}")
        directory = resolve_model(source, lambda line: None)
        require_positions(source, directory, self.config.data)
        return directory

    def earlier_model(self, step: Step) -> Path:
        """The model that an earlier step left, or the finished one that the settings name instead."""
        if given := self.config.given_model(step):
            return self.model_directory(given)
        left = self.run.step(step)
        self.ranks.see(left.result_file, left.model)
        return self.run.require_model(step)

    def chat_format(self, actor: Path, scorer: Path | None) -> ChatFormat:
        """The actor's format, which all steps use. Raises UserError where the scorer's tokens mean something else."""
        chat_format = ChatFormat.load(actor)
        if scorer is not None:
            require_same_tokens(chat_format, ChatFormat.load(scorer), str(actor), str(scorer))
        for note in chat_format.notes:
            self.display.say(note)
        return chat_format

    def rows(self, chat_format: ChatFormat) -> tuple[list[dict], list[dict]]:
        """Training and evaluation rows of this step. Raises UserError where there is nothing to train on."""
        if self.ranks.is_first:
            prepare_data(self.config.data, self.config.split_seed, self.run.data, chat_format, self.display.say)
        self.ranks.barrier("preparing the data")
        step = self.directory.step
        files = [self.run.data / f"{step.rows.name}_{part}.jsonl" for part in ("train", "eval")]
        self.ranks.see(*files, self.run.data / COUNTS_FILE)
        require_rows(self.run.data, step)
        train, held_out = map(read_rows, files)
        return train, held_out

    def tokens(self, rows: list[dict], parts: tuple[str, ...], chat_format: ChatFormat) -> TokenRows:
        """The tokens of each row's `parts` (`prompt`, keys of answers); the first rank makes them, all read them."""
        cache = TokenCache(self.run.path / "tokens", rows, parts, chat_format, self.config.data)
        if self.ranks.is_first:
            cache.fill(self.display)
        self.ranks.barrier("making tokens of the rows")
        self.ranks.see(cache.file)
        return cache.read()

    def token_pairs(self, rows: list[dict], chat_format: ChatFormat) -> list[TokenPair]:
        """Rows of pairs as tokens, without those that differ only beyond data.max_response_tokens."""
        tokens = self.tokens(rows, PARTS, chat_format)
        pairs = [TokenPair.of(*each, place) for place, each in enumerate(zip(rows, tokens, strict=True))]
        kept = [pair for pair in pairs if pair.differs]
        if len(kept) < len(pairs):
            self.display.say(left_out(len(pairs) - len(kept), len(pairs), self.config.data.max_response_tokens))
        return kept

    def journal(self, name: str) -> Journal:
        """A file of JSON lines in the step's directory; only the first rank writes it."""
        return Journal(self.directory.path / name) if self.ranks.is_first else NullJournal()

    def save_trained(
        self,
        engine: "ZeroEngine",
        load: Callable[[], PreTrainedModel],
        chat_format: ChatFormat,
        extra_config: dict[str, float] | None = None,
    ) -> None:
        """Write the step's model (and adapter): what `load` gives, with the engine's trained weights in it."""
        directory = self.directory
        places = directory.model, directory.adapter
        self.save_weights(engine.trained_weights(), engine.settings.lora, places, load, chat_format, extra_config)

    def save_weights(
        self,
        weights: dict[str, Tensor],
        lora: LoRASettings,
        places: tuple[Path, Path],
        load: Callable[[], PreTrainedModel],
        chat_format: ChatFormat,
        extra_config: dict[str, float] | None = None,
    ) -> None:
        """The first rank writes a model and its adapter to `places`: what `load` gives, with `weights` in it."""
        model, adapter = places

        def write(directory: Path) -> None:
            save_model(directory, load(), chat_format, weights, lora, self.storage_dtype, extra_config, adapter)

        if self.ranks.is_first:
            with writing(f"the model of {self.directory.path.name}", self.directory.path):
                write_directory(model, write)
        self.ranks.barrier("saving the model")

    def expect_checkpoints(self, unit: str) -> None:
        """From now on SIGTERM waits, within its grace, until an optimiser step or iteration (`unit`) has ended."""
        TERMINATION.unit, TERMINATION.newest = unit, partial(goes_on, self.checkpoints)

    def told_to_end(self) -> bool:
        """Whether SIGTERM has come to any rank; all ranks call it, at the end of each optimiser step or iteration."""
        return bool(self.ranks.sum(torch.tensor([float(TERMINATION.is_asked)]), "whether to go on"))

    def terminated(self, number: int) -> Terminated:
        """The end after a checkpoint that SIGTERM has asked for."""
        return Terminated(f"Ended by SIGTERM after {TERMINATION.unit} {number}: {goes_on(self.checkpoints)}.")

    def finish(self, result: dict) -> None:
        """Mark the step as done. `result` is what later steps and people read."""
        if self.ranks.is_first:
            write_json(self.directory.result_file, {**result, "seconds": round(time.time() - self.started, 1)})
        self.ranks.barrier("the end of the step")

    def diverged(self, number: int, what: str, rows: list[int]) -> Diverged:
        """The error for a loss that is not finite. `rows` of the training data, from 0, are kept in diverged.json."""
        newest = self.checkpoints.numbers()[-1:]
        last = (
            f"the last good checkpoint is {self.directory.checkpoints / str(newest[0])}" if newest else "no checkpoint"
        )
        file = f"data/{self.directory.step.rows.name}_train.jsonl"
        write_json(self.directory.path / "diverged.json", {"number": number, "what": what, "rows": rows, "file": file})
        return Diverged(
            f"{what} at {self.directory.path.name} {number}; its rows are in {self.directory.path / 'diverged.json'}, "
            f"{last}; the usual cure is a lower learning rate or dtype=fp32, in a run with another --name."
        )


def run_stage(step: Step, work: Callable[[Stage], None]) -> int:
    """Parse the arguments, set up, do `work` unless the step is done already, turn errors into sentences.

    Returns the exit code: 0, 2 for what the user can put right, 3 for a run that diverged.
    """
    arguments = parse_arguments()
    run = RunDirectory(arguments.run_directory)
    directory = run.step(step)

    def body() -> None:
        ranks = start_ranks()
        with ExitStack() as held:
            decide = partial(enter, run, directory, arguments, ranks.size, held)
            config = decided_by_first(ranks, decide, "fetching models and preparing the data")
            if config is not None:
                share_cores(config.threads)
                ranks.see(directory.path)
                if ranks.is_first:
                    record_start(run, step.folder, config, ranks.size)
                work(make_stage(run, step, config, ranks))

    return end_in_sentences(body, directory.error_file)


def enter(
    run: RunDirectory, directory: StepDirectory, arguments: argparse.Namespace, processes: int, held: ExitStack
) -> RunConfig | None:
    """The settings, once this process holds the step until `held` ends, and the run is prepared; None: it is done."""
    if PARENT_VARIABLE in os.environ:  # the command holds the run and has prepared it
        held.enter_context(directory.locked())
        config = run.read_config()
    else:
        settings = given_settings(run, arguments)
        with run.locked(ORPHANS_END):
            config = open_run(run, settings)
            held.enter_context(directory.locked(ORPHANS_END))
            if not directory.is_finished:
                display = Display(log=run.log_file)
                for changed in changed_inputs(run, config):
                    display.say(f"{WARNING}{changed}")
                prepare(config, run, processes, display.say, [directory.step])
    if directory.is_finished:
        return None
    directory.path.mkdir(exist_ok=True)
    return config


def run_preparation() -> int:
    """The command's preparation, for the processes that it will start."""
    parser = argparse.ArgumentParser(description="Fetch the models and make the data of a run.")
    parser.add_argument("run_directory", type=Path)
    parser.add_argument("steps", nargs="*", help="those that follow now, as sft; default: all of the run")
    arguments = parser.parse_args()
    run = RunDirectory(arguments.run_directory)

    def body() -> None:
        config = run.read_config()
        steps = [step for step in STEPS if step.command in arguments.steps]
        prepare(config, run, config.processes, Display(log=run.log_file).say, steps)
        record_start(run, "preparation", config, 1)

    return end_in_sentences(body, run.error_file)


def decided_by_first(ranks: Ranks, decide: Callable[[], T], phase: str) -> T:
    """What the first rank decides, on all. What it refuses ends all of them with the same sentence."""
    decided: Any = None
    refused, sentence = None, ""
    if ranks.is_first:
        try:
            decided = decide()
        except Exception as error:
            if (known := sentence_for(error)) is None:
                raise
            refused, sentence = error, known
    decided, sentence = ranks.tell((decided, sentence), phase)
    ranks.barrier(phase)  # the first rank does not end before the others have read it
    if refused is not None:
        raise refused
    if sentence:
        raise RefusedOnFirst(sentence)
    return decided


def run_evaluation(run: RunDirectory, work: Callable[[Stage], object]) -> int:
    """Like run_stage, for what measures models that are there, and takes one process."""

    def body() -> None:
        config = run.read_config()
        last = config.steps[-1]
        run.step(last).path.mkdir(exist_ok=True)  # where its log goes, whatever is measured
        ranks = start_ranks(config.threads)
        record_start(run, "evaluation", config, ranks.size)
        work(make_stage(run, last, config, ranks))

    return end_in_sentences(body, run.error_file)


def end_in_sentences(body: Callable[[], None], error_file: Path) -> int:
    """Run `body`; what it raises for the user lands in `error_file` and on stderr. Returns the exit code."""
    TERMINATION.report = partial(report, error_file, EXIT_TERMINATED)
    try:
        grace()
        body()
        return 0
    except Terminated as ended:
        TERMINATION.report(str(ended))
        if not is_alone():
            os._exit(EXIT_TERMINATED)
        return EXIT_TERMINATED
    except Exception as raised:
        sentence = sentence_for(raised)
        if sentence is None:
            if is_alone():
                raise
            end_without_sentence(raised)
        code = EXIT_DIVERGED if isinstance(raised, Diverged) else EXIT_USER_ERROR
        notes = getattr(raised, "__notes__", []) or traceback.format_exception(raised)  # for --debug
        if PARENT_VARIABLE in os.environ:  # the command prints it: a launcher between them has exit codes of its own
            leave_report(error_file, sentence, code, "\n".join(notes))
        elif not isinstance(raised, RefusedOnFirst):  # else another rank prints it
            print(sentence, file=sys.stderr, flush=True)
        if not is_alone():
            os._exit(code)  # the other ranks may be waiting for this one: only the launcher can end them
        return code
    finally:
        stop_ranks()


def is_alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) == 1


def report(error_file: Path, code: int, sentence: str) -> None:
    """How SIGTERM has ended this rank."""
    if PARENT_VARIABLE in os.environ:
        leave_report(error_file, sentence, code)
    say(sentence)


def goes_on(checkpoints: Checkpoints) -> str:
    """From where the same command does."""
    newest = checkpoints.numbers()[-1:]
    where = f"from {checkpoints.directory / str(newest[0])}" if newest else "from the start of the step"
    return f"the same command goes on {where}"


def end_without_sentence(error: Exception) -> NoReturn:
    """End one of several ranks at once: leaving the process group could wait for the others, which wait for this one.

    Of a rank that only misses another one no traceback is kept, so that the log ends with what happened there.
    """
    if is_lost_peer(error):
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        print(
            f"Another process of this run, or its machine, is gone ({reason}): give the same command again to go on.",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(1.0)  # a launcher shall see that one first
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def sentence_for(error: Exception) -> str | None:
    """What a person is told of `error`; None for what is nobody's mistake but ours."""
    known = error if isinstance(error, UserError | Diverged) else out_of_memory(error)
    return file_sentence(error) if known is None else str(known)


def out_of_memory(error: Exception) -> UserError | None:
    """The sentence for an error of allocation, of a GPU or of main memory; None for other errors."""
    text = str(error)
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in text:
        return None
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
    return UserError(
        f"Memory ran out{f' (asked for {asked[1]} more)' if asked else ''}: go on with a smaller micro_batch_tokens, a "
        f"smaller rlhf.generation_batch or gradient_checkpointing, or start a run with LoRA or a higher zero_stage."
    )


def make_stage(run: RunDirectory, step: Step, config: RunConfig, ranks: Ranks) -> Stage:
    directory = run.step(step)
    if ranks.is_first:
        directory.error_file.unlink(missing_ok=True)
    quiet_libraries(directory.log_file, ranks.is_first)
    torch.manual_seed(config.seed)
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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_directory", type=Path, help="where the run lives; made if it is not there")
    parser.add_argument("--model", help="of a new run: a preset (opt-1.3b), a directory, or a hub id")
    parser.add_argument("--config", type=Path, action="append", default=[], help="YAML settings for a new run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting")
    parser.add_argument(
        "--local_rank", type=int, default=0, help="given by the deepspeed launcher; the rest is in RANK"
    )
    return parser.parse_args()


def given_settings(run: RunDirectory, arguments: argparse.Namespace) -> RunConfig | None:
    """What the arguments say; None: the run keeps its own. Raises UserError where neither is there."""
    if not (arguments.model or arguments.config or arguments.set):
        run.read_config()
        return None
    if not (arguments.model or arguments.config) and run.config_file.exists():
        stored = run.read_config().model_dump(mode="json")
        return found_from_anywhere(load_config([], arguments.set, stored))
    base = settings_of_model(arguments.model) if arguments.model else {}
    config = load_config(arguments.config, arguments.set, base)
    if config.data.source != EMBEDDED_DATA:  # what a preset says of the embedded dialogues does not hold for other data
        base = merge(base, {"evaluation": {"true_score": "none"}, "announce": ""})
        config = load_config(arguments.config, arguments.set, base)
    return inherit(found_from_anywhere(config), run)


def settings_of_model(model: str) -> dict[str, Any]:
    """What `--model` stands for. Raises UserError where it can be none of these."""
    preset = PRESETS / f"{model.lower()}.yaml"
    if "/" in model or model.startswith("package:") or (Path(model).is_dir() and not preset.is_file()):
        return {"model": model}
    if not preset.is_file() or model.startswith("_"):
        raise UserError(
            f"'{model}' is no preset and no directory (a hub id has the form owner/name): the files in {PRESETS} are "
            f"the presets."
        )
    return read_yaml(preset)


def quiet_libraries(log_file: Path, first: bool) -> None:
    """Libraries log to the step's log.txt; the terminal is for progress."""
    handler = logging.FileHandler(log_file) if first else logging.NullHandler()
    logging.captureWarnings(True)
    transformers.utils.logging.disable_progress_bar()
    for name in ("DeepSpeed", "transformers", "py.warnings", "torch", "accelerate", "peft"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
