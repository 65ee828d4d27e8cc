"""Paths in the settings, as they are found from any working directory: a run goes on from elsewhere, and is moved."""

from dataclasses import replace
from pathlib import Path

from inference.chat_target import find_newest_model
from inference.model_store import TINY
from training.config import EMBEDDED_DATA, RunConfig
from training.data.sources import absolute, exists
from training.reward_specs import RewardSpec

MODELS = ("model", "reward_model", "sft_model", "trained_reward_model", "reference_model")


def found_from_anywhere(config: RunConfig) -> RunConfig:
    """`config` with absolute paths to what is there now; other names (of hub, preset, package) stay."""
    reference = Path(config.reference_model).expanduser()
    if config.reference_model and (reference / "config.yaml").is_file():  # a run, whose newest model it is
        config.reference_model = str(find_newest_model(reference)[1])
    for name in MODELS:
        setattr(config, name, absolute_model(getattr(config, name)))
    if config.data.source != EMBEDDED_DATA:
        config.data.source = [absolute(text) for text in config.data.sources]
    config.data.eval_source = [absolute(text) for text in config.data.eval_sources]
    config.data.parent, config.fork_of = map(absolute_model, (config.data.parent, config.fork_of))
    rlhf = config.rlhf
    rlhf.ptx.source = absolute(rlhf.ptx.source) if rlhf.ptx.source else ""
    rlhf.reward_function = [str(absolute_function(each)) for each in rlhf.reward_functions]
    return config


def absolute_function(spec: RewardSpec) -> RewardSpec:
    if spec.file is None:
        return spec
    return replace(spec, text=f"{absolute(str(spec.file))}:{spec.text.rpartition(':')[2]}")


def absolute_model(source: str) -> str:
    """As resolve_model reads it: `tiny` and packages come first, then directories, then the hub."""
    if not source or source == TINY or source.startswith("package:") or not exists(source):
        return source
    return str(Path(source).expanduser().resolve())
