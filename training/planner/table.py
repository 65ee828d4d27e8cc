"""Many plans at a time: the options of all calls as arrays, and the recurrence of `list_schedule` over whole columns.

A plan is a column of option numbers, one for each call. Times are those that `list_schedule` gives, memory
is that of `footprint.Footprints`; tests hold them together.

An option number of UNDECIDED stands for the best that any option could give: a plan with such calls is evaluated to no
more than any plan that it can become.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.plan import Plan
from training.planner.options import EVERYTHING, Option, Options, Space, meshes
from training.planner.reallocation_cost import AugmentedGraphs, Node, Shares, bytes_by_kind, reallocation_seconds
from training.planner.workload import Workload

ITERATIONS = 5
"""Unrolled; enough that calls of neighbouring iterations overlap as they would in a long run."""


@dataclass(frozen=True)
class Interval:
    node: Node
    iteration: int
    start: float
    end: float


@dataclass(frozen=True)
class IterationSchedule:
    intervals: tuple[Interval, ...]
    iterations: int

    @property
    def makespan(self) -> float:
        return max(interval.end for interval in self.intervals)

    @property
    def iteration_seconds(self) -> float:
        """Mean over the unrolled iterations."""
        return self.makespan / self.iterations


def list_schedule(nodes: Sequence[Node], iterations: int = ITERATIONS) -> IterationSchedule:
    """Schedule `nodes` in order, iteration after iteration (the recurrence of ReaLHF, arXiv 2406.14088).

    The order is that of the graph, the same on all ranks, so ranks that share several calls never wait in a circle.
    """
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
    return IterationSchedule(tuple(intervals), iterations)


Array = NDArray[np.float64]
Choices = NDArray[np.int64]
"""(calls, plans): option numbers."""
UNDECIDED = -1
"""As an index it is the last row of a column, which comes after those of the options."""


class Numbers(dict[Hashable, int]):
    """Numbers things in the order in which they come."""

    def __missing__(self, key: Hashable) -> int:
        self[key] = len(self)
        return self[key]


@dataclass(frozen=True)
class Column:
    """Holds the options of one call, sorted by mesh; arrays are (options + 1) where nothing else is said."""

    options: list[Option]
    seconds: Array
    memory: Array
    """(4, options + 1): held and working, then both of weights of its own, as shares of the memory that can be used."""
    mesh: NDArray[np.int64]
    """Number of the option's mesh; the number of meshes for UNDECIDED."""
    layout: NDArray[np.int64]
    """Number of mesh and degrees: between equal ones no data move."""
    cut: NDArray[np.int64]
    """Number of the cut among those of this call."""
    cuts: list
    bounds: NDArray[np.int64]
    """(meshes + 1): where the options of each mesh begin."""


@dataclass(frozen=True)
class WeightUse:
    """Says which call uses trained weights, and what the reallocation before it moves. Calls are their indices in the
    graph."""

    call: int
    training: int
    sizes: Array
    """Bytes by kind of weight."""
    source: Shares
    target: Shares
    known: Array
    """(cuts of the training + 1, cuts of the call + 1): seconds, NaN where not yet computed."""
    earlier: tuple[tuple[int, NDArray[np.bool_]], ...]
    """Calls before it that may have brought the weights, and where their cuts differ from its own: (cuts of the earlier
    one + 1, cuts of the call + 1)."""


class PlanTable:
    def __init__(self, graphs: AugmentedGraphs, space: Space = EVERYTHING):
        self.graph = graph = graphs.graph
        self.cluster, workload = graphs.costs.cluster, graphs.costs.workload
        self.controller_seconds = graphs.controller_seconds
        options = Options(graphs, space)
        all_meshes = list(meshes(self.cluster, space))
        mesh_numbers = {mesh: number for number, mesh in enumerate(all_meshes)}
        layout_numbers = Numbers()
        self.columns = []
        for call in graph.calls:
            self.columns.append(_column(options.of(call), mesh_numbers, layout_numbers, self.cluster.usable_memory))
        self.has_rank = np.zeros((len(all_meshes) + 1, self.cluster.size))
        """(meshes + 1, ranks): 1 where the mesh has the rank."""
        for mesh, number in mesh_numbers.items():
            self.has_rank[number, list(mesh)] = 1.0
        self.overlaps = (self.has_rank @ self.has_rank.T > 0).astype(float)
        position = {call.name: index for index, call in enumerate(graph.calls)}
        self.data_edges = [(position[e.producer], position[e.consumer], graphs.lag(e)) for e in graph.data_edges]
        self.version_edges = [(position[e.producer], position[e.consumer]) for e in graph.version_edges]
        self.borrowers = [
            (index, position[lender.name], self._apart(index, position[lender.name]))
            for index, call in enumerate(graph.calls)
            if (lender := options.footprints.lender(call)) is not None and lender != call
        ]
        """Calls that may use weights that are trained, the training of these, and where the cuts of both differ."""
        self.uses = []
        for index, call in enumerate(graph.calls):
            training = graph.training_call(call.role)
            if training is not None and training != call:
                self.uses.append(self._use(index, position[training.name], workload))

    @property
    def space(self) -> int:
        """The number of plans, whether they fit or not."""
        result = 1
        for column in self.columns:
            result *= len(column.options)
        return result

    def plan(self, choice: NDArray[np.int64]) -> Plan:
        picked = zip(self.graph.calls, self.columns, choice, strict=True)
        return Plan({call.name: column.options[number].assignment for call, column, number in picked})

    def evaluate(self, choices: Choices) -> tuple[Array, Array]:
        """Return the seconds of an iteration, and the share of its usable memory that the fullest rank needs: (plans)
        each."""
        cut = np.stack([column.cut[choices[i]] for i, column in enumerate(self.columns)])
        moves = [self._moves(use, cut) for use in self.uses]
        return self._seconds(choices, moves), self._fullness(choices, cut)

    def _seconds(self, choices: Choices, moves: list[Array]) -> Array:
        seconds = [column.seconds[choices[i]] for i, column in enumerate(self.columns)]
        lags, shares = self._lags(choices), self._shared_ranks(choices)
        ends = np.zeros((len(shares), choices.shape[1]))  # of the calls, then of the reallocations
        for _ in range(ITERATIONS):
            before = ends.copy()
            for call in range(len(self.columns)):
                ready = (ends * shares[call]).max(axis=0)
                version = np.max([before[p] for p, c in self.version_edges if c == call], axis=0, initial=0.0)
                for number, use in enumerate(self.uses):
                    if use.call == call:
                        own = len(self.columns) + number
                        start = np.maximum((ends * shares[own]).max(axis=0), version)
                        ends[own] = start + moves[number]
                        ready = np.maximum(ready, ends[own])
                ready = np.maximum(ready, version)
                for (producer, consumer, _), lag in zip(self.data_edges, lags, strict=True):
                    if consumer == call:
                        ready = np.maximum(ready, ends[producer] + lag)
                ends[call] = ready + seconds[call]
        return ends.max(axis=0) / ITERATIONS + self.controller_seconds

    def _shared_ranks(self, choices: Choices) -> list[Array]:
        """Return, for each call, then each reallocation, 1 where it keeps ranks busy that the others do: (things,
        plans) each.

        A reallocation is on the mesh of its call and on that of the training.
        """
        mesh = np.stack([column.mesh[choices[i]] for i, column in enumerate(self.columns)])
        among_calls = self.overlaps[mesh[:, None], mesh[None, :]]
        moving = [np.maximum(among_calls[use.call], among_calls[use.training]) for use in self.uses]
        things = np.concatenate([among_calls, np.stack(moving)]) if moving else among_calls
        columns = [things, *(np.maximum(things[:, [u.call]], things[:, [u.training]]) for u in self.uses)]
        return list(np.concatenate(columns, axis=1))

    def _lags(self, choices: Choices) -> list[Array]:
        """Return the seconds of the transfer along each data edge: (plans) each."""
        layout = [column.layout[choices[i]] for i, column in enumerate(self.columns)]
        lags = []
        for producer, consumer, lag in self.data_edges:
            a, b = layout[producer], layout[consumer]
            lags.append(lag * ((a != b) & (a != UNDECIDED) & (b != UNDECIDED)))
        return lags

    def _fullness(self, choices: Choices, cut: NDArray[np.int64]) -> Array:
        held, most = 0.0, 0.0
        own = {call: apart[cut[training], cut[call]] for call, training, apart in self.borrowers}
        for i, column in enumerate(self.columns):
            has_rank = self.has_rank[column.mesh[choices[i]]]  # (plans, ranks)
            memory = column.memory[:, choices[i]]
            needed = memory[:2] + memory[2:] * own.get(i, 0.0)
            held = held + needed[0][:, None] * has_rank
            most = np.maximum(most, needed[1][:, None] * has_rank)
        return np.max(held + most, axis=1)

    def _moves(self, use: WeightUse, cut: NDArray[np.int64]) -> Array:
        """Return the seconds of the reallocation before a call: (plans)."""
        source, target = cut[use.training], cut[use.call]
        seconds = use.known[source, target]
        if np.isnan(seconds).any():
            sources, targets = np.unique(np.stack([source, target])[:, np.isnan(seconds)], axis=1)
            use.known[sources, targets] = reallocation_seconds(
                use.source, sources, use.target, targets, use.sizes, self.cluster
            )
            seconds = use.known[source, target]
        for call, apart in use.earlier:
            seconds = seconds * apart[cut[call], target]
        return seconds

    def _use(self, call: int, training: int, workload: Workload) -> WeightUse:
        role = self.graph.calls[call].role
        model = workload.models[role]
        source, target = (Shares.of(self.columns[i].cuts, self.cluster, model.shape.layers) for i in (training, call))
        known = np.where(self._apart(call, training), np.nan, 0.0)
        uses = [i for i, user in enumerate(self.graph.calls) if user.role == role]
        earlier = tuple((i, self._apart(call, i)) for i in uses if i < call)
        return WeightUse(call, training, bytes_by_kind(model, workload.value_bytes), source, target, known, earlier)

    def _apart(self, call: int, other: int) -> NDArray[np.bool_]:
        """Return (cuts of the other + 1, cuts of the call + 1): whether they are decided and differ."""
        source, target = self.columns[other].cuts, self.columns[call].cuts
        apart = np.ones((len(source) + 1, len(target) + 1), dtype=bool)
        apart[UNDECIDED], apart[:, UNDECIDED] = False, False
        numbers = {cut: number for number, cut in enumerate(target)}
        for number, cut in enumerate(source):
            if cut in numbers:
                apart[number, numbers[cut]] = False
        return apart


def _column(
    options: list[Option], mesh_numbers: dict[tuple[int, ...], int], layout_numbers: Numbers, usable: float
) -> Column:
    cut_numbers = Numbers()
    assignments = [option.assignment for option in options]
    mesh = np.array([mesh_numbers[assignment.layout.mesh] for assignment in assignments])
    seconds = [option.seconds for option in options]
    memory = [(option.held, option.working, option.own_held, option.own_working) for option in options]
    return Column(
        options,
        np.array([*seconds, min(seconds)]),
        np.array([*memory, (0, 0, 0, 0)]).T / usable,
        np.append(mesh, len(mesh_numbers)),
        np.array([*(layout_numbers[assignment.cut[:4]] for assignment in assignments), UNDECIDED]),
        np.array([*(cut_numbers[assignment.cut] for assignment in assignments), UNDECIDED]),
        list(cut_numbers),
        np.searchsorted(mesh, np.arange(len(mesh_numbers) + 1)),
    )
