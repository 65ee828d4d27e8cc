"""Settings as people write them: YAML files, presets, `key=value` pairs, merged and checked.

`load_config` merges, later wins: the defaults of config.py, YAML files (a preset is one), then `key=value` pairs with
dotted keys, which files may have too. An unknown key is an error that names the nearest right ones.
"""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from inference.chat_target import find_newest_model
from inference.errors import UserError
from inference.model_store import TINY
from training.config import TRAINED_ROLES, RunConfig
from training.data.sources import absolute, exists
from training.data_settings import EMBEDDED_DATA
from training.merging import KeyTwice, did_you_mean, load_yaml, merge, near_keys, what_is_wrong
from training.reward_specs import RewardSpec
from training.role_settings import OptimizerSettings

OPTIONS = {
    "data.source": "--data",
    "rlhf.fusion.mode": "--fusion",
    "rlhf.fusion.training": "--fusion",
    "sft_model": "--sft-model",
    "reward_model": "--reward-model",
    "trained_reward_model": "rlhf --reward-model",
}
"""Setting -> option of the command, where its name does not tell."""
OF_OTHERS = ("architecture", "versions")  # groups whose keys are no settings of ours


def load_config(
    files: list[Path],
    overrides: list[str],
    base: dict[str, Any] | None = None,
    flags: dict[str, Any] | None = None,
) -> RunConfig:
    """Merge `base`, YAML `files`, dotted `key=value` `overrides` and `flags`, later wins. Raises UserError."""
    merged = inherit_optimizer(base or {})
    for file in files:
        values = read_yaml(file)
        if "versions" in values:  # a run's own config.yaml: another run is no fork by that
            values = {key: value for key, value in values.items() if key not in ("versions", "fork_of")}
        merged = merge(merged, inherit_optimizer(values))
    set_values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set takes key=value, not '{override}'; for example --set rlhf.kl.coefficient=0.1")
        try:
            value: Any = load_yaml(text)
        except KeyTwice as error:
            raise UserError(f"--set {override}: {what_is_wrong(error)}.") from None
        except yaml.YAMLError:
            value = text
        value = "" if value is None else value  # `key=` empties a text
        if isinstance(value, str):  # YAML reads 1e-5 as a string
            with contextlib.suppress(ValueError):
                value = float(value)
        try:
            set_values = merge(set_values, nested({key.strip(): value}))
        except KeyTwice as error:
            raise UserError(f"--set {override}: {what_is_wrong(error)}.") from None
    merged = merge(merged, inherit_optimizer(set_values))
    config = validate_config(merge(merged, inherit_optimizer(flags or {})))
    return config.model_copy(update={"optimizer": OptimizerSettings()})  # the roles have it now


def inherit_optimizer(values: dict[str, Any]) -> dict[str, Any]:
    """`values` of one file or command line, with their `optimizer` block laid below that of each role it trains."""
    block, below = values.get("optimizer"), dict[str, Any]()
    for role in TRAINED_ROLES if isinstance(block, dict) else ():
        below = merge(below, nested({role: block}))
    return merge(below, values)


def validate_config(values: dict[str, Any]) -> RunConfig:
    """Build the RunConfig; the first thing wrong becomes one sentence."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise refusal(error, RunConfig) from None


UNION_KINDS = ("str", "list[str]", "constrained-int")


def refusal(error: ValidationError, model: type[BaseModel]) -> UserError:
    """Say the first thing wrong with values for `model` in one sentence."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if part not in UNION_KINDS)
    if first["type"] in ("extra_forbidden", "no_such_attribute"):
        value = first["input"]
        while isinstance(value, dict) and len(value) == 1:
            ((part, value),) = value.items()
            key += f".{part}"
        hint = did_you_mean(near_keys(key, setting_keys(model)), "docs/configuration.md lists all settings.")
        return UserError(f"There is no setting '{key}': {hint}")
    if first["type"] == "missing":
        return UserError(f"The setting '{key}' is missing; give it with --{key} or --set {key}=...")
    if first["input"] is None:
        return UserError(f"The setting '{key}' has no value: give it one, or leave the key out.")
    if first["type"] == "tuple_type":
        return UserError(f"Setting {key}: must be a list, as in [2, 4, 4] (got {first['input']!r}).")
    if first["type"] == "model_type":
        return UserError(f"'{key}' is a group of settings, as in {key}: {{...}} (got {first['input']!r}).")
    given = "" if first["type"] == "value_error" else f" (got {first['input']!r})"
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = message.partition(", unable to")[0].replace("a valid integer", "a whole number")
    if not key:
        return UserError(f"These settings do not fit together: {message}.")
    of_group = first["type"] == "value_error" and isinstance(first["input"], dict | BaseModel)
    joint = "." if of_group else ": "  # what is said of a group begins with a key in it
    return UserError(f"Setting {as_typed(key)}{joint}{message}{given}.")


def as_typed(key: str) -> str:
    """Write a setting's key, with the option that gives it where that has another name."""
    return f"{key} ({OPTIONS[key]})" if key in OPTIONS else key


def setting_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """List all dotted keys, groups included."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += setting_keys(field.annotation, f"{prefix}{name}.")
    return keys


def nested(values: dict[Any, Any]) -> dict[Any, Any]:
    """`values` with dotted keys as groups. Raises KeyTwice where a setting is then there twice."""
    result: dict[Any, Any] = {}
    for key, value in values.items():
        value = nested(value) if isinstance(value, dict) and key not in OF_OTHERS else value
        first, *rest = str(key).split(".") if isinstance(key, str) else [key]
        for part in reversed(rest):
            value = {part: value}
        result[first] = join(result[first], value, str(first)) if first in result else value
    return result


def join(one: Any, other: Any, name: str) -> Any:
    """Join two groups. Raises KeyTwice where both have a setting."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        raise KeyTwice(problem=f"'{name}' is there twice: put both together")
    shared = {key: join(one[key], other[key], f"{name}.{key}") for key in one.keys() & other.keys()}
    return {**one, **other, **shared}


def read_yaml(file: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read the settings of a file, laid over those of the file beside it that `extends` names."""
    file = Path(file)
    try:
        values = load_yaml(file.read_text(encoding="utf-8"))
        values = nested(values) if isinstance(values, dict) else values
    except FileNotFoundError:
        raise UserError(f"There is no configuration file {file}.") from None
    except OSError as error:
        raise UserError(f"The configuration file {file} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not valid YAML: it is not UTF-8 text; save it as UTF-8.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {what_is_wrong(error)}.") from None
    except RecursionError:
        raise UserError(f"{file} holds no settings: a block in it contains itself, or hundreds of others.") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no settings: it must be a YAML mapping such as 'sft: {{epochs: 2}}'.")
    below = values.pop("extends", None)
    if below is None:
        return values
    if Path(str(below)).name != str(below):
        raise UserError(f"{file} extends {below!r}: give the name of a file beside it, without its .yaml.")
    other = file.with_name(f"{below}.yaml")
    if other in (*extending, file):
        raise UserError(f"{file} extends {other}, which extends it: leave one of the two out.")
    return merge(read_yaml(other, (*extending, file)), values)


MODELS = ("model", "reward_model", "sft_model", "trained_reward_model", "reference_model")


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Make paths absolute that exist now; other names (of hub, preset, package) stay. Changes `config`."""
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
    rlhf.reward_function = [str(absolute_function(spec)) for spec in rlhf.reward_functions]
    return config


def absolute_function(spec: RewardSpec) -> RewardSpec:
    if spec.file is None:
        return spec
    return replace(spec, text=f"{absolute(str(spec.file))}:{spec.text.rpartition(':')[2]}")


def absolute_model(source: str) -> str:
    """Make the path of a model absolute. As in resolve_model, `tiny` and packages come first, then directories, then
    the hub."""
    if not source or source == TINY or source.startswith("package:") or not exists(source):
        return source
    return str(Path(source).expanduser().resolve())
