"""Two roles that train in pipeline stages on the same ranks: turned against each other, and in one fused schedule.

What the schedule takes is its lower bound, which our search meets as a rule (docs/planner.md).
"""

from dataclasses import dataclass, replace

from training.calls import Call, role_of
from training.pipelines.orders import Pipelines, devices, mesh_against
from training.plan import Plan
from training.planner.footprint import Footprints
from training.planner.fusion.baselines import serial_1f1b
from training.planner.fusion.bound import Slack
from training.planner.fusion.instance import Instance, Pipeline
from training.planner.graph import DataflowGraph
from training.planner.reallocation import AugmentedGraphs


@dataclass(frozen=True)
class FusedTraining:
    """All optimiser steps of an iteration, in seconds; what is not in forward and backward passes is left out."""

    serial: float
    """One role after the other, each in the order 1F1B."""
    fused: float
    """At best."""


def turned(plan: Plan, graph: DataflowGraph) -> Plan:
    """The plan in which the second of two roles that train in stages on the same ranks runs against the first; its
    calls in the same cut turn with it. The plan itself where there are no two."""
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
    """None where the plan has no two roles that could train in one schedule, or no memory for both."""
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
        instance = Instance(a, b, memory_cap=_room(both, plan, graphs))
    except ValueError:  # CannotFuse too
        return None
    steps = workload.mini_batches * workload.epochs
    return FusedTraining(steps * serial_1f1b(instance).makespan, steps * Slack.of(instance).lower_bound())


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
    kept = Footprints(costs.workload, graphs.graph).kept
    micro_batches = costs.workload.micro_batches("train", assignment)
    activation = tuple(float(kept(call, assignment, layers)) for layers in runs)
    return Pipeline(assignment.layout.pipeline, micro_batches, forward, backward, activation)


def _room(calls: tuple[Call, Call], plan: Plan, graphs: AugmentedGraphs) -> float:
    """Bytes for the activations of both on the fullest rank."""
    names, cluster = [call.name for call in calls], graphs.costs.cluster
    used = [
        memory.held("device")
        + sum(part.bytes for part in memory.parts if part.phase in names and part.name != "activations")
        for memory in Footprints(graphs.costs.workload, graphs.graph).by_rank(plan).values()
    ]
    return cluster.usable_memory - max(used)
