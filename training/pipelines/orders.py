"""Orders in which ranks compute the micro-batches of their pipelines: as data, and none that could wait forever.

    roles = {"actor": Pipelines.of(actor, 8), "critic": Pipelines.of(critic, 8)}
    orders = fused(roles, find_schedule(problem).schedule)     # or serial(roles), one_forward_one_backward(roles)
    makespan(timeline(orders, seconds))                         # what it would take

Micro-batches go first in, first out on every stage, so that every order adds gradients up in the same sequence.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from typing import NamedTuple

from training.hybrid_engine.layout import Layout
from training.planner.schedules.problem import BACKWARD, FORWARD, KINDS
from training.planner.schedules.schedule import ImpossibleSchedule, Schedule


class Operation(NamedTuple):
    """Names a pass of a role's micro-batch through one stage."""

    role: str
    kind: int
    """FORWARD or BACKWARD."""
    micro_batch: int

    def __str__(self) -> str:
        return f"{KINDS[self.kind]} {self.micro_batch} of {self.role}"


class Event(NamedTuple):
    """Says when a rank computed an operation."""

    rank: int
    operation: Operation
    start: float
    end: float
    """Seconds."""


class CannotFuse(ValueError):
    """Two roles do not lie on the ranks as a fused schedule needs it; the message says why, in a phrase."""


@dataclass(frozen=True)
class Pipelines:
    """Says which ranks compute which stages of one role."""

    ranks: tuple[tuple[int, ...], ...]
    """The ranks of each pipeline, in the order of the stages."""
    micro_batches: int
    """The micro-batches of each pipeline."""
    kinds: tuple[int, ...] = (FORWARD, BACKWARD)

    @classmethod
    def of(cls, layout: Layout, micro_batches: int, kinds: tuple[int, ...] = (FORWARD, BACKWARD)) -> "Pipelines":
        """Give every data rank a pipeline."""
        return cls(layout.pipeline_groups, micro_batches, kinds)

    @property
    def stages(self) -> int:
        return len(self.ranks[0])

    @cached_property
    def positions(self) -> dict[int, tuple[int, int]]:
        """The pipeline and the stage of each rank."""
        return {rank: (line, stage) for line, ranks in enumerate(self.ranks) for stage, rank in enumerate(ranks)}

    def stage(self, rank: int) -> int:
        return self.positions[rank][1]

    def source(self, rank: int, kind: int) -> int | None:
        """Return the rank that sends what an operation of this kind begins with; None where nothing is received."""
        return self._neighbour(rank, -1 if kind == FORWARD else 1)

    def target(self, rank: int, kind: int) -> int | None:
        """Return the rank that gets what an operation of this kind ends with; None where nothing is sent."""
        return self._neighbour(rank, 1 if kind == FORWARD else -1)

    def _neighbour(self, rank: int, distance: int) -> int | None:
        line, stage = self.positions[rank]
        return self.ranks[line][stage + distance] if 0 <= stage + distance < self.stages else None


@dataclass(frozen=True)
class Orders:
    """Lists what every rank computes, one operation after the other.

    Making one raises ImpossibleSchedule where an operation is missing, stands where it cannot, or ranks would wait for
    each other in a circle.
    """

    roles: Mapping[str, Pipelines]
    by_rank: Mapping[int, Sequence[Operation]]

    def __post_init__(self) -> None:
        for rank, order in self.by_rank.items():
            self._require_all(rank, order)
        missing = {rank for pipelines in self.roles.values() for rank in pipelines.positions} - set(self.by_rank)
        if missing:
            raise ImpossibleSchedule(f"rank {min(missing)} has no order")
        timeline(self, lambda rank, operation: 1.0)

    def _require_all(self, rank: int, order: Sequence[Operation]) -> None:
        """Require that the micro-batches of every role on the rank come once, and first in, first out."""
        numbers: dict[tuple[str, int], list[int]] = {
            (role, kind): []
            for role, pipelines in self.roles.items()
            if rank in pipelines.positions
            for kind in pipelines.kinds
        }
        for operation in order:
            if operation[:2] not in numbers:
                raise ImpossibleSchedule(f"rank {rank} has no {KINDS[operation.kind]} of {operation.role} to do")
            numbers[operation[:2]].append(operation.micro_batch)
        for (role, kind), micro_batches in numbers.items():
            if micro_batches != list(range(self.roles[role].micro_batches)):
                raise ImpossibleSchedule(
                    f"rank {rank} does the {KINDS[kind]}s {micro_batches} of {role}, and not its "
                    f"{self.roles[role].micro_batches} from 0 on, one after the other"
                )

    def needed(self, rank: int, operation: Operation) -> tuple[int, Operation] | None:
        """Return the operation, and its rank, that must have ended before this one can begin."""
        pipelines = self.roles[operation.role]
        source = pipelines.source(rank, operation.kind)
        if source is not None:
            return source, operation
        return None if operation.kind == FORWARD else (rank, operation._replace(kind=FORWARD))


def timeline(orders: Orders, seconds: Callable[[int, Operation], float]) -> list[Event]:
    """Run every operation as early as possible, by start; it takes `seconds(rank, operation)`, messages take none.

    Raises ImpossibleSchedule where ranks wait for each other in a circle.
    """
    events: dict[tuple[int, Operation], Event] = {}
    done, free = dict.fromkeys(orders.by_rank, 0), dict.fromkeys(orders.by_rank, 0.0)
    moved = True
    while moved:
        moved = False
        for rank, order in orders.by_rank.items():
            for operation in order[done[rank] :]:
                needed = orders.needed(rank, operation)
                if needed is not None and needed not in events:
                    break
                start = max(free[rank], events[needed].end if needed else 0.0)
                free[rank] = end = start + seconds(rank, operation)
                events[rank, operation] = Event(rank, operation, start, end)
                done[rank] += 1
                moved = True
    for rank, order in orders.by_rank.items():
        if done[rank] < len(order):
            raise ImpossibleSchedule(f"the ranks wait for each other: rank {rank} for {order[done[rank]]}")
    return sorted(events.values(), key=lambda event: event.start)


def makespan(events: Iterable[Event]) -> float:
    starts, ends = zip(*((event.start, event.end) for event in events), strict=True)
    return max(ends) - min(starts)


def serial(roles: Mapping[str, Pipelines]) -> Orders:
    """Let one role follow the other, and one micro-batch the other: it goes forward through all stages, and back."""

    def order(role: str, rank: int) -> list[Operation]:
        numbers = range(roles[role].micro_batches)
        return [Operation(role, kind, number) for number in numbers for kind in roles[role].kinds]

    return _role_by_role(roles, order)


def one_forward_one_backward(roles: Mapping[str, Pipelines]) -> Orders:
    """Let one role follow the other, with forwards until its pipeline is full, then backward and forward in turn."""

    def order(role: str, rank: int) -> list[Operation]:
        pipelines = roles[role]
        forwards, backwards = (
            [Operation(role, kind, number) for number in range(pipelines.micro_batches) if kind in pipelines.kinds]
            for kind in (FORWARD, BACKWARD)
        )
        full = pipelines.stages - pipelines.stage(rank) - 1 if backwards else len(forwards)
        steady = itertools.zip_longest(forwards[full:], backwards)
        return [*forwards[:full], *(operation for pair in steady for operation in pair if operation is not None)]

    return _role_by_role(roles, order)


def _role_by_role(roles: Mapping[str, Pipelines], order: Callable[[str, int], Iterable[Operation]]) -> Orders:
    ranks = sorted({rank for pipelines in roles.values() for rank in pipelines.positions})
    by_rank: dict[int, list[Operation]] = {rank: [] for rank in ranks}
    for role, pipelines in roles.items():
        for rank in pipelines.positions:
            by_rank[rank] += order(role, rank)
    return Orders(roles, by_rank)


def fused(roles: Mapping[str, Pipelines], schedule: Schedule) -> Orders:
    """Order the roles as the schedule says, its models A and B the first and the second role, on all lines of
    `devices`.

    Raises CannotFuse where the roles do not stand so, ImpossibleSchedule where the schedule is of other pipelines.
    """
    lines, names = devices(roles), list(roles)
    for model, name in enumerate(names):
        planned = schedule.problem.models[model].stages, schedule.problem.models[model].micro_batches
        if planned != (roles[name].stages, roles[name].micro_batches):
            raise ImpossibleSchedule(
                f"the schedule has {planned[0]} stages and {planned[1]} micro-batches of {name}, and the order needs "
                f"{roles[name].stages} and {roles[name].micro_batches}"
            )
    by_rank: dict[int, list[Operation]] = {}
    for line in lines:
        for rank, row in zip(line, schedule.by_device, strict=True):
            by_rank[rank] = [Operation(names[op.model], op.kind, op.micro_batch) for op in row]
    return Orders(roles, by_rank)


def devices(roles: Mapping[str, Pipelines]) -> list[tuple[int, ...]]:
    """Return the lines of ranks on which one role runs one way and the other back, as in a `SchedulingProblem`.

    Raises CannotFuse where there are none.
    """
    if len(roles) != 2:
        raise CannotFuse(f"it takes two roles, and here train {', '.join(roles) or 'none'}")
    (one, a), (other, b) = roles.items()
    for alone, name in ((a.positions.keys() - b.positions, one), (b.positions.keys() - a.positions, other)):
        if alone:
            raise CannotFuse(f"rank {min(alone)} trains the {name} alone")
    after: dict[int, int] = {}
    for ranks in (*a.ranks, *(ranks[::-1] for ranks in b.ranks)):
        after.update(itertools.pairwise(ranks))
    lines = []
    for rank in sorted(a.positions.keys() - after.values()):
        line = [rank]
        while line[-1] in after and len(line) < lcm(a.stages, b.stages):
            line.append(after[line[-1]])
        lines.append(tuple(line))

    def parts(stages: int) -> set[tuple[int, ...]]:
        return {line[start : start + stages] for line in lines for start in range(0, len(line), stages)}

    if parts(a.stages) != set(a.ranks) or parts(b.stages) != {ranks[::-1] for ranks in b.ranks}:
        raise CannotFuse(
            f"the {other} does not run against the {one}, as it would on the mesh {mesh_against(a, b.stages)}"
        )
    return lines


def mesh_against(a: Pipelines, stages: int) -> list[int]:
    """Return a mesh on which pipelines of so many stages run against those of `a`."""
    ranks = list(itertools.chain.from_iterable(a.ranks))
    pipelines = [ranks[start : start + stages][::-1] for start in range(0, len(ranks), stages)]
    return [rank for stage in zip(*sorted(pipelines), strict=True) for rank in stage]
