"""A plan: where every call runs, how its role's weights are cut there, and in how many micro-batches it works.

Settings are one way to write it (`Plan.of`), a search another, a YAML file the third (`read_plan`).
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from inference.errors import UserError
from training.calls import Call, DataflowGraph
from training.hybrid_engine.layout import Layout
from training.merging import load_yaml, what_is_wrong

if TYPE_CHECKING:
    from training.rlhf_settings import RLHFSettings

CPU_SLOTS = 32
Cut = tuple[tuple[int, ...], int, int, int, bool, tuple[int, ...]]


@dataclass(frozen=True)
class Assignment:
    """One call's share of a plan."""

    layout: Layout
    micro_batches: int = 1
    """Parts of a mini-batch (train) or of all samples (score, generate) on each data rank. Generation works on
    `pipeline` parts at a time."""
    offload: bool = False
    """Whether the weights of a frozen role wait in host memory and come to the device for the call."""
    micro_batch_limit: int = 0
    """If not 0, a micro-batch takes what fits: so many tokens, or samples of a call that generates. `micro_batches` is
    then what becomes of rows as long as they may be."""

    def together(self, rows: int) -> int:
        """Count the samples that a data rank takes at one time, of `rows` over all ranks."""
        return self.micro_batch_limit or math.ceil(rows / (self.layout.data * self.micro_batches))

    @cached_property
    def cut(self) -> Cut:
        """Equal where each rank holds the same part of the weights."""
        layout = self.layout
        return layout.mesh, layout.data, layout.tensor, layout.pipeline, layout.zero_stage == 3, layout.uneven_layers


@dataclass(frozen=True)
class Plan:
    """Assignments by call name, in the order of the graph's calls."""

    assignments: Mapping[str, Assignment]

    def __getitem__(self, call: str) -> Assignment:
        return self.assignments[call]

    def reallocates(self, graph: DataflowGraph, call: Call) -> bool:
        """Whether `call` uses trained weights in another cut than their training has."""
        training = graph.training_call(call.role)
        return training is not None and self[call.name].cut != self[training.name].cut

    def moves_weights(self, graph: DataflowGraph, call: Call) -> bool:
        """Whether `call` brings trained weights into its cut, which no earlier call of the iteration has done."""
        before = graph.calls[: graph.calls.index(call)]
        alike = (other.role == call.role and self[other.name].cut == self[call.name].cut for other in before)
        return self.reallocates(graph, call) and not any(alike)

    def actor_is_reference(self, may_be: bool) -> bool:
        """Whether the reference, which `may_be` the actor with its adapters switched off, is that: it scores in the cut
        in which the actor is trained, and has no weights of its own that wait in host memory."""
        reference, training = (self.assignments.get(call) for call in ("reference_score", "actor_train"))
        if not may_be or reference is None or training is None:
            return False
        return reference.cut == training.cut and not reference.offload

    @classmethod
    def of(cls, settings: "RLHFSettings", ranks: int, length: int, calls: Sequence[Call] = ()) -> "Plan":
        """Return what step 3 runs: the plan in the settings; without one every call on all ranks, data-parallel under
        the ZeRO stage of its role, generation and scoring tensor-parallel in the degrees of the settings.

        `length` is that of the longest rows in tokens; `calls` are by default those of the settings, or all of their
        plan. Raises UserError where a degree does not divide the ranks.
        """
        if settings.plan:
            planned, names = from_blocks(settings.plan).assignments, [call.name for call in calls]
            return cls({name: one for name, one in planned.items() if not calls or name in names})
        samples = settings.prompts_per_iteration * settings.samples_per_prompt
        tokens, degrees = settings.micro_batch_tokens, settings.scoring_tensor_parallel
        assignments = {}
        for call in calls or settings.calls:
            is_actor = call.role == "reference" and settings.reference_is_actor
            of_role = getattr(settings, "actor" if is_actor else call.role)
            stage, waits = of_role.zero_stage, of_role.offload == "parameters"  # only frozen roles have it
            if call.kind == "train":
                rows, layout = -(-samples // settings.mini_batches), Layout.over(ranks, zero_stage=stage)
            elif call.kind == "generate":
                layout = Layout.over(ranks, settings.generation_tensor_parallel)
                assignments[call.name] = Assignment(layout, micro_batch_limit=slots(settings))
                continue
            else:
                rows, tensor = samples, getattr(degrees, call.role, 1)
                setting = f"rlhf.scoring_tensor_parallel.{call.role}"
                layout = Layout.over(ranks, tensor, stage if stage == 3 and tensor == 1 else 0, setting)
            count = packed(rows, layout, length, tokens)
            assignments[call.name] = Assignment(layout, count, waits, micro_batch_limit=tokens)
        return cls(assignments)

    @classmethod
    def of_rows(
        cls, calls: Sequence[Call], ranks: int, rows: int, length: int, zero_stage: int, micro_batch_tokens: int
    ) -> "Plan":
        """Plan a step that learns from rows: every call on all ranks, `rows` of `length` tokens at a time."""
        assignments = {}
        for call in calls:
            layout = Layout.over(ranks, zero_stage=zero_stage if call.kind == "train" or zero_stage == 3 else 0)
            count = packed(rows, layout, length, micro_batch_tokens)
            assignments[call.name] = Assignment(layout, count, micro_batch_limit=micro_batch_tokens)
        return cls(assignments)


def slots(settings: "RLHFSettings") -> int:
    """Count the samples that a rank decodes together by the settings; where they are auto, and no GPU's memory has said
    how many (`training.memory.with_slots`), as many as on a CPU."""
    return CPU_SLOTS if settings.generation_batch == "auto" else settings.generation_batch


def most_generated(settings: "RLHFSettings") -> int:
    """Count the samples of the largest generation: of an iteration, an evaluation, or the fixed prompts."""
    evaluated = settings.eval_prompts if settings.eval_every else 0
    return max(settings.prompts_per_iteration * settings.samples_per_prompt, settings.sample_prompts, evaluated)


def packed(rows: int, layout: Layout, length: int, micro_batch_tokens: int) -> int:
    """Count the micro-batches of a data rank when all `rows` have `length` tokens."""
    return math.ceil(math.ceil(rows / layout.data) / max(1, micro_batch_tokens // length))


_COUNTS = ("data", "tensor", "pipeline", "zero_stage", "micro_batches")
_FROM_0 = ("zero_stage", "micro_batch_limit")
_KEYS = ("mesh", *_COUNTS, "layers", "micro_batch_limit", "offload")
assert {field.name for field in (*fields(Layout), *fields(Assignment))} == {*_KEYS, "layout"}


def to_yaml(plan: Plan) -> str:
    """Write one block a call; consecutive ranks are written `first-last`."""
    lines = []
    for name, values in to_blocks(plan).items():
        lines += [f"{name}:", *(f"  {key}: {'yes' if value is True else value}" for key, value in values.items())]
    return "".join(f"{line}\n" for line in lines)


def to_blocks(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return what stands in the file, by call and key."""
    blocks = {}
    for name, assignment in plan.assignments.items():
        layout = assignment.layout
        values: dict[str, Any] = {"mesh": _mesh_value(layout.mesh)}
        values |= {key: getattr(layout, key) for key in _COUNTS if key != "micro_batches"}
        values |= {"micro_batches": assignment.micro_batches}
        values |= {"layers": list(layout.layers)} if layout.layers else {}
        values |= {"micro_batch_limit": assignment.micro_batch_limit} if assignment.micro_batch_limit else {}
        values |= {"offload": True} if assignment.offload else {}
        blocks[name] = values
    return blocks


def from_yaml(text: str) -> Plan:
    """Read a plan. Raises UserError with one sentence about the first thing wrong."""
    try:
        return from_blocks(load_yaml(text))
    except yaml.YAMLError as error:
        raise UserError(f"The plan is not YAML ({what_is_wrong(error)}).") from error


def from_blocks(blocks: Any) -> Plan:
    """Read a plan from its blocks. Raises UserError as `from_yaml` does."""
    if blocks in (None, {}):
        raise UserError("The plan is empty; it needs a block for every call.")
    if not isinstance(blocks, dict):
        raise UserError(f"The plan is {blocks!r}; name a file, or give a block for every call.")
    return Plan({str(name): _assignment(str(name), values) for name, values in blocks.items()})


def read_plan(file: Path) -> Plan:
    """Read a plan's file. Raises UserError where it cannot be read or holds no plan."""
    try:
        text = Path(os.path.expanduser(file)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"The plan {file} cannot be read ({why}); name one that rlhf-chat plan --out wrote.") from error
    return from_yaml(text)


def mesh_text(mesh: tuple[int, ...]) -> str:
    """Write consecutive ranks as `0-3`, others as `[0, 2]`."""
    return str(_mesh_value(mesh))


def _mesh_value(mesh: tuple[int, ...]) -> int | str | list[int]:
    if mesh == tuple(range(mesh[0], mesh[0] + len(mesh))):
        return mesh[0] if len(mesh) == 1 else f"{mesh[0]}-{mesh[-1]}"
    return list(mesh)


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
    """Read the ranks; those of a stage stand in ascending order, as torch's groups do."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    if isinstance(value, list) and value and all(type(rank) is int for rank in value):
        size = -(-len(value) // max(1, stages))
        return tuple(rank for first in range(0, len(value), size) for rank in sorted(value[first : first + size]))
    ends = re.fullmatch(r"\s*([0-9]{1,6})\s*-\s*([0-9]{1,6})\s*", str(value))
    if ends and (ranks := range(int(ends[1]), int(ends[2]) + 1)):
        return tuple(ranks)
    raise UserError(f"The mesh {value} names no ranks; write 0-7, 3 or [0, 2], at most 6 digits each.")
