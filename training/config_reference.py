"""docs/configuration.md, made from the settings themselves, so that it cannot say anything else.

python -m training.config_reference > docs/configuration.md
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from training.config import TRAINED_ROLES, RunConfig
from training.config_files import setting_keys
from training.formulas.table import Table
from training.formulas.tables import TABLES
from training.reward_specs import NAMED_REWARDS
from training.role_settings import Unit

HEAD = """\
# Configuration reference

Made by `python -m training.config_reference` from `training/config.py`; do not edit it by hand.

A setting is a dotted key. It can be given on the command line (`--set rlhf.kl.coefficient=0.1`) or in a YAML file
(`--config mine.yaml`), where the dots may become nesting:

```yaml
rlhf:
  kl:
    coefficient: 0.1
```

Later wins: the defaults below, the preset that `--model` names, the files in their order, `--set` in its order, and
last the options of the command itself (`--data`, `--reward-model`, `--seed`, `--processes`). A key that does not exist
is an error that names the nearest one; so is a key that is twice in one file, for one of the two would be lost. Paths
are kept absolute, as they are found from where the command is given. A file may begin with `extends: other`, which
reads `other.yaml` beside it first. The resolved settings of a run are in its `config.yaml`, with the versions of what
ran. `rlhf-chat settings KEY --model NAME` shows what stands here, with the values for a model or in a run.

`optimizer.KEY` is for every role that is trained: `--set optimizer.zero_stage=2` gives it to all five. What the same
file, or the same command line, says of one role (`rlhf.critic.zero_stage`) holds for that one.

The defaults below are those without a preset; the presets are in `applications/presets/`. Each holds whatever else of
its group is set, and wherever: `--set rlhf.actor.zero_stage=1` leaves the actor's learning rate at its own default.
"""

FORMULAS = """
## Formulas

The entries that a setting may name, with what each says of itself. [estimators.md](estimators.md) says how to write
one of your own.
"""

NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false"}
BOUNDS = {
    annotated_types.Ge: ("ge", "at least {}"),
    annotated_types.Gt: ("gt", "over {}"),
    annotated_types.Le: ("le", "at most {}"),
    annotated_types.Lt: ("lt", "under {}"),
}
REQUIRED, BY_ROLE = "required", "by role"


@dataclass
class Group:
    """A settings class and everywhere it is used."""

    model: type[BaseModel]
    prefixes: list[str] = field(default_factory=list)  # dotted prefixes of its settings; "" is the top


def reference() -> str:
    """Write the whole page."""
    return HEAD + "".join([*map(section, groups()), FORMULAS, *map(entries, TABLES), rewards_by_name()])


def groups() -> list[Group]:
    """List every settings class once, in the order in which RunConfig reaches them."""
    of_models: dict[type[BaseModel], Group] = {}

    def visit(model: type[BaseModel], prefix: str) -> None:
        of_models.setdefault(model, Group(model)).prefixes.append(prefix)
        for name, info in model.model_fields.items():
            inner = group_model(info)
            if inner is not None:
                visit(inner, f"{prefix}.{name}".lstrip("."))

    visit(RunConfig, "")
    return list(of_models.values())


@cache
def defaults() -> dict[str, Any]:
    """Dotted key of every setting -> its value in a run of which only the model is given."""
    return values_of(RunConfig(model=REQUIRED))


def values_of(config: RunConfig) -> dict[str, Any]:
    """Dotted key of every setting -> its value; groups are left out, and `optimizer` has what all its roles have."""
    values = {key: attrgetter(key)(config) for key in setting_keys()}
    values = {key: value for key, value in values.items() if not isinstance(value, BaseModel)}
    for key in [key for key in values if key.startswith("optimizer.")]:
        of_roles = [values[f"{role}.{key.removeprefix('optimizer.')}"] for role in TRAINED_ROLES]
        values[key] = of_roles[0] if all(value == of_roles[0] for value in of_roles) else BY_ROLE
    return values


def fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield dotted key and field of every setting, in the order of the page."""
    yield from ((prefix + name, info) for name, info in settings_of(model))
    for name, info in model.model_fields.items():
        if (inner := group_model(info)) is not None:
            yield from fields(inner, f"{prefix}{name}.")


def settings_of(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield names and fields of a class that are settings, not groups of settings."""
    for name, info in model.model_fields.items():
        if group_model(info) is None:
            yield name, info


def group_model(info: FieldInfo) -> type[BaseModel] | None:
    """Return the class of a group of settings; None for a setting."""
    kind = info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def section(group: Group) -> str:
    """Write heading, prefixes and table of one class."""
    first, *others = group.prefixes
    title = "Top level" if group.prefixes == [""] else ", ".join(f"`{prefix}`" for prefix in group.prefixes)
    lines = ["", f"## {title}", ""]
    if others:
        lines += [f"The same settings in {len(group.prefixes)} places; write `{first}.KEY` and so on.", ""]
    lines += ["| key | type | default | unit | meaning |", "|---|---|---|---|---|"]
    prefix = f"{first}." if first and not others else ""
    for name, info in settings_of(group.model):
        cells = [f"`{prefix}{name}`", type_text(info), default_text(group, name, info), unit(info), description(info)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def entries(table: Table) -> str:
    """Write heading and table of the formulas that a setting may name."""
    facts = list(next(iter(table.entries.values())).facts)
    lines = ["", f"### Entries of `{table.setting}`", "", f"| entry | formula | {' | '.join(facts)} |"]
    lines.append("|---" * (len(facts) + 2) + "|")
    for name, entry in table.entries.items():
        cells = [f"`{name}`", " ".join((entry.formula.__doc__ or "").split()), *map(show, entry.facts.values())]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def rewards_by_name() -> str:
    """Write heading and table of what `rlhf.reward_function` may name beside functions in files."""
    lines = ["", "### Rewards by name (`rlhf.reward_function`)", "", "| name | reward |", "|---|---|"]
    for name, reward in NAMED_REWARDS.items():
        lines.append(f"| `{name}` | {' '.join((reward.__doc__ or '').split())} |")
    return "\n".join(lines) + "\n"


def unit(info: FieldInfo) -> str:
    """Name the unit, as `tokens`; empty where a setting counts and measures nothing."""
    return next((value.name for value in info.metadata if isinstance(value, Unit)), "")


def description(info: FieldInfo) -> str:
    return re.sub(r"\s+", " ", info.description or "").strip()


def type_text(info: FieldInfo) -> str:
    """Describe the values, as `whole number, at least 1`."""
    validators = [value.func for value in info.metadata if isinstance(value, AfterValidator)]
    tables = [table for check in validators if isinstance(table := getattr(check, "__self__", None), Table)]
    kinds = [f"one of {', '.join(map(show, table.entries))}, or `path/to/file.py:name`" for table in tables]
    return ", ".join([*(kinds or [annotation_text(info.annotation)]), *bounds(info.metadata)])


def bounds(metadata: Iterable[Any]) -> list[str]:
    """Describe the bounds, as `at least 1`."""
    known = [(BOUNDS[type(bound)], bound) for bound in metadata if type(bound) in BOUNDS]
    return [words.format(getattr(bound, attribute)) for (attribute, words), bound in known]


def annotation_text(annotation: Any) -> str:
    if annotation in NAMES:
        return NAMES[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return ", ".join([annotation_text(arguments[0]), *bounds(arguments[1:])])
    if origin is Literal and len(arguments) == 1:
        return show(arguments[0])
    if origin is Literal:
        return "one of " + ", ".join(show(value) for value in arguments)
    if origin is tuple:
        return f"{len(arguments)} {annotation_text(arguments[0])}s"
    if origin is list:
        return f"list of {annotation_text(arguments[0])}s"
    if origin is dict:
        return "mapping"
    return " or ".join(annotation_text(argument) for argument in arguments)  # a union


def default_text(group: Group, name: str, info: FieldInfo) -> str:
    """Write the default; where groups differ, the commonest first and then the others with their own."""
    if info.is_required():
        return REQUIRED
    values = {prefix: defaults()[f"{prefix}.{name}".lstrip(".")] for prefix in group.prefixes}
    usual = max(values.values(), key=list(values.values()).count)
    others = [f"`{prefix}`: {show(value)}" for prefix, value in values.items() if value != usual]
    return "; ".join([show(usual), *others])


def show(value: Any) -> str:
    """Write a value as YAML takes it."""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value == "":
        return "empty"
    if isinstance(value, float):
        return f"`{value:g}`"
    if isinstance(value, tuple):
        return "`[" + ", ".join(f"{part:g}" for part in value) + "]`"
    return f"`{value}`"


if __name__ == "__main__":
    print(reference(), end="")
