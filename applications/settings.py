"""The settings of a run from what was given on the command line: preset, files, --set, options."""

import copy
import difflib
import json
import re
import textwrap
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from rich.text import Text

from inference.errors import UserError
from inference.streams import PrintableConsole, redacted, show_json
from training.config import RunConfig
from training.config_files import found_from_anywhere, load_config, nested, setting_keys
from training.config_reference import REQUIRED, defaults, description, fields, show, type_text, unit, values_of
from training.merging import KeyTwice, did_you_mean, likeness, merge, near_keys, what_is_wrong
from training.opening import settings_of_new_run
from training.run_directory import RunDirectory

PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """The presets that a user can name, sorted by family and size."""
    names = [file.stem for file in PRESETS.glob("*.yaml") if not file.stem.startswith("_")]
    return sorted(names, key=_family_and_size)


def load_preset(name: str) -> dict[str, Any]:
    """A preset's values (keys of RunConfig), what it extends merged in. Raises UserError for an unknown name.

    `architecture.reward_model` is filled in from the preset whose model that is.
    """
    values = copy.deepcopy(_read(_preset_named(name)))  # `_read` keeps its own
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
    path = Path(model).expanduser()
    is_name = "/" not in model and not model.startswith((".", "~"))
    if not is_name and path.is_dir():
        return {"model": str(path.resolve())}  # `./tiny` is not `tiny`
    name = _preset_of(model)
    if is_name:
        if name is not None:
            return load_preset(name)
        if path.is_dir() or model.startswith("package:"):
            return {"model": model}
        raise UserError(_unknown_model(model))
    if model.count("/") != 1 or model.startswith((".", "~", "/")) or model.endswith("/"):
        raise UserError(f"There is no directory {model}; give a model directory, a hub id (owner/name) or a preset.")
    if name is None:
        return {"model": model}
    preset = load_preset(name)
    return preset if preset["model"].lower() == model.lower() else {**preset, "model": model}


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


def _unknown_model(model: str) -> str:
    return f"'{model}' is no preset and no directory (a hub id has the form owner/name): {_near(model)}"


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


def _preset_named(name: str) -> str:
    if name.lower() not in preset_names():
        raise UserError(f"There is no preset '{name}': {_near(name)}")
    return name.lower()


def _preset_of(model: str) -> str | None:
    """The preset with this model or name; of a hub id, its last part is enough, with or without `-Instruct`."""
    lower = model.lower()
    if lower in _presets_by_model():
        return _presets_by_model()[lower]
    last = lower.rpartition("/")[2].removesuffix("-instruct")
    if last not in preset_names() or ("/" in model and _read(last)["model"] == last):  # `tiny` is not on the hub
        return None
    return last


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
    found = re.fullmatch(r"(.+?)(-[\d.]+)?-([\d.]+)([mb])(-mono)?", name)
    if found is None:
        return name, 0.0
    family, _, number, unit, _ = found.groups()  # llama-3.1-8b and llama-3.2-1b are one family
    return family, float(number) * {"m": 1e6, "b": 1e9}[unit]


def resolve_settings(
    model: str | None,
    config: list[Path] | None,
    overrides: list[str] | None,
    flags: Mapping[str, object],
    run: RunDirectory | None = None,
) -> RunConfig | None:
    """Preset, then files, then --set, then flags; None when nothing was given, so that a run keeps its own.

    Without a model or a file, what is given is laid over the settings of `run`.
    """
    given = given_of(flags)
    if model is None and not config and not overrides and not given:
        return None
    if model is None and not config and run is not None and run.config_file.exists():
        stored = run.read_config().model_dump(mode="json")
        return found_from_anywhere(load_config([], overrides or [], stored, as_settings(given)))
    if model is None and not config:
        options = ", ".join(["--set"] * bool(overrides) + [option_of(key) for key in given])
        new = f"{run.path} would be a new run, so " if run is not None else ""
        raise UserError(f"{new}{options} needs --model or --config as well: say which model the run is for.")
    base = settings_for_model(model) if model is not None else {}
    return settings_of_new_run(base, config or [], overrides or [], as_settings(given), run)


def settings_named(source: str, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Those of a run directory, a YAML file, or a model as --model names it, with `overrides` (keys may be dotted) over
    them. Raises UserError.
    """
    try:
        given = nested(json.loads(json.dumps(overrides or {}, default=str)))  # paths as text, tuples as lists
    except KeyTwice as error:
        raise UserError(f"{what_is_wrong(error)}.") from None
    path = Path(source).expanduser()
    run = RunDirectory(path)
    if run.config_file.exists():
        values = run.read_config().model_dump(mode="json") | {"fork_of": ""}  # another run is no fork by that
        return found_from_anywhere(load_config([], [], values, given))
    if "/" in source and path.parent.is_dir() and not path.exists():  # else it would be owner/name on the hub
        raise UserError(f"There is neither a run nor a file {source}.")
    is_file = path.suffix in (".yaml", ".yml")
    preset = {} if is_file else settings_for_model(source)
    return settings_of_new_run(preset, [path] if is_file else [], [], given, None)


FUSIONS = {
    "none": {"mode": "none", "training": "1f1b"},
    "inter": {"mode": "inter"},
    "intra": {"training": "fused"},
    "both": {"mode": "inter", "training": "fused"},
    "auto": {"mode": "auto", "training": "auto"},
}
"""Values of --fusion: settings of `rlhf.fusion`."""


AUTO = "auto"
"""The value of --plan that is no file."""


def given_of(flags: Mapping[str, object]) -> dict[str, object]:
    """Those that somebody has typed and that are settings: typer has None or [] for others."""
    return {key: value for key, value in flags.items() if value not in (None, []) and (key, value) != ("plan", AUTO)}


def option_of(key: str) -> str:
    """The command's name for a setting."""
    return f"--{key.removeprefix('trained_').replace('_', '-')}"


def as_settings(given: Mapping[str, object]) -> dict[str, object]:
    """The flags where the settings are. Raises UserError for a fusion that there is not."""
    fusion = given.get("fusion")
    if fusion is not None and fusion not in FUSIONS:
        raise UserError(f"--fusion {fusion}: choose one of {', '.join(FUSIONS)}.")
    sources = {"source": given.get("data"), "eval_source": given.get("eval_data")}
    data = {key: data_sources(value) for key, value in sources.items() if value is not None}
    of_step_3 = {"plan": given.get("plan"), "fusion": FUSIONS.get(str(fusion))}
    rlhf = {key: value for key, value in of_step_3.items() if value is not None}
    settings = {key: value for key, value in given.items() if key not in {*of_step_3, "data", "eval_data"}}
    return settings | ({"rlhf": rlhf} if rlhf else {}) | ({"data": data} if data else {})


def data_sources(given: object) -> list[str]:
    """The values of --data, which may be given several times."""
    return [str(text) for text in given] if isinstance(given, list) else [str(given)]


def settings_command(keys: list[str], source: str | None, as_json: bool) -> None:
    """Print the settings that `keys` name, alone or as groups; all of them where there are none.

    Raises UserError for a key that does not exist, with the nearest.
    """
    for key in keys:
        if key not in setting_keys():
            hint = did_you_mean(near_keys(key, setting_keys()), "rlhf-chat settings lists all.")
            raise UserError(f"There is no setting '{key}': {hint}")
    values = defaults() if source is None else values_of(settings_named(source))
    told: list[dict[str, Any]] = [
        {
            "key": key,
            "value": None if values[key] == REQUIRED else values[key],
            "default": None if info.is_required() else defaults()[key],
            "type": type_text(info).replace("`", ""),
            "unit": unit(info),
            "meaning": description(info),
        }
        for key, info in fields()
        if not keys or any(f"{key}.".startswith(f"{asked}.") for asked in keys)
    ]
    if as_json:
        show_json(told)
        return
    console = PrintableConsole(highlight=False)
    for setting in told:
        console.print(line_of(setting, source))
        console.print(textwrap.indent(textwrap.fill(setting["meaning"], console.width - 4), "    "), markup=False)


def line_of(setting: dict[str, Any], source: str | None) -> Text:
    """`rlhf.iterations  3  (default 100; iterations; whole number, at least 1)`."""
    default = REQUIRED if setting["default"] is None else f"default {plain(setting['default'])}"
    value = default if source is None else REQUIRED if setting["value"] is None else plain(setting["value"])
    about = [default] * (source is not None) + [setting["unit"]] * bool(setting["unit"]) + [setting["type"]]
    return Text.assemble((setting["key"], "bold"), f"  {value}  ({'; '.join(about)})")


def plain(value: Any) -> str:
    """As YAML takes it."""
    return redacted(show(value).replace("`", ""))
