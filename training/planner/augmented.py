"""The augmented graph: the calls of a plan, and between them what the plan costs on top of them.

Reallocation: the weights that a call will use are brought into its cut, and the copy dropped after it.
Data transfer: what one call made goes to the ranks where another needs it. It keeps no device busy.
Offload: the weights of a frozen role come from host memory before its call, and are dropped after it.
"""

from dataclasses import dataclass
from typing import Literal

from training.calls import Call
from training.hybrid_engine.layout import Layout
from training.plan import Assignment, Plan
from training.planner.cost import CallCost, CallCosts
from training.planner.graph import DataflowGraph, Edge, before
from training.planner.hardware import ACHIEVED_BANDWIDTH
from training.planner.reallocation import bytes_by_kind, seconds_between

NodeKind = Literal["call", "reallocation", "transfer", "offload"]
BYTES_PER_TOKEN = 8
"""Token ids, and log-probabilities, values and scores in fp32, a key."""
TRANSFER_SECONDS = 0.01
"""To tell the receivers what comes."""


@dataclass(frozen=True)
class After:
    """A node waits for the end of `name`, of the same iteration or `iterations_back` before."""

    name: str
    iterations_back: int = 0


@dataclass(frozen=True)
class Node:
    """One thing that takes time. While it runs it keeps `ranks` busy."""

    name: str
    kind: NodeKind
    call: Call
    """The call itself, or the one that it is for."""
    seconds: float
    ranks: frozenset[int]
    after: tuple[After, ...]
    cost: CallCost | None = None
    """Of a call: what its seconds are spent on."""
    source: Layout | None = None
    """Of a reallocation or a transfer: from where."""


class AugmentedGraphs:
    """Of the plans for one dataflow graph."""

    def __init__(self, graph: DataflowGraph, costs: CallCosts):
        self.graph, self.costs = graph, costs

    @property
    def controller_seconds(self) -> float:
        """Of an iteration, in which no device works."""
        return len(self.graph.calls) * self.costs.calibration.controller_seconds

    def nodes(self, plan: Plan) -> tuple[Node, ...]:
        """In the order in which a rank runs them: that of the calls, each behind what prepares it."""
        nodes: list[Node] = []
        for call in self.graph.calls:
            nodes += self._nodes_of(call, plan)
        return tuple(nodes)

    def _nodes_of(self, call: Call, plan: Plan) -> list[Node]:
        assignment = plan[call.name]
        ranks = frozenset(assignment.layout.mesh)
        nodes: list[Node] = []
        waits: list[After] = []
        for edge in before(self.graph.data_edges, call.name):
            source = plan[edge.producer]
            seconds = self.transfer_seconds(edge, source, assignment)
            if seconds == 0:
                waits.append(After(edge.producer))
                continue
            name = f"{edge.producer} -> {call.name}"
            after = (After(edge.producer),)
            nodes.append(Node(name, "transfer", call, seconds, frozenset(), after, source=source.layout))
            waits.append(After(name))
        versions = tuple(After(e.producer, e.iterations_back) for e in before(self.graph.version_edges, call.name))
        training = self.graph.training_call(call.role)
        if training is not None and plan.moves_weights(self.graph, call):
            source = plan[training.name]
            name, both = f"reallocate for {call.name}", ranks | frozenset(source.layout.mesh)
            seconds = self.reallocation_seconds(call, source, assignment)
            nodes.append(Node(name, "reallocation", call, seconds, both, versions, source=source.layout))
            waits.append(After(name))
        elif assignment.offload:
            name = f"load for {call.name}"
            loading = (*waits, *versions)
            nodes.append(Node(name, "offload", call, self.offload_seconds(call, assignment), ranks, loading))
            waits = [After(name)]
        else:
            waits += versions
        cost = self.costs.cost(call, assignment)
        return [*nodes, Node(call.name, "call", call, cost.seconds, ranks, tuple(waits), cost)]

    def transfer_seconds(self, edge: Edge, source: Assignment, target: Assignment) -> float:
        """0 where every data rank of both calls has the same ranks and so the same samples."""
        return 0.0 if source.cut[:4] == target.cut[:4] else self.lag(edge)

    def lag(self, edge: Edge) -> float:
        """Seconds of a transfer between ranks, whichever they are."""
        workload, cluster = self.costs.workload, self.costs.cluster
        size = workload.samples * workload.length * BYTES_PER_TOKEN * len(edge.keys)
        return TRANSFER_SECONDS + size / (cluster.network_bandwidth * ACHIEVED_BANDWIDTH)

    def reallocation_seconds(self, call: Call, source: Assignment, target: Assignment) -> float:
        workload = self.costs.workload
        model = workload.models[call.role]
        sizes = bytes_by_kind(model, workload.value_bytes)
        return seconds_between(source.cut, target.cut, sizes, self.costs.cluster, model.shape.layers)

    def offload_seconds(self, call: Call, assignment: Assignment) -> float:
        workload, layout = self.costs.workload, assignment.layout
        ranks = layout.tensor * (layout.data if layout.zero_stage == 3 else 1)
        size = workload.models[call.role].largest_stage(layout).parameters * workload.value_bytes / ranks
        return size / (self.costs.cluster.device.host_bandwidth * ACHIEVED_BANDWIDTH)
