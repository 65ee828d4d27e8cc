"""Plans as YAML that a person can read and edit."""

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from inference.errors import UserError
from training.hybrid_engine.layout import Layout
from training.merging import load_yaml, what_is_wrong
from training.plan import Assignment, Plan

_COUNTS = ("data", "tensor", "pipeline", "zero_stage", "micro_batches")
_FROM_0 = ("zero_stage", "micro_batch_limit")
_KEYS = ("mesh", *_COUNTS, "layers", "micro_batch_limit", "offload")
assert {field.name for field in (*fields(Layout), *fields(Assignment))} == {*_KEYS, "layout"}


def to_yaml(plan: Plan) -> str:
    """One block a call; consecutive ranks are written `first-last`."""
    lines = []
    for name, values in to_blocks(plan).items():
        lines += [f"{name}:", *(f"  {key}: {'yes' if value is True else value}" for key, value in values.items())]
    return "".join(f"{line}\n" for line in lines)


def to_blocks(plan: Plan) -> dict[str, dict[str, Any]]:
    """What stands in the file: by call, by key."""
    blocks = {}
    for name, assignment in plan.assignments.items():
        values: dict[str, Any] = {"mesh": _mesh_value(assignment.layout.mesh)}
        values |= {key: _value(assignment, key) for key in _COUNTS}
        values |= {"layers": list(assignment.layout.layers)} if assignment.layout.layers else {}
        values |= {"micro_batch_limit": assignment.micro_batch_limit} if assignment.micro_batch_limit else {}
        values |= {"offload": True} if assignment.offload else {}
        blocks[name] = values
    return blocks


def from_yaml(text: str) -> Plan:
    """Raises UserError with one sentence about the first thing wrong."""
    try:
        return from_blocks(load_yaml(text))
    except yaml.YAMLError as error:
        raise UserError(f"The plan is not YAML ({what_is_wrong(error)}).") from error


def from_blocks(blocks: Any) -> Plan:
    """Raises UserError as `from_yaml` does."""
    if blocks in (None, {}):
        raise UserError("The plan is empty; it needs a block for every call.")
    if not isinstance(blocks, dict):
        raise UserError(f"The plan is {blocks!r}; name a file, or give a block for every call.")
    return Plan({str(name): _assignment(str(name), values) for name, values in blocks.items()})


def read_plan(file: Path) -> Plan:
    """Raises UserError where the file cannot be read or holds no plan."""
    try:
        text = Path(os.path.expanduser(file)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"The plan {file} cannot be read ({why}); name one that rlhf-chat plan --out wrote.") from error
    return from_yaml(text)


def mesh_text(mesh: tuple[int, ...]) -> str:
    """`0-3` for consecutive ranks, `[0, 2]` for others."""
    return str(_mesh_value(mesh))


def _mesh_value(mesh: tuple[int, ...]) -> int | str | list[int]:
    if mesh == tuple(range(mesh[0], mesh[0] + len(mesh))):
        return mesh[0] if len(mesh) == 1 else f"{mesh[0]}-{mesh[-1]}"
    return list(mesh)


def _value(assignment: Assignment, key: str) -> int:
    return getattr(assignment if key == "micro_batches" else assignment.layout, key)


def _assignment(name: str, values: Any) -> Assignment:
    if not isinstance(values, dict):
        raise UserError(f"The plan says nothing about '{name}'; give it a mesh and a layout.")
    for key in values:
        if key not in _KEYS:
            raise UserError(f"'{name}' has an unknown key '{key}'; the keys are {', '.join(_KEYS)}.")
    if "mesh" not in values:
        raise UserError(f"'{name}' has no mesh; give the ranks, for example mesh: 0-7.")
    counts = {key: values.get(key, 0 if key in _FROM_0 else 1) for key in (*_COUNTS, "micro_batch_limit")}
    for key, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"'{name}' has {key}: {value}, which is no whole number.")
    if not isinstance(offload := values.get("offload", False), bool):
        raise UserError(f"'{name}' has offload: {offload}; write yes or no.")
    layers = values.get("layers", [])
    if not isinstance(layers, list) or not all(type(count) is int for count in layers):
        raise UserError(f"'{name}' has layers: {layers}; give the number of layers of each stage, for example [6, 4].")
    micro_batches, limit = counts.pop("micro_batches"), counts.pop("micro_batch_limit")
    if limit < 0:
        raise UserError(f"'{name}' has micro_batch_limit: {limit}; give 1 or more, or leave it out.")
    try:
        mesh = _mesh(values["mesh"], counts["pipeline"])
        return Assignment(Layout(mesh, **counts, layers=tuple(layers)), micro_batches, offload, limit)
    except UserError as error:
        raise UserError(f"'{name}': {error}") from error


def _mesh(value: Any, stages: Any) -> tuple[int, ...]:
    """The ranks, those of each of so many stages in ascending order, as torch's groups are."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    if isinstance(value, list) and value and all(type(rank) is int for rank in value):
        size = -(-len(value) // max(1, stages))
        return tuple(rank for first in range(0, len(value), size) for rank in sorted(value[first : first + size]))
    found = re.fullmatch(r"\s*([0-9]{1,6})\s*-\s*([0-9]{1,6})\s*", str(value))
    if found and (ranks := range(int(found[1]), int(found[2]) + 1)):
        return tuple(ranks)
    raise UserError(f"The mesh {value} names no ranks; write 0-7, 3 or [0, 2], at most 6 digits each.")
