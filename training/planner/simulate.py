"""Seconds of an iteration: list scheduling over meshes with the published recurrence (ReaLHF, arXiv 2406.14088).

Some iterations are unrolled; each node of the augmented graph starts as soon as what it waits for has ended and the
last earlier node on any overlapping mesh has. The order is that of the graph: the same on all ranks, so that ranks
which share several calls can never wait for each other in a circle.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from training.planner.reallocation import Node

ITERATIONS = 5
"""Unrolled; enough that calls of neighbouring iterations overlap as they would in a long run."""


@dataclass(frozen=True)
class Interval:
    node: Node
    iteration: int
    start: float
    end: float


@dataclass(frozen=True)
class Schedule:
    intervals: tuple[Interval, ...]
    iterations: int

    @property
    def makespan(self) -> float:
        return max(interval.end for interval in self.intervals)

    @property
    def iteration_seconds(self) -> float:
        """Mean over the unrolled iterations."""
        return self.makespan / self.iterations

    def busy_seconds(self) -> dict[int, float]:
        busy: dict[int, float] = {}
        for interval in self.intervals:
            for rank in interval.node.ranks:
                busy[rank] = busy.get(rank, 0.0) + interval.node.seconds
        return busy


def list_schedule(nodes: Sequence[Node], iterations: int = ITERATIONS) -> Schedule:
    """`nodes` in order, iteration after iteration."""
    overlapping = {node.name: [other.name for other in nodes if node.ranks & other.ranks] for node in nodes}
    ends: dict[tuple[str, int], float] = {}
    last_end = dict.fromkeys(overlapping, 0.0)
    intervals = []
    for iteration in range(iterations):
        for node in nodes:
            ready = max((ends.get((a.name, iteration - a.iterations_back), 0.0) for a in node.after), default=0.0)
            free = max((last_end[name] for name in overlapping[node.name]), default=0.0)
            start = max(ready, free)
            end = start + node.seconds
            ends[node.name, iteration] = last_end[node.name] = end
            intervals.append(Interval(node, iteration, start, end))
    return Schedule(tuple(intervals), iterations)
