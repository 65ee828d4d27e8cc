"""The models that a prepared run holds itself, so that no cache and no hub is asked for them."""

import json
import os
import re
import shutil
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from inference.disk import writing
from inference.errors import UserError
from inference.model_store import PICKLES, SAFETENSORS, TEXT_FILES, Report, check_model_directory, resolve_model
from training.config import RunConfig
from training.lineage import base_model, reward_model_before
from training.run_directory import RunDirectory, write_directory, write_json

NOTICES = ("LICENSE*", "NOTICE*", "README.md")


def kept_model(run: RunDirectory, source: str) -> Path:
    """Where the run holds the model `source`, if it does."""
    return run.path / "models" / re.sub(r"[^\w.=-]+", "--", source.removeprefix("package:"))


def local_model(run: RunDirectory, source: str, report: Report = print) -> Path:
    """The local directory of `source`: the run's own where it holds one, else as `resolve_model` has it."""
    kept = kept_model(run, source)
    if not source or not kept.is_dir():
        return resolve_model(source, report)
    check_model_directory(kept)
    return kept


def models_of(config: RunConfig) -> list[str]:
    """The models that the steps of a run, its comparison and its judges load and that none of its steps makes."""
    return list(
        dict.fromkeys(
            source
            for source in (
                config.actor_source,
                config.scorer_source if config.needs_scorer else "",
                config.trained_reward_model,
                config.reference_model,
                base_model(config),
                reward_model_before(config),
            )
            if source
        )
    )


def keep_models(run: RunDirectory, config: RunConfig, report: Report) -> None:
    """Put the models that do not lie where the user said into the run. Those of a directory stay there."""
    for source in models_of(config):
        kept = kept_model(run, source)
        if Path(source).is_absolute():
            continue
        with suppress(UserError):  # not there, or not whole
            check_model_directory(kept)
            continue
        directory = resolve_model(source, report)

        def write(place: Path, directory: Path = directory) -> None:
            for file in files_of_model(directory):
                link_or_copy(file, place / file.name)

        with writing(f"the model {source}", run.path):
            write_directory(kept, write)


def files_of_model(directory: Path) -> list[Path]:
    """Configuration, tokenizer, one form of the weights, licences."""
    files = [file for file in sorted(directory.iterdir()) if file.is_file()]
    safe = [file for file in files if any(fnmatch(file.name, pattern) for pattern in SAFETENSORS)]
    wanted = (*TEXT_FILES, *NOTICES, *(SAFETENSORS if safe else PICKLES))
    return [file for file in files if any(fnmatch(file.name, pattern) for pattern in wanted)]


def link_or_copy(file: Path, place: Path) -> None:
    """On one disk both names are one file of the user's, so that weights take no room twice."""
    file = file.resolve()  # the hub's cache holds links to it
    try:
        if file.stat().st_uid != os.getuid():
            raise PermissionError
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)


def name_base(directory: Path, old: Path, new: Path) -> None:
    """In the adapters in `directory`, which name their base by a full path: in `new` what lay in `old`."""
    for file in directory.rglob("adapter_config.json"):
        values = json.loads(file.read_text(encoding="utf-8"))
        base = Path(values["base_model_name_or_path"] or "/").resolve()
        if base.is_relative_to(old.resolve()):
            base = new.resolve() / base.relative_to(old.resolve())
            write_json(file, values | {"base_model_name_or_path": str(base)})
