"""Options of the search for each call: meshes, layouts, micro-batches, ZeRO stages, offload.

Meshes are aligned power-of-two slices of one node, or consecutive whole nodes. An option that is no better than
another in seconds and in memory, while meshes and cuts are the same, is left out: the makespan grows with every call's
seconds, so no best plan is lost.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf

from inference.errors import UserError
from training.calls import Call, DataflowGraph, role_of
from training.hybrid_engine.layout import Layout
from training.pipelines.orders import Pipelines, devices, mesh_against
from training.plan import Assignment, Plan
from training.planner.footprint import Footprints
from training.planner.hardware import Cluster
from training.planner.reallocation_cost import AugmentedGraphs
from training.planner.schedules.problem import Pipeline, SchedulingProblem, Slack
from training.planner.schedules.schedule import serial_1f1b

MOST_MICRO_BATCHES = 64
"""Those of one data rank, in training and scoring."""
MOST_WAVES = 8
"""Waves of samples in generation."""


@dataclass(frozen=True)
class Space:
    """Limits what the search may choose. The defaults leave it all that can be costed."""

    smallest_mesh: int = 1
    """Ranks."""
    free_micro_batches: bool = True
    """If not: one a pipeline stage, two in training where there are stages."""
    free_zero_stage: bool = True
    """If not: 1 in training, which divides optimiser states."""
    most_ranks_of_a_stage: int | None = None
    """Limit for a pipeline stage of a call that trains."""
    runs: Callable[[Call, Assignment], bool] | None = None
    """Whether a runtime can run a call so; by default all that can be costed is searched."""


EVERYTHING = Space()


@dataclass(frozen=True)
class Option:
    """Gives one choice for a call with its costs: seconds, and bytes on each rank of its mesh."""

    assignment: Assignment
    seconds: float
    """Seconds of the call, with loading offloaded weights right before it."""
    held: int
    """Bytes held all through the iteration."""
    working: int
    """Bytes held while the call runs."""
    own_held: int
    """Bytes held all through it too, where the call cannot use weights that are trained: those of the reference."""
    own_working: int
    """Bytes held while the call runs too, where it cannot use them: a copy of them."""

    @property
    def alone(self) -> int:
        """Bytes of the option where no weights are shared."""
        return self.held + self.own_held + self.working + self.own_working


class Options:
    def __init__(self, graphs: AugmentedGraphs, space: Space = EVERYTHING):
        self.graphs, self.space = graphs, space
        self.graph, self.costs = graphs.graph, graphs.costs
        self.workload, self.cluster = self.costs.workload, self.costs.cluster
        self.footprints = Footprints(self.workload, self.graph)

    def of(self, call: Call) -> list[Option]:
        """Return all that fit into a device by themselves, if need be with weights that are trained, mesh by mesh.
        Raises UserError if none does."""
        by_shape: dict[int, list[Option]] = {}
        result = []
        for mesh in meshes(self.cluster, self.space):
            if len(mesh) not in by_shape:  # meshes of equal size differ in their ranks only
                by_shape[len(mesh)] = self._on(call, mesh)
            moved = (_moved(option, mesh) for option in by_shape[len(mesh)])
            result += [option for option in moved if self._runs(call, option.assignment)]
        if not result:
            raise UserError(
                f"No cut of '{call.name}' fits into {self.cluster.size} x {self.cluster.device.name} with "
                f"{self.workload.rows(call.kind)} samples at a time; take more or larger devices."
            )
        return result

    def _on(self, call: Call, mesh: tuple[int, ...]) -> list[Option]:
        best: dict[tuple[int, ...], list[Option]] = {}
        for assignment in self.candidates(call, mesh):
            if not self._runs(call, assignment):
                continue
            option = self._priced(call, assignment)
            if option.held + option.working > self.cluster.usable_memory:
                continue
            layout = assignment.layout
            same = (layout.data, layout.tensor, layout.pipeline, layout.zero_stage == 3)
            best[same] = _without_dominated([*best.get(same, []), option])
        return [option for options in best.values() for option in options]

    def candidates(self, call: Call, mesh: tuple[int, ...]) -> Iterator[Assignment]:
        """Yield all that `plan_checks.problems` allows, with samples divided evenly and tensor ranks in one node."""
        shape, rows = self.workload.models[call.role].shape, self.workload.rows(call.kind)
        for tensor in _divisors(min(len(mesh), self.cluster.devices_per_node)):
            if len(mesh) % tensor or shape.heads % tensor:
                continue
            for pipeline in _divisors(len(mesh) // tensor):
                data = len(mesh) // tensor // pipeline
                is_too_wide = call.kind == "train" and data * tensor > (self.space.most_ranks_of_a_stage or inf)
                if pipeline > shape.layers or rows % data or is_too_wide:
                    continue
                for zero_stage in self._zero_stages(call, data, pipeline):
                    layout = Layout(mesh, data, tensor, pipeline, zero_stage)
                    for micro_batches, limit in self._micro_batches(call, rows // data, pipeline):
                        yield Assignment(layout, micro_batches, micro_batch_limit=limit)
                        if self.graph.training_call(call.role) is None and self.cluster.device.has_own_memory:
                            yield Assignment(layout, micro_batches, offload=True)

    def _runs(self, call: Call, assignment: Assignment) -> bool:
        return self.space.runs is None or self.space.runs(call, assignment)

    def _zero_stages(self, call: Call, data: int, pipeline: int) -> tuple[int, ...]:
        is_free = self.space.free_zero_stage
        if data == 1 or call.kind == "generate" or self.footprints.lender(call) is None:
            return (0,)
        if call.kind == "score":  # 3: in the cut in which it is trained
            return (0, 3) if is_free and pipeline == 1 else (0,)
        if not is_free:
            return (1,)
        return (0, 1, 2, 3) if pipeline == 1 else (0, 1)

    def _micro_batches(self, call: Call, rows: int, pipeline: int) -> list[tuple[int, int]]:
        """Return numbers of them, and limits: without a pipeline, generation fills slots as samples end."""
        one_a_stage = [2 * pipeline if call.kind == "train" and pipeline > 1 else pipeline]
        if not self.space.free_micro_batches:
            counts = one_a_stage
        elif call.kind == "generate" and pipeline == 1:
            most = min(rows, self.workload.generation_batch or rows)
            slots = sorted({-(-most // waves) for waves in _powers_of_two(MOST_WAVES)})
            return [(-(-rows // limit), limit) for limit in slots]
        elif call.kind == "generate":
            counts = [pipeline * waves for waves in _powers_of_two(MOST_WAVES)]
        else:
            counts = [*_powers_of_two(MOST_MICRO_BATCHES), pipeline, 2 * pipeline]
        return [(count, 0) for count in sorted({count for count in counts if rows % count == 0})]

    def _priced(self, call: Call, assignment: Assignment) -> Option:
        loading = self.graphs.offload_seconds(call, assignment) if assignment.offload else 0.0
        seconds = self.costs.cost(call, assignment).seconds + loading
        held, working = self._bytes(call, assignment, own_weights=True)
        borrows = self.footprints.lender(call) is not None and not assignment.offload
        least, least_working = self._bytes(call, assignment, own_weights=not borrows)
        return Option(assignment, seconds, least, least_working, held - least, working - least_working)

    def _bytes(self, call: Call, assignment: Assignment, own_weights: bool) -> tuple[int, int]:
        """Return the bytes on a device: all through the iteration, and while the call runs."""
        parts = self.footprints.parts(call, assignment, own_weights)
        on_device = [part for part in parts if part.location == "device"]
        held = sum(part.bytes for part in on_device if not part.phase)
        return held, sum(part.bytes for part in on_device) - held


def meshes(cluster: Cluster, space: Space) -> Iterator[tuple[int, ...]]:
    """Yield aligned power-of-two slices of each node, whole nodes, and runs of whole nodes."""
    per_node = cluster.devices_per_node
    for size in _powers_of_two(per_node - 1):
        if size >= space.smallest_mesh and per_node % size == 0:
            for first in range(0, cluster.size, size):
                yield tuple(range(first, first + size))
    for count in range(1, cluster.nodes + 1):
        for first in range(cluster.nodes - count + 1):
            yield tuple(range(first * per_node, (first + count) * per_node))


def _without_dominated(options: list[Option]) -> list[Option]:
    """Return the numbers of options with one cut that no other beats or equals in seconds and in memory."""
    best: list[Option] = []
    for option in sorted(options, key=_price):
        if not any(all(a <= b for a, b in zip(_price(other), _price(option), strict=True)) for other in best):
            best.append(option)
    return best


def _price(option: Option) -> tuple[float, int, int]:
    return option.seconds, option.held + option.own_held, option.alone


def _moved(option: Option, mesh: tuple[int, ...]) -> Option:
    layout = replace(option.assignment.layout, mesh=mesh)
    return replace(option, assignment=replace(option.assignment, layout=layout))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _powers_of_two(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


@dataclass(frozen=True)
class FusedTraining:
    """Gives the seconds of an iteration's optimiser steps, of which only forward and backward passes count."""

    serial: float
    """One role after the other, each in the order 1F1B."""
    fused: float
    """Seconds of the best fused schedule."""


def turned(plan: Plan, graph: DataflowGraph) -> Plan:
    """Return the plan in which the second of two roles that train in stages on the same ranks runs against the first;
    its calls in the same cut turn with it. The plan itself where there are no two."""
    if (both := _together(plan, graph)) is None:
        return plan
    first, second = both
    cut, stages = plan[second.name].cut, plan[second.name].layout.pipeline
    mesh = tuple(mesh_against(Pipelines.of(plan[first.name].layout, 1), stages))
    turns = {
        name: replace(assignment, layout=replace(assignment.layout, mesh=mesh))
        for name, assignment in plan.assignments.items()
        if assignment.cut == cut and role_of(name) == second.role
    }
    return Plan({**plan.assignments, **turns})


def fused_training(plan: Plan, graphs: AugmentedGraphs) -> FusedTraining | None:
    """Return None where the plan has no two roles that could train in one schedule, or no memory for both."""
    if (both := _together(plan, graphs.graph)) is None:
        return None
    workload = graphs.costs.workload
    roles = {
        call.role: Pipelines.of(plan[call.name].layout, workload.micro_batches("train", plan[call.name]))
        for call in both
    }
    try:
        devices(roles)
        a, b = (_pipeline(call, plan, graphs) for call in both)
        problem = SchedulingProblem(a, b, memory_cap=_room(both, plan, graphs))
    except ValueError:  # CannotFuse too
        return None
    steps = workload.mini_batches * workload.epochs
    return FusedTraining(steps * serial_1f1b(problem).makespan, steps * Slack.of(problem).lower_bound())


def _together(plan: Plan, graph: DataflowGraph) -> tuple[Call, Call] | None:
    training = [call for call in graph.calls if call.kind == "train"]
    layouts = [plan[call.name].layout for call in training]
    staged = all(layout.pipeline > 1 and layout.tensor == 1 for layout in layouts)
    if len(training) != 2 or not staged or set(layouts[0].mesh) != set(layouts[1].mesh):
        return None
    return training[0], training[1]


def _pipeline(call: Call, plan: Plan, graphs: AugmentedGraphs) -> Pipeline:
    assignment, costs = plan[call.name], graphs.costs
    forward, backward = zip(*costs.micro_batch_by_stage(call, assignment), strict=True)
    runs = assignment.layout.runs(costs.workload.models[call.role].shape.layers)
    footprints = Footprints(costs.workload, graphs.graph)
    micro_batches = costs.workload.micro_batches("train", assignment)
    activations = tuple(float(footprints.saved_activations(call, assignment, layers)) for layers in runs)
    return Pipeline(assignment.layout.pipeline, micro_batches, forward, backward, activations)


def _room(calls: tuple[Call, Call], plan: Plan, graphs: AugmentedGraphs) -> float:
    """Return the bytes for the activations of both roles on the fullest rank."""
    names, cluster = [call.name for call in calls], graphs.costs.cluster
    used = [
        memory.held("device")
        + sum(part.bytes for part in memory.parts if part.phase in names and part.name != "activations")
        for memory in Footprints(graphs.costs.workload, graphs.graph).by_rank(plan).values()
    ]
    return cluster.usable_memory - max(used)
