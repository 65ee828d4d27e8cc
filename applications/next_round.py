"""`rlhf-chat run --from RUN --go-on`: the settings of a run that goes on from the newest models of another one."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from applications.settings import PRESETS
from inference.chat_target import find_newest_model
from inference.errors import UserError, typed
from training.config import RunConfig
from training.config_files import read_yaml
from training.lineage import newest_reward_model
from training.merging import merge
from training.opening import settings_of_new_run
from training.run_directory import RunDirectory
from training.steps import REWARD

FEW_PAIRS = PRESETS / "_next_round.yaml"
"""What a round trains otherwise than the run before, on hundreds of pairs and not thousands."""


def next_name(parent: Path) -> str:
    """`demo-round2` after `demo`, `demo-round3` after that."""
    name = parent.resolve().name
    known = re.fullmatch(r"(.+)-round(\d+)", name)
    return f"{known[1]}-round{int(known[2]) + 1}" if known else f"{name}-round2"


def next_command(parent: Path, data: str = "") -> str:
    """That makes a new run, whose name is given where one with the usual name is there; `data` are other options."""
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
