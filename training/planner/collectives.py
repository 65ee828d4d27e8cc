"""Seconds that the ranks of a layout spend talking: tensor-parallel, data-parallel, and from stage to stage.

Ring algorithms; where a group reaches over nodes, the groups that leave one node share its network.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import log2

from training.hybrid_engine.layout import Layout
from training.planner.hardware import ACHIEVED_BANDWIDTH, Cluster


@dataclass(frozen=True)
class Group:
    """Like groups of ranks that talk at the same time."""

    size: int
    bandwidth: float
    """Bytes a second that each rank sends."""
    latency: float
    """Seconds before the first byte; grows with log2 of the ranks."""
    decode_latency: float
    """The same in a decode step."""

    def all_reduce(self, size: float) -> float:
        """Seconds to sum `size` bytes that every rank has."""
        return self.latency + 2 * (self.size - 1) / self.size * size / self.bandwidth if self.size > 1 else 0.0

    def all_gather(self, size: float, share: float = 1.0) -> float:
        """Seconds until every rank has `size` bytes of which each had a part, at a share of the bandwidth; those of a
        reduce-scatter too."""
        sent = (self.size - 1) / self.size * size
        return self.latency + sent / (self.bandwidth * share) if self.size > 1 else 0.0

    def send(self, size: float) -> float:
        """Seconds to send `size` bytes to one neighbour."""
        return self.latency + size / self.bandwidth if self.size > 1 else 0.0


@dataclass(frozen=True)
class Links:
    """The groups of a layout."""

    tensor: Group
    data: Group
    hop: Group
    """Ranks of neighbouring pipeline stages, in pairs; of size 1 where there is one stage."""


def links_of(layout: Layout, cluster: Cluster) -> Links:
    """ZeRO has no part in it."""
    stage = layout.tensor * layout.data
    hops = list(zip(layout.mesh, layout.mesh[stage:], strict=False))
    return Links(
        _group(layout.tensor_groups, layout.tensor, cluster),
        _group(layout.data_groups, layout.data, cluster),
        _group(hops, min(layout.pipeline, 2), cluster, one_way=True),
    )


def _group(groups: Iterable[tuple[int, ...]], size: int, cluster: Cluster, one_way: bool = False) -> Group:
    leaving: Counter[int] = Counter()
    for group in groups:
        nodes = {cluster.node_of(rank) for rank in group}
        if len(nodes) > 1:
            leaving.update([cluster.node_of(group[0])] if one_way else nodes)
    bandwidth = cluster.device.link_bandwidth
    if leaving:
        bandwidth = min(bandwidth, cluster.network_bandwidth / max(leaving.values()))
    calibration = cluster.calibration
    latencies = (seconds * log2(size) for seconds in (calibration.collective_seconds, calibration.decode_collective))
    return Group(size, bandwidth * ACHIEVED_BANDWIDTH, *latencies)
