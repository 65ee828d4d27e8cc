"""Seconds to bring one role's weights from the cut in which they are trained into another.

The moves are those of `training.hybrid_engine.transfers`, added up for many pairs of cuts at a time: a rank holds a run
of layers and a box of each kind of weight, all of them parts of [0, 1]. What a rank needs and does not hold comes from
a rank of its node that holds it, or over the network, once for each node. What the ranks of a node hold or need
together is taken as the smallest box around it: exact for the meshes of `options.py`, except under ZeRO 3 with
tensor-parallel parts over several nodes, where that box is too large.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from inference.tensor_parallel.shard import Cut as PartOfWeight
from inference.tensor_parallel.shard import even
from training.calls import Call, DataflowGraph, Edge, before
from training.hybrid_engine.layout import Layout
from training.hybrid_engine.transfers import Weight, parts
from training.plan import Assignment, Cut, Plan
from training.planner.cost import CallCost, CallCosts
from training.planner.hardware import ACHIEVED_BANDWIDTH, Cluster
from training.planner.workload import Model

Array = NDArray[np.float64]
SETUP_SECONDS = 0.03
"""Seconds to start the broadcasts and to allocate the copy (ReaLHF's estimator takes the same)."""
KINDS = 7
"""Kinds of weights: in the layers cut over outputs, cut over inputs, and whole in every tensor-parallel part; tables of
the vocabulary that the first pipeline stage has, the last one, and both; the final norm, which the last one has
whole."""


def bytes_by_kind(model: Model, value_bytes: int) -> Array:
    """Return (KINDS): what moves when the weights have changed. Adapters, where trained, are cut over outputs."""
    s = model.shape
    if model.lora.rank:
        return np.eye(KINDS)[0] * float(model.trained_parameters * value_bytes)
    attention = s.hidden * s.head_dim
    outputs = s.layers * (attention * (s.heads + 2 * s.kv_heads) + (2 if s.is_gated else 1) * s.hidden * s.ffn)
    inputs = s.layers * (attention * s.heads + s.hidden * s.ffn)
    head = s.output_matrix if model.has_vocabulary_head else 0
    tables = (0, 0, s.embedding) if model.has_vocabulary_head and not head else (s.embedding, head, 0)
    rest = max(0, model.parameters - outputs - inputs - sum(tables))
    final_norm = min(rest, s.hidden)
    kinds = np.array([outputs, inputs, rest - final_norm, *tables, final_norm], dtype=np.float64)
    return kinds * (model.parameters / kinds.sum() * value_bytes)


@dataclass(frozen=True)
class Holdings:
    """Says what ranks, or nodes, hold in a number of cuts."""

    bounds: Array
    """(6, cuts, KINDS, ranks): first and last layer, row and column, as shares; all 0 where nothing is held."""
    volumes: Array
    """(cuts, KINDS, ranks): of the boxes."""

    @classmethod
    def of(cls, bounds: Array) -> "Holdings":
        return cls(bounds, (bounds[1::2] - bounds[0::2]).prod(axis=0))

    def common(self, cuts: NDArray[np.int64], other: "Holdings", others: NDArray[np.int64]) -> Array:
        """Return (pairs, KINDS, ranks): the volumes that these cuts and cuts `others` of another have in common."""
        ours, theirs = self.bounds[:, cuts], other.bounds[:, others]
        widths = np.minimum(ours[1::2], theirs[1::2]) - np.maximum(ours[0::2], theirs[0::2])
        return np.maximum(widths, 0.0).prod(axis=0)


@dataclass(frozen=True)
class Shares:
    """Says what a cluster holds in a number of cuts of a model."""

    ranks: Holdings
    nodes: Holdings
    """The boxes around what the nodes' ranks hold."""
    sources: Array
    """(cuts): nodes that hold anything."""

    @classmethod
    def of(cls, cuts: list[Cut], cluster: Cluster, layers: int) -> "Shares":
        """Find what the ranks and nodes hold. `layers` are the model's."""
        bounds = np.zeros((6, len(cuts), KINDS, cluster.size))
        for index, (mesh, *degrees) in enumerate(cuts):
            bounds[:, index, :, list(mesh)] = boxes(layers, len(mesh), *degrees)
        ranks = Holdings.of(bounds)
        holds = (ranks.volumes > 0).reshape(len(cuts), KINDS, cluster.nodes, cluster.devices_per_node)
        by_node = bounds.reshape(6, *holds.shape)
        around = np.empty(by_node.shape[:-1])
        around[0::2] = np.where(holds, by_node[0::2], np.inf).min(axis=-1)
        around[1::2] = np.where(holds, by_node[1::2], -np.inf).max(axis=-1)
        nodes = Holdings.of(np.where(holds.any(axis=-1), around, 0.0))
        return cls(ranks, nodes, holds.any(axis=(1, 3)).sum(axis=1).astype(float))


@dataclass(frozen=True)
class Traffic:
    """Counts the bytes of a number of reallocations. Axes: pairs, then ranks or nodes."""

    written: Array
    """Bytes written into the new part of each rank."""
    received: Array
    """Bytes that each rank receives from others."""
    imported: Array
    """Bytes that each node receives from others."""

    @classmethod
    def between(
        cls, source: Shares, sources: NDArray[np.int64], target: Shares, targets: NDArray[np.int64], sizes: Array
    ) -> "Traffic":
        """Count those of cut `sources[i]` to cut `targets[i]`, which differ, for weights of `sizes` bytes (KINDS)."""
        written, wanted_by_nodes = target.ranks.volumes[targets], target.nodes.volumes[targets]
        received = written - source.ranks.common(sources, target.ranks, targets)
        imported = wanted_by_nodes - source.nodes.common(sources, target.nodes, targets)
        return cls(*(sizes @ volumes for volumes in (written, received, imported)))


def reallocation_seconds(
    source: Shares,
    sources: NDArray[np.int64],
    target: Shares,
    targets: NDArray[np.int64],
    sizes: Array,
    cluster: Cluster,
) -> Array:
    """Return the seconds (pairs) of cut `sources[i]` to cut `targets[i]`, which differ, for weights of `sizes` bytes
    (KINDS)."""
    traffic = Traffic.between(source, sources, target, targets, sizes)
    in_node = traffic.received.max(axis=1) / cluster.device.link_bandwidth
    imported = traffic.imported
    network = np.maximum(imported.max(axis=1), imported.sum(axis=1) / source.sources[sources])
    network /= cluster.network_bandwidth
    copied = 2 * traffic.written.max(axis=1) / cluster.device.memory_bandwidth
    return SETUP_SECONDS + (np.maximum(in_node, network) + copied) / ACHIEVED_BANDWIDTH


def seconds_between(source: Cut, target: Cut, sizes: Array, cluster: Cluster, layers: int) -> float:
    """Return the seconds of one reallocation of a model of so many layers; 0 only if cut and placement are equal."""
    if source == target:
        return 0.0
    first = np.zeros(1, dtype=np.int64)
    shares = Shares.of([source], cluster, layers), Shares.of([target], cluster, layers)
    return float(reallocation_seconds(shares[0], first, shares[1], first, sizes, cluster)[0])


@cache
def boxes(
    layers: int, ranks: int, data: int, tensor: int, pipeline: int, divided: bool, runs: tuple[int, ...]
) -> Array:
    """Return (ranks, 6, KINDS): what each rank of a mesh holds of a model, of weights with a row or column for each
    part."""
    layout = Layout(tuple(range(ranks)), data, tensor, pipeline, 3 if divided else 0, runs)
    held = np.zeros((ranks, 6, KINDS))
    outputs, whole = ((tensor * data,), 0), ((data,), None)
    for kind, (shape, dim) in enumerate((outputs, ((data, tensor), 1), whole, *[outputs] * 3, whole)):
        cut = [None if dim is None else PartOfWeight(dim, even(shape[dim], part, tensor)) for part in range(tensor)]
        weight = Weight("", shape, torch.uint8, True, {tensor: tuple(cut)}, {(pipeline, runs): tuple(range(pipeline))})
        rows, columns = (1, *shape)[-2:]
        for rank in range(ranks):
            ((box, *_),), stage = parts(weight, layout, rank), layout.stage_cut(rank, layers)
            outside = {3: stage.is_first, 4: stage.is_last, 5: stage.is_first or stage.is_last, 6: stage.is_last}
            if outside.get(kind, True):
                run = (0, 1) if kind in outside else (stage.run.start / layers, stage.run.stop / layers)
                held[rank, :, kind] = *run, box.top / rows, box.bottom / rows, box.left / columns, box.right / columns
    return held


NodeKind = Literal["call", "reallocation", "transfer", "offload"]
BYTES_PER_TOKEN = 8
"""Token ids, and log-probabilities, values and scores in fp32, a key."""
TRANSFER_SECONDS = 0.01
"""Seconds to tell the receivers what comes."""


@dataclass(frozen=True)
class After:
    """Says that a node waits for the end of `name`, of the same iteration or `iterations_back` before."""

    name: str
    iterations_back: int = 0


@dataclass(frozen=True)
class Node:
    """Describes one thing that takes time. While it runs it keeps `ranks` busy."""

    name: str
    kind: NodeKind
    call: Call
    """The call itself, or the one that it is for."""
    seconds: float
    ranks: frozenset[int]
    after: tuple[After, ...]
    cost: CallCost | None = None
    """What a call's seconds are spent on."""
    source: Layout | None = None
    """The layout that a reallocation or a transfer starts from."""


class AugmentedGraphs:
    def __init__(self, graph: DataflowGraph, costs: CallCosts):
        self.graph, self.costs = graph, costs

    @property
    def controller_seconds(self) -> float:
        """Seconds of an iteration in which no device works."""
        return len(self.graph.calls) * self.costs.calibration.controller_seconds

    def nodes(self, plan: Plan) -> tuple[Node, ...]:
        """Return the nodes in the order in which a rank runs them: that of the calls, each after what prepares it."""
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
        """Return 0 where every data rank of both calls has the same ranks and so the same samples."""
        return 0.0 if source.cut[:4] == target.cut[:4] else self.lag(edge)

    def lag(self, edge: Edge) -> float:
        """Return the seconds of a transfer between ranks, whichever they are."""
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
