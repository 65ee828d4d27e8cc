"""The settings of a run from what was given on the command line: preset, files, --set, options."""

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from applications.preset_store import settings_for_model
from inference.console import PrintableConsole
from inference.errors import UserError
from inference.streams import redacted, show_json
from training.config import RunConfig
from training.config_files import load_config, nested, setting_keys, with_absolute_paths
from training.config_reference import REQUIRED, defaults, description, fields, show, type_text, unit, values_of
from training.merging import KeyTwice, did_you_mean, near_keys, what_is_wrong
from training.opening import settings_of_new_run
from training.run_directory import RunDirectory


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
    is_new = model is not None or bool(config)
    if not (is_new or overrides or given):
        return None
    if is_new:
        base = settings_for_model(model) if model is not None else {}
        return settings_of_new_run(base, config or [], overrides or [], as_settings(given), run)
    if run is None or not run.config_file.exists():
        names = [f"--{key.removeprefix('trained_').replace('_', '-')}" for key in given]
        options = ", ".join(["--set"] * bool(overrides) + names)
        new = f"{run.path} would be a new run, so " if run is not None else ""
        raise UserError(f"{new}{options} needs --model or --config as well: say which model the run is for.")
    stored = run.read_config().model_dump(mode="json")
    return with_absolute_paths(load_config([], overrides or [], stored, as_settings(given)))


def settings_named(source: str, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The settings of a run directory, a YAML file, or a model as --model names it, with `overrides` (keys may be
    dotted) over them. Raises UserError.
    """
    try:
        given = nested(json.loads(json.dumps(overrides or {}, default=str)))  # paths as text, tuples as lists
    except KeyTwice as error:
        raise UserError(f"{what_is_wrong(error)}.") from None
    path = Path(source).expanduser()
    run = RunDirectory(path)
    if run.config_file.exists():
        values = run.read_config().model_dump(mode="json") | {"fork_of": ""}  # another run is no fork by that
        return with_absolute_paths(load_config([], [], values, given))
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
    """The flags that somebody has typed and that are settings: typer has None or [] for others."""
    return {key: value for key, value in flags.items() if value not in (None, []) and (key, value) != ("plan", AUTO)}


def as_settings(given: Mapping[str, object]) -> dict[str, object]:
    """The flags under the keys of their settings. Raises UserError for a fusion that does not exist."""
    fusion = given.get("fusion")
    if fusion is not None and fusion not in FUSIONS:
        raise UserError(f"--fusion {fusion}: choose one of {', '.join(FUSIONS)}.")
    sources = {"source": given.get("data"), "eval_source": given.get("eval_data")}
    data = {key: value for key, value in sources.items() if value is not None}
    of_step_3 = {"plan": given.get("plan"), "fusion": FUSIONS.get(str(fusion))}
    rlhf = {key: value for key, value in of_step_3.items() if value is not None}
    settings = {key: value for key, value in given.items() if key not in {*of_step_3, "data", "eval_data"}}
    return settings | ({"rlhf": rlhf} if rlhf else {}) | ({"data": data} if data else {})


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
    """The value as YAML takes it."""
    return redacted(show(value).replace("`", ""))
