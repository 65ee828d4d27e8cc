"""Who has said yes to what a run's files make a command execute, send to, fetch, read or follow.

What decides lies outside of the run: a file of the user's, where each line has a run's path and hashes of what it may
do. A run that is made here may do what it was told; one that came from elsewhere, or has been changed, needs a yes.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from inference.errors import UserError, reason
from inference.model_store import TINY
from inference.streams import redacted
from training.config import RunConfig
from training.config_files import MODELS
from training.data.rows import DEMONSTRATIONS_FILE
from training.data.sources import parse_source
from training.data_settings import EMBEDDED_DATA
from training.formulas.tables import own_files
from training.inputs import code_files, files_of, stored_model
from training.lineage import base_model, reward_model_before
from training.run_directory import RunDirectory


@dataclass(frozen=True)
class Use:
    """Something outside of a run's own rows and weights that its files ask for."""

    what: str  # what is done, to follow `would`
    setting: str = ""
    """The setting that asks for it."""
    content: str = ""
    """SHA-256 of a file that is executed or obeyed."""
    lies_in_run: bool = False  # whether who hands the run on hands the file on too

    @property
    def text(self) -> str:
        return f"{self.what} ({self.setting})" if self.setting else self.what

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps([self.text, self.content]).encode()).hexdigest()


def require_yes(run: Path, uses: Iterable[Use], trusts: bool) -> None:
    """Raise UserError unless each use is known of this run, or gets its yes: `trusts` (--trust), or by a terminal."""
    asked = unanswered(run, uses)
    if not asked:
        return
    texts = [" ".join(redacted(use.text).split()) for use in asked]
    foreign = f"{run} was not made here, or has been changed or moved since"
    if not trusts and sys.stdin.isatty() and sys.stderr.isatty():
        lines = "".join(f"  {text}\n" for text in texts)
        print(f"{foreign}. This command would\n{lines}Do you trust that? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise UserError("Nothing was done. (--trust says yes beforehand.)")
    elif not trusts:
        raise UserError(f"{foreign}; this command would {'; '.join(texts)}. If you trust that, say so with --trust.")
    remember(run, asked)


def unanswered(run: Path, uses: Iterable[Use]) -> list[Use]:
    known = keys_of(run)
    return [use for use in dict.fromkeys(uses) if not {use.key, replace(use, content="").key} & known]


def require_reading(target: Path, trusts: bool) -> None:
    require_yes(target, of_reading(target), trusts)


def made_here(run: Path, uses: Iterable[Use]) -> None:
    """Remember what was typed for the run. A file outside of the run is its user's to change."""
    remember(run, [use if use.lies_in_run else replace(use, content="") for use in uses])


def remember(run: Path, uses: Iterable[Use]) -> None:
    """Add to the record, or say that it cannot be written, as commands ask again then."""
    known = keys_of(run)
    keys = [key for use in uses if (key := use.key) not in known]
    if not keys:
        return
    try:
        file = record_file()
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8") as record:
            record.write("\n" + json.dumps({"run": str(run.resolve()), "keys": keys}))  # the last may be cut short
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        print(f"What {run} may do cannot be kept ({reason(error)}): commands will ask again.", file=sys.stderr)


def keys_of(run: Path) -> set[str]:
    """Read what the record has of the run at this path."""
    keys: set[str] = set()
    path = str(run.resolve())
    with suppress(OSError, RuntimeError, ValueError):
        for line in record_file().read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, LookupError, TypeError):  # a damaged one says nothing
                entry = json.loads(line)
                keys.update(entry["keys"] if entry["run"] == path else ())
    return keys


def record_file() -> Path:
    """Return the file of records, in XDG_STATE_HOME if absolute (a run might hold another), or ~/.local/state."""
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (given if given.is_absolute() else Path("~/.local/state").expanduser()) / "rlhf-chat" / "trusted.jsonl"


def of_reading(run: Path) -> list[Use]:
    """List the files of the run that lead out of it, or are no files; none of what is no run."""
    if not (run / "config.yaml").exists():
        return []
    home, uses = run.resolve(), []
    for folder, folders, files in os.walk(home):
        for path in (Path(folder) / name for name in sorted(folders + files)):
            name = path.relative_to(home)
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                uses.append(Use(f"follow {name}, which leads to {path.resolve()}"))
            elif path.exists() and not (path.is_file() or path.is_dir()):
                uses.append(Use(f"open {name}, which is no plain file"))
    return uses


def of_training(run: RunDirectory, config: RunConfig) -> list[Use]:
    """List the uses of `run`, `sft`, `reward`, `dpo`, `rlhf` and the stage scripts."""
    return [
        *of_reading(run.path),
        *of_rewards(run, config),
        *of_formulas(run, config),
        *of_models(run, config),
        *of_data(run, config),
        *of_parents(run, config),
        *of_trackers(run, config),
        *(
            Use(f"give DeepSpeed {json.dumps(role.deepspeed)}", f"{name}.deepspeed")
            for name, role in config.trained_roles.items()
            if role.deepspeed
        ),
    ]


def inherited(parent: RunDirectory, wanted: Iterable[Use]) -> list[Use]:
    """List the uses of a run that goes on from `parent`, or is a fork of it: what both ask for, and reading."""
    config = parent.read_config()
    again = [*of_data(parent, config, unread=True), *of_parents(parent, config, unread=True)]  # as a fork may
    theirs = [*of_training(parent, config), *again]
    return [*of_reading(parent.path), *shared(theirs, wanted)]


def shared(theirs: Iterable[Use], ours: Iterable[Use]) -> list[Use]:
    """List those of `theirs` that use what `ours` do, whichever setting names it."""
    used = {use.what for use in ours}
    return [use for use in theirs if use.what in used]


def of_evaluation(run: RunDirectory, config: RunConfig, judge: str) -> list[Use]:
    """List the uses of `eval`: the reward function and the address only where they judge."""
    return [*of_reading(run.path), *(of_rewards(run, config) if judge == "reward" else ()), *of_models(run, config)]


def of_looking(run: RunDirectory, config: RunConfig) -> list[Use]:
    """List the uses of `data show` and `data lint`."""
    return [*of_reading(run.path), *of_models(run, config), *of_data(run, config)]


def of_rewards(run: RunDirectory, config: RunConfig) -> Iterator[Use]:
    """Yield the reward function's files and the reward service's address."""
    for _, file in code_files(config, "reward_function") if config.rlhf.reward_weights.function else ():
        yield of_file(run, file, f"run {file}", "rlhf.reward_function")
    if any(spec.name == "reasoning" for spec in config.rlhf.asked_functions):
        yield Use("let reasoning-gym evaluate answers, in some tasks as Python", "rlhf.reward_function")
    if config.rlhf.reward_url and config.rlhf.reward_weights.url:
        yield Use(f"send prompts and answers to {config.rlhf.reward_url}", "rlhf.reward_url")


def of_formulas(run: RunDirectory, config: RunConfig) -> Iterator[Use]:
    for setting, path in own_files(config):
        for _, file in files_of("formulas", path):
            yield of_file(run, file, f"run {file}", setting)


def of_models(run: RunDirectory, config: RunConfig) -> Iterator[Use]:
    """Yield models of the hub; no code of a model is ever run, so that one on this machine needs no yes."""
    named = [(setting, getattr(config, setting)) for setting in MODELS]
    for setting, name in [*named, ("model", base_model(config)), ("trained_reward_model", reward_model_before(config))]:
        is_here = name.startswith("package:") or Path(name).is_absolute() or stored_model(run, name).is_dir()
        if name and name != TINY and not is_here:
            yield Use(f"fetch the model {name} from the hub", setting)


def of_data(run: RunDirectory, config: RunConfig, unread: bool = False) -> Iterator[Use]:
    """Yield sources that lie outside of the run and are yet to be read; `unread`: as if none had been."""
    from training.data.prepare import COUNTS_FILE  # imports transformers, and chat goes without

    named = [("data.source", config.data.sources), ("data.eval_source", config.data.eval_sources)]
    sources = [(key, text) for key, texts in named for text in texts if unread or not (run.data / COUNTS_FILE).exists()]
    mixes = config.rlhf.ptx.coefficient and (unread or not (run.data / DEMONSTRATIONS_FILE).exists())
    sources += [("rlhf.ptx.source", config.rlhf.ptx.source)] if mixes else []
    for setting, text in sources:
        source = parse_source(text)
        if text and text != EMBEDDED_DATA and not source.is_task:
            path = source.copy or source.path
            if not path.resolve().is_relative_to(run.path.resolve()):
                how = "read" if path.exists() else "fetch from the hub"
                yield Use(f"{how} the data {source.label}", setting)


def of_parents(run: RunDirectory, config: RunConfig, unread: bool = False) -> Iterator[Use]:
    """Yield runs whose steps, and rows that are yet to be made, may be taken over."""
    from training.data.prepare import COUNTS_FILE  # imports transformers, and chat goes without

    rows = config.data.parent if unread or not (run.data / COUNTS_FILE).exists() else ""
    for setting, path in (("fork_of", config.fork_of), ("data.parent", rows)):
        if path and RunDirectory(Path(path)).config_file.exists():
            yield Use(f"take over what is in the run {path}", setting)


def of_trackers(run: RunDirectory, config: RunConfig) -> Iterator[Use]:
    if config.logging.wandb:
        project = config.logging.wandb_project
        yield Use(f"send settings and metrics to Weights & Biases, project {project}", "logging.wandb")
        theirs = run.path / "wandb" / "settings"  # which may name another address
        if theirs.is_file():
            yield of_file(run, theirs, f"let {theirs.resolve()} say where they are sent")


def of_file(run: RunDirectory, file: Path, what: str, setting: str = "") -> Use:
    """Describe a file that is executed or obeyed, as it is now."""
    with open(file, "rb") as handle:
        content = hashlib.file_digest(handle, "sha256").hexdigest()
    return Use(what, setting, content, file.resolve().is_relative_to(run.path.resolve()))
