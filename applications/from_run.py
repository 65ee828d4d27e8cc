"""`rlhf-chat run --from RUN`: a fork, RUN's settings with what is typed laid over them, or the next round."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from applications.preset_store import PRESETS
from inference.chat_target import find_newest_model
from inference.errors import UserError, typed
from inference.preferences import PreferenceFile
from training.changes import differences
from training.config import RunConfig
from training.config_files import load_config, read_yaml, with_absolute_paths
from training.data.sources import parse_source
from training.lineage import newest_reward_model
from training.merging import merge
from training.opening import settings_of_new_run
from training.run_directory import RunDirectory
from training.steps import REWARD, STEPS

FEW_PAIRS = PRESETS / "_next_round.yaml"
"""What a round trains otherwise than the run before, on hundreds of pairs and not thousands."""


def next_name(parent: Path) -> str:
    """`demo-round2` after `demo`, `demo-round3` after that."""
    name = parent.resolve().name
    known = re.fullmatch(r"(.+)-round(\d+)", name)
    return f"{known[1]}-round{int(known[2]) + 1}" if known else f"{name}-round2"


def next_command(parent: Path, data: str = "") -> str:
    """The command that makes a new run, with a name where the usual one is taken; `data` are other options."""
    name = usual = next_name(parent)
    while (Path("runs") / name).exists():
        name = next_name(Path(name))
    return f"rlhf-chat run --from {typed(parent)} --go-on{data}{f' --name {name}' if name != usual else ''}"


def settings_of_next_round(parent: Path, files: list[Path], overrides: list[str], given: dict[str, Any]) -> RunConfig:
    """What is given, laid over the parent's settings, whose newest models are begun with. Raises UserError where the
    parent lacks a model or preferences.
    """
    before = RunDirectory(parent)
    config = before.read_config()
    models = models_of(before, "reward_model" in given)
    values = merge({**config.model_dump(mode="json"), **models}, read_yaml(FEW_PAIRS))
    preferences = parent.resolve() / "preferences.jsonl"
    values["data"] |= {"source": str(preferences), "parent": str(parent.resolve()), "limit": 0}
    values["data"] |= {"split_seed": config.split_seed}
    settings = settings_of_new_run(values, files, overrides, given, None)
    if settings.data.source == str(preferences) and not preferences.exists():
        raise UserError(
            f"{parent} has no preferences yet ({preferences.name}): collect some with rlhf-chat prefer {typed(parent)} "
            f"or on the page of rlhf-chat serve {typed(parent)}, or give pairs with --data FILE."
        )
    named = "reward_model" in {**models, **given} or settings.reward_model != config.reward_model
    if REWARD in settings.steps and not (named or settings.given_model(REWARD)):
        raise UserError(
            f"{parent} has no reward model to go on from: use the pairs alone with --method dpo, train one there first "
            f"with rlhf-chat reward {typed(parent)}, or name what step 2 is to begin with: --reward-model MODEL."
        )
    return settings


def models_of(run: RunDirectory, has_scorer: bool) -> Mapping[str, Any]:
    """Settings by which another run begins with the newest models of this one, the reward model unless it has one."""
    _, policy = find_newest_model(run.path)
    values: dict[str, Any] = {"sft_model": str(policy.resolve()), "trained_reward_model": "", "reference_model": ""}
    if not has_scorer and (reward_model := newest_reward_model(run)):
        reward = run.read_config().reward.model_dump(mode="json")
        values |= {"reward_model": reward_model, "reward": {**reward, "layers": 0, "initialize_from": "base"}}
    return values | {"architecture": {}, "announce": "", "fork_of": ""}


def from_run(
    parent: Path,
    path: Path | None,
    files: list[Path],
    overrides: list[str],
    given: dict[str, Any],
    goes_on: bool | None,
) -> tuple[Path, RunConfig, str]:
    """Path and settings of the run, and a sentence that says which of the two it is and why.

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
        settings = with_absolute_paths(load_config(files, overrides, stored.model_dump(mode="json"), given))
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
    differing = differences(before.model_dump(), fork.model_dump())
    if others := [key for key in differing if key not in ("fork_of", "data.split_seed", "announce")]:
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
    settings = with_absolute_paths(load_config(files, overrides, values, given))
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
