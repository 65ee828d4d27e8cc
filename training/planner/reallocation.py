"""Seconds to bring one role's weights from the cut in which they are trained into another.

A rank holds a run of layers and a slice of each layer; both are parts of [0, 1]. What a rank needs and does not hold
comes from a rank of its node that holds it, or over the network, once for each node. What the ranks of a node hold
or need together is taken as the smallest rectangle around it, which is exact for the meshes of `options.py`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.plan import Cut
from training.planner.hardware import ACHIEVED_BANDWIDTH, Cluster

Array = NDArray[np.float64]
SETUP_SECONDS = 0.03
"""To start the broadcasts and to allocate the copy (ReaLHF's estimator takes the same)."""


@dataclass(frozen=True)
class Shares:
    """What the ranks of a cluster hold in a number of cuts. Axes: cuts, then ranks or nodes, then bounds."""

    ranks: Array
    """(cuts, ranks, 4): first and last layer, first and last slice, as shares; 0 width where the rank holds nothing."""
    nodes: Array
    """(cuts, nodes, 4): the rectangle around what the node's ranks hold."""
    sources: Array
    """(cuts): nodes that hold anything."""

    @classmethod
    def of(cls, cuts: list[Cut], cluster: Cluster) -> "Shares":
        ranks = np.stack([_rectangles(cut, cluster.size) for cut in cuts])
        by_node = ranks.reshape(len(cuts), cluster.nodes, cluster.devices_per_node, 4)
        holds = np.expand_dims(_area(by_node), -1) > 0
        low = np.where(holds, by_node[..., 0::2], np.inf).min(axis=2)
        high = np.where(holds, by_node[..., 1::2], -np.inf).max(axis=2)
        any_held = holds.sum(axis=(2, 3)) > 0
        nodes = np.stack([low[..., 0], high[..., 0], low[..., 1], high[..., 1]], axis=-1)
        return cls(ranks, np.where(any_held[..., None], nodes, 0.0), any_held.sum(axis=1).astype(float))


def reallocation_seconds(
    source: Shares,
    sources: NDArray[np.int64],
    target: Shares,
    targets: NDArray[np.int64],
    size: float,
    cluster: Cluster,
) -> Array:
    """Of cut `sources[i]` to cut `targets[i]`, for weights of `size` bytes; the cuts of a pair differ. (pairs)"""
    held, wanted = source.ranks[sources], target.ranks[targets]
    written = _area(wanted)
    received = written - _area(_overlap(held, wanted))
    wanted_in_node = target.nodes[targets]
    imported = _area(wanted_in_node) - _area(_overlap(source.nodes[sources], wanted_in_node))
    in_node = received.max(axis=1) * size / cluster.device.link_bandwidth
    network = np.maximum(imported.max(axis=1), imported.sum(axis=1) / source.sources[sources])
    network *= size / cluster.network_bandwidth
    copied = 2 * written.max(axis=1) * size / cluster.device.memory_bandwidth
    return SETUP_SECONDS + (np.maximum(in_node, network) + copied) / ACHIEVED_BANDWIDTH


def seconds_between(source: Cut, target: Cut, size: float, cluster: Cluster) -> float:
    """Of one reallocation; 0 only if cut and placement are equal."""
    if source == target:
        return 0.0
    first = np.zeros(1, dtype=np.int64)
    shares = Shares.of([source], cluster), Shares.of([target], cluster)
    return float(reallocation_seconds(shares[0], first, shares[1], first, size, cluster)[0])


def _rectangles(cut: Cut, size: int) -> Array:
    """(ranks, 4). Under ZeRO 3 a data rank holds its part of the tensor-parallel slice."""
    mesh, data, tensor, pipeline, divided = cut
    place = np.arange(len(mesh))
    stage, slice_ = place // (tensor * data), (place % tensor).astype(float)
    parts = float(tensor)
    if divided:
        slice_ = slice_ * data + place // tensor % data
        parts *= data
    result = np.zeros((size, 4))
    bounds = (stage / pipeline, (stage + 1) / pipeline, slice_ / parts, (slice_ + 1) / parts)
    result[list(mesh)] = np.stack(bounds, axis=1)
    return result


def _area(rectangle: Array) -> Array:
    return (rectangle[..., 1] - rectangle[..., 0]) * (rectangle[..., 3] - rectangle[..., 2])


def _overlap(a: Array, b: Array) -> Array:
    low, high = np.maximum(a[..., 0::2], b[..., 0::2]), np.minimum(a[..., 1::2], b[..., 1::2])
    high = np.maximum(low, high)
    return np.stack([low[..., 0], high[..., 0], low[..., 1], high[..., 1]], axis=-1)
