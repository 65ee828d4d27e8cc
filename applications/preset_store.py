"""Finding and reading presets: named settings that ship with the project, one YAML file each.

A preset may say `extends: <other preset>`; its own values lie on top. Names that begin with `_` are only there to be
extended. Read at every start of the command, so nothing heavy is imported here.
"""

import copy
import difflib
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from inference.errors import UserError
from training.merging import did_you_mean, likeness, merge

PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """The presets that a user can name, sorted by family and size."""
    names = [file.stem for file in PRESETS.glob("*.yaml") if not file.stem.startswith("_")]
    return sorted(names, key=_family_and_size)


def load_preset(name: str) -> dict[str, Any]:
    """A preset's values (keys of RunConfig), what it extends merged in. Raises UserError for an unknown name.

    `architecture.reward_model` is filled in from the preset whose model that is.
    """
    if name.lower() not in preset_names():
        raise UserError(f"There is no preset '{name}': {_near(name)}")
    values = copy.deepcopy(_read(name.lower()))  # `_read` caches its own
    architecture = values.setdefault("architecture", {})
    known = known_architecture(values.get("reward_model") or values["model"])
    if known is not None:
        architecture["reward_model"] = known
    return values


def settings_for_model(model: str) -> dict[str, Any]:
    """What `--model` stands for: a preset's values, or `{"model": model}` for a directory, hub id or package.

    A preset is found by its name or by its model's name, upper and lower case alike. A hub id finds a preset also by
    its last part, with or without `-Instruct`; the model is then the one given, the settings are the preset's.
    Raises UserError with the nearest name where `model` can be none of these.
    """
    path, name = Path(model).expanduser(), _preset_of(model)
    is_name = "/" not in model and not model.startswith((".", "~"))
    if path.is_dir() and not (is_name and name):  # `./tiny` is not `tiny`
        return {"model": model if is_name else str(path.resolve())}
    if is_name and name is None and not model.startswith("package:"):
        raise UserError(f"'{model}' is no preset and no directory (a hub id has the form owner/name): {_near(model)}")
    if not is_name and (model.count("/") != 1 or model.startswith((".", "~", "/")) or model.endswith("/")):
        raise UserError(f"There is no directory {model}; give a model directory, a hub id (owner/name) or a preset.")
    values = {"model": model} if name is None else load_preset(name)
    if not is_name and values["model"].lower() != model.lower():  # of the hub, with the preset's settings
        values["model"] = model
    return values


def known_architecture(model: str) -> dict[str, Any] | None:
    """Hugging Face configuration values of a preset's model, found as `settings_for_model` does; None for others."""
    name = _preset_of(model)
    return None if name is None else copy.deepcopy(_read(name).get("architecture", {}).get("model"))


def is_preset_architecture(values: dict[str, Any]) -> bool:
    """Whether these configuration values come from a preset (and so belong to its model alone)."""
    return any(_read(name).get("architecture", {}).get("model") == values for name in preset_names())


def smaller_presets(model: str) -> list[str]:
    """Presets of the model's family that are smaller than it, the largest first."""
    name = _preset_of(model)
    if name is None:
        return []
    family, size = _family_and_size(name)
    same = [other for other in preset_names() if _family_and_size(other)[0] == family]
    return [other for other in reversed(same) if _family_and_size(other)[1] < size]


def _near(given: str) -> str:
    """The presets that begin so; else the nearest one whose family is written alike, for `gpt2` is no `opt-2.7b`."""
    name = given.lower()
    near = [preset for preset in preset_names() if preset.startswith(name)]
    if not near:
        alike = [preset for preset in preset_names() if likeness(_letters(name), _letters(preset)) > 0.75]
        near = difflib.get_close_matches(name, alike, n=1, cutoff=0.65)
    return did_you_mean(near, f"presets are {', '.join(preset_names())}.")


def _letters(name: str) -> str:
    """`opt-` of `opt-1.3b`."""
    return re.sub("[0-9].*", "", name)


def _preset_of(model: str) -> str | None:
    """The preset with this model or name; of a hub id, its last part is enough, with or without `-Instruct`."""
    lower = model.lower()
    last = lower.rpartition("/")[2].removesuffix("-instruct")
    is_preset = last in preset_names() and ("/" not in model or _read(last)["model"] != last)  # the hub has no `tiny`
    return _presets_by_model().get(lower, last if is_preset else None)


@cache
def _presets_by_model() -> dict[str, str]:
    """The model in lower case -> the preset's name."""
    return {_read(name)["model"].lower(): name for name in preset_names()}


@cache
def _read(name: str) -> dict[str, Any]:
    """One file with what it extends; callers copy before they change."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, where built in, is ten times as fast
    values = yaml.load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"), Loader=loader)
    below = values.pop("extends", None)
    return values if below is None else merge(_read(below), values)


def _family_and_size(name: str) -> tuple[str, float]:
    """`qwen2.5-0.5b` -> (`qwen2.5`, 0.5e9)."""
    match = re.fullmatch(r"(.+?)(-[\d.]+)?-([\d.]+)([mb])(-mono)?", name)
    if match is None:
        return name, 0.0
    family, _, number, unit, _ = match.groups()  # llama-3.1-8b and llama-3.2-1b are one family
    return family, float(number) * {"m": 1e6, "b": 1e9}[unit]
