"""`rlhf-chat settings`: what a setting means, its default, and its value for a model or in a run."""

import textwrap
from typing import Any

from rich.text import Text

from applications.settings import settings_named
from inference.console import PrintableConsole
from inference.errors import UserError
from inference.streams import redacted, show_json
from training.config_files import setting_keys
from training.config_reference import REQUIRED, defaults, description, fields, show, type_text, unit, values_of
from training.merging import did_you_mean, near_keys


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
