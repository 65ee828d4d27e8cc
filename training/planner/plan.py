"""A plan: where every call runs, how its role's weights are cut there, and in how many micro-batches it works."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from inference.errors import UserError
from training.calls import Call
from training.hybrid_engine.layout import Layout
from training.planner.graph import DataflowGraph
from training.planner.hardware import Cluster
from training.planner.workload import Workload

Cut = tuple[tuple[int, ...], int, int, int, bool]


@dataclass(frozen=True)
class Assignment:
    """One call's share of a plan."""

    layout: Layout
    micro_batches: int = 1
    """Parts of a mini-batch (train) or of all samples (score, generate) on each data rank. Generation works on
    `pipeline` parts at a time."""
    offload: bool = False
    """The weights of a frozen role wait in host memory and come to the device for the call."""

    @cached_property
    def cut(self) -> Cut:
        """Equal where each rank holds the same part of the weights."""
        layout = self.layout
        return layout.mesh, layout.data, layout.tensor, layout.pipeline, layout.zero_stage == 3


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


def problems(plan: Plan, graph: DataflowGraph, workload: Workload, cluster: Cluster) -> list[str]:
    """What keeps `plan` from running, a sentence each; memory apart. Empty for a valid plan."""
    names = [call.name for call in graph.calls]
    found = [f"The plan has no line for the call '{name}'; add one." for name in names if name not in plan.assignments]
    for name in plan.assignments:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the calls are {', '.join(names)}."
            found.append(f"There is no call '{name}': {hint}")
    for call in graph.calls:
        if call.name in plan.assignments:
            is_frozen = graph.training_call(call.role) is None
            found += _problems_of(call, plan[call.name], is_frozen, workload, cluster)
    return found


def require_valid(plan: Plan, graph: DataflowGraph, workload: Workload, cluster: Cluster) -> None:
    """Raises UserError with the first problem."""
    if found := problems(plan, graph, workload, cluster):
        raise UserError(found[0])


def _problems_of(
    call: Call, assignment: Assignment, is_frozen: bool, workload: Workload, cluster: Cluster
) -> list[str]:
    layout, name = assignment.layout, call.name
    shape = workload.models[call.role].shape
    found = []
    if max(layout.mesh) >= cluster.size or min(layout.mesh) < 0:
        found.append(f"{name} uses rank {max(layout.mesh)}, but the cluster has ranks 0 to {cluster.size - 1}.")
    if shape.heads % layout.tensor:
        found.append(
            f"{name} cuts {shape.heads} attention heads into {layout.tensor} parts; choose a divisor for tensor."
        )
    if layout.pipeline > shape.layers:
        found.append(f"{name} cuts {shape.layers} layers into {layout.pipeline} pipeline stages; choose fewer.")
    if assignment.micro_batches < 1:
        found.append(f"{name} has {assignment.micro_batches} micro-batches; give 1 or more.")
    rows, parts = workload.rows(call.kind), layout.data * assignment.micro_batches
    if rows < parts:
        found.append(
            f"{name} divides {rows} samples by data {layout.data} x micro_batches {assignment.micro_batches}, "
            f"which leaves ranks without work; lower one of the two."
        )
    if layout.zero_stage >= 2 and layout.pipeline > 1:
        found.append(
            f"{name} joins ZeRO stage {layout.zero_stage} with a pipeline; use ZeRO stage 0 or 1, or pipeline 1."
        )
    if call.kind != "train" and layout.zero_stage in (1, 2):
        found.append(f"{name} has no optimiser states to divide; set its zero_stage to 0 (or 3 to divide the weights).")
    if assignment.offload and not is_frozen:
        found.append(f"{name} offloads weights that are trained; only frozen roles can wait in host memory.")
    return found
