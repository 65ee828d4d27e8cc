"""The stage scripts from arguments to end: settings, the lock, one decision for all ranks, errors as sentences.

python training/step1_sft/main.py runs/demo                                   one process, settings from the run
torchrun --nproc-per-node 2 training/step1_sft/main.py runs/new --config my.yaml --set sft.epochs=2
"""

import argparse
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from inference.disk import file_sentence
from inference.errors import EXIT_DIVERGED, EXIT_USER_ERROR, UserError
from training.config import RunConfig
from training.config_files import load_config, read_yaml, with_absolute_paths
from training.distributed import Ranks, is_lost_peer, share_cores, start_ranks, stop_ranks
from training.error_report import leave_report
from training.inputs import changed_inputs
from training.launchers import PARENT_VARIABLE
from training.metrics import WARNING, Display
from training.opening import open_run, record_start, settings_of_new_run
from training.preparation.prepare import prepare
from training.run_directory import RunDirectory, StepDirectory
from training.stage import Diverged, Stage, make_stage
from training.steps import STEPS, Step
from training.termination import EXIT_TERMINATED, TERMINATION, Terminated, grace, say
from training.trust import of_evaluation, of_training, require_yes

T = TypeVar("T")
PRESETS = Path(__file__).parent.parent / "applications" / "presets"
"""Files of settings, the command's; nothing of it is imported."""
ORPHANS_END = 2.0
"""Seconds in which the ranks of a killed launcher have ended themselves; a new one takes longer to start."""


class RefusedOnFirst(UserError):
    """What the first rank refused, on the others: the first one prints it."""


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
    """Hold the step until `held` ends, prepare the run, and return its settings; None if the step is done."""
    if PARENT_VARIABLE in os.environ:  # the command holds the run and has prepared it
        held.enter_context(directory.locked())
        config = run.read_config()
    else:
        settings = given_settings(run, arguments)
        with run.locked(ORPHANS_END):
            config = open_run(run, settings, arguments.trust)
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
    """Prepare a run for the command, for the processes that it will start."""
    parser = argparse.ArgumentParser(description="Fetch the models and make the data of a run.")
    parser.add_argument("run_directory", type=Path)
    parser.add_argument("steps", nargs="*", help="those that follow now, as sft; default: all of the run")
    parser.add_argument("--elsewhere", action="store_true", help="put into the run what they need there")
    add_trust(parser)
    arguments = parser.parse_args()
    run = RunDirectory(arguments.run_directory)

    def body() -> None:
        config = run.read_config()
        if PARENT_VARIABLE not in os.environ:
            require_yes(run.path, of_training(run, config), arguments.trust)
        steps = [step for step in STEPS if step.command in arguments.steps]
        prepare(config, run, config.processes, Display(log=run.log_file).say, steps, arguments.elsewhere)
        record_start(run, "preparation", config, 1)

    return end_in_sentences(body, run.error_file)


def decided_by_first(ranks: Ranks, decide: Callable[[], T], phase: str) -> T:
    """Return what the first rank decides on all ranks. What it refuses ends all of them with the same sentence."""
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


def run_evaluation(run: RunDirectory, work: Callable[[Stage], object], judge: str, trusts: bool) -> int:
    """Run as run_stage does, for what measures finished models, and takes one process."""

    def body() -> None:
        config = run.read_config()
        if PARENT_VARIABLE not in os.environ:
            require_yes(run.path, of_evaluation(run, config, judge), trusts)
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
    if PARENT_VARIABLE in os.environ:
        leave_report(error_file, sentence, code)
    say(sentence)


def end_without_sentence(error: Exception) -> NoReturn:
    """End one of several ranks at once: leaving the process group could wait for the others, which wait for this one.

    A rank that only misses another one prints no traceback, so that the log ends with what happened there.
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
    """Say what a person is told of `error`; None for what is nobody's mistake but ours."""
    known = error if isinstance(error, UserError | Diverged) else out_of_memory(error)
    return file_sentence(error) if known is None else str(known)


def out_of_memory(error: Exception) -> UserError | None:
    """Write the sentence for an error of allocation, of a GPU or of main memory; None for other errors."""
    text = str(error)
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in text:
        return None
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
    return UserError(
        f"Memory ran out{f' (asked for {asked[1]} more)' if asked else ''}: go on with a smaller micro_batch_tokens, a "
        f"smaller rlhf.generation_batch or gradient_checkpointing, or start a run with LoRA or a higher zero_stage."
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_directory", type=Path, help="where the run lives; made if it is not there")
    parser.add_argument("--model", help="of a new run: a preset (opt-1.3b), a directory, or a hub id")
    parser.add_argument("--config", type=Path, action="append", default=[], help="YAML settings for a new run")
    parser.add_argument(
        "--plan", metavar="FILE", help="where step 3 runs each call, as `rlhf-chat plan --out` writes it"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting")
    add_trust(parser)
    parser.add_argument("--version", action="version", version=f"rlhf-chat {version('rlhf-chat')}")
    parser.add_argument(
        "--local_rank", type=int, default=0, help="given by the deepspeed launcher; the rest is in RANK"
    )
    return parser.parse_args()


def add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trust", action="store_true", help="yes to what a run from elsewhere would run and send to")


def given_settings(run: RunDirectory, arguments: argparse.Namespace) -> RunConfig | None:
    """Read the settings that the arguments give; None: the run keeps its own. Raises UserError without either."""
    if arguments.plan == "auto":
        raise UserError(
            "--plan auto is for the processes of one machine that rlhf-chat run starts: write a plan for these with "
            "rlhf-chat plan --nodes N --gpus-per-node M --out plan.yaml, and give --plan plan.yaml."
        )
    overrides = [*arguments.set, *([f"rlhf.plan={arguments.plan}"] if arguments.plan else [])]
    if not (arguments.model or arguments.config or overrides):
        run.read_config()
        return None
    if not (arguments.model or arguments.config) and run.config_file.exists():
        stored = run.read_config().model_dump(mode="json")
        return with_absolute_paths(load_config([], overrides, stored))
    base = settings_of_model(arguments.model) if arguments.model else {}
    return settings_of_new_run(base, arguments.config, overrides, {}, run)


def settings_of_model(model: str) -> dict[str, Any]:
    """Read the settings that `--model` stands for. Raises UserError where it names none."""
    preset = PRESETS / f"{model.lower()}.yaml"
    if "/" in model or model.startswith("package:") or (Path(model).is_dir() and not preset.is_file()):
        return {"model": model}
    if not preset.is_file() or model.startswith("_"):
        raise UserError(
            f"'{model}' is no preset and no directory (a hub id has the form owner/name): the files in {PRESETS} are "
            f"the presets."
        )
    return read_yaml(preset)
