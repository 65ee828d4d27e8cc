"""`rlhf-chat run --from RUN`: a fork, RUN's settings with what is typed laid over them, or the next round."""

from pathlib import Path
from typing import Any

from applications.next_round import next_name, settings_of_next_round
from inference.errors import UserError
from inference.preferences import PreferenceFile
from training.changes import differences
from training.config import RunConfig
from training.config_files import load_config
from training.data.sources import parse_source
from training.merging import merge
from training.opening import settings_of_new_run
from training.paths import found_from_anywhere
from training.run_directory import RunDirectory
from training.steps import STEPS


def from_run(
    parent: Path,
    path: Path | None,
    files: list[Path],
    overrides: list[str],
    given: dict[str, Any],
    goes_on: bool | None,
) -> tuple[Path, RunConfig, str]:
    """Place and settings of the run, and a sentence that says which of the two it is and why.

    Where `goes_on` does not say it, it is the next round on preferences of people: those that `--data` names or, where
    nothing is typed that changes a setting, those collected for the parent. A run that is there stays what it is,
    with its own settings. Raises UserError where it is of another kind or from another run, or cannot begin.
    """
    before = RunDirectory(parent).read_config()
    fork, why = None, "as asked"
    if path is None or not RunDirectory(path).config_file.exists():
        fork = settings_of_fork(parent, before, files, overrides, given)
        if goes_on is None:
            goes_on, why = follows(parent, before, fork)
        default = next_name(parent) if goes_on else f"{parent.resolve().name}-fork"
        path = path or Path("runs") / default
    if RunDirectory(path).config_file.exists():
        stored = RunDirectory(path).read_config()
        require_kind(path, stored, parent, goes_on)
        kind = f"a fork of {parent}" if stored.fork_of else f"the next round after {parent}"
        settings = found_from_anywhere(load_config(files, overrides, stored.model_dump(mode="json"), given))
        return path, settings, f"{path} is {kind}."
    if fork is not None and not goes_on:
        return path, fork, f"{path} is a fork of {parent} ({why}; --go-on: the next round, from its newest models)."
    settings = settings_of_next_round(parent, files, overrides, given)
    return path, settings, f"{path} is the next round after {parent}, from its newest models ({why}; else --fork)."


def require_kind(path: Path, stored: RunConfig, parent: Path, goes_on: bool | None) -> None:
    """Raise UserError where the run that is there at `path` is from another one, or not what is asked for."""
    made_from = stored.fork_of or stored.round_of
    if made_from != str(parent.resolve()):
        made = f"from {made_from}" if made_from else "without --from"
        raise UserError(f"{path} was made {made}, not from {parent}: give the new run another --name.")
    if goes_on is not None and goes_on == bool(stored.fork_of):
        made = "a fork of" if stored.fork_of else "the next round after"
        raise UserError(f"{path} is there already, as {made} {parent}: give the new run another --name.")


def follows(parent: Path, before: RunConfig, fork: RunConfig) -> tuple[bool, str]:
    """Whether a run from `parent`, which as a fork would have the settings `fork`, is its next round, and why."""
    if fork.data.source != before.data.source and any(map(are_preferences, fork.data.sources)):
        return True, "--data has preferences of people"
    found = differences(before.model_dump(), fork.model_dump())
    if others := [key for key in found if key not in ("fork_of", "data.split_seed", "announce")]:
        return False, f"{others[0]} differs"
    if not (parent / "preferences.jsonl").exists():
        return False, "no preferences are collected for it"
    return True, "no setting differs, and it has preferences"


def settings_of_fork(
    parent: Path, before: RunConfig, files: list[Path], overrides: list[str], given: dict[str, Any]
) -> RunConfig:
    """What is given, laid over the parent's settings, whose split stays. New preferences alone leave its demonstrations
    and what it held out."""
    values = before.model_dump(mode="json") | {"fork_of": str(parent.resolve()), "announce": ""}
    values["data"]["split_seed"] = before.split_seed
    if "seed" in {*given, *(override.partition("=")[0].strip() for override in overrides)}:  # all steps take it
        values = merge(values, {step.command: {"seed": -1} for step in STEPS})
    settings = found_from_anywhere(load_config(files, overrides, values, given))
    if settings.data.source != before.data.source:
        if all(map(are_preferences, settings.data.sources)):
            values["data"] |= {"parent": values["fork_of"], "limit": 0}
        settings = settings_of_new_run(values, files, overrides, given, None)
    if (settings.model, settings.reward_model) != (before.model, before.reward_model):
        settings.architecture = {}
    return settings


def are_preferences(source: str) -> bool:
    """Whether a data source is a file of what people preferred here."""
    path = parse_source(source).path
    if not path.is_file() or path.suffix != ".jsonl":
        return False
    try:
        PreferenceFile(path).require_own()
    except UserError:
        return False
    return path.stat().st_size > 0
