"""Schedules: what each device does when, and how long and how much memory that takes."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from training.planner.schedules.problem import BACKWARD, FORWARD, KINDS, MODELS, WEIGHT, SchedulingProblem


class ScheduledOperation(NamedTuple):
    """Says when a device runs a part of a micro-batch: one bar of a Gantt chart."""

    device: int
    model: int
    """0 is A, 1 is B."""
    kind: int
    """FORWARD, BACKWARD or WEIGHT."""
    micro_batch: int
    """From 0, in each copy of a model."""
    start: float
    end: float

    def __str__(self) -> str:
        return f"{KINDS[self.kind]} of {MODELS[self.model]} {self.micro_batch} on device {self.device}"


Order = list[tuple[int, int]]
"""What a device does, one after the other: (model, kind). Micro-batches go first in, first out."""


class ImpossibleSchedule(ValueError):
    """The devices wait for each other, an operation is missing, or one stands where it cannot."""


@dataclass(frozen=True)
class Schedule:
    problem: SchedulingProblem
    operations: tuple[ScheduledOperation, ...]

    @cached_property
    def makespan(self) -> float:
        return max(operation.end for operation in self.operations)

    @cached_property
    def by_device(self) -> list[list[ScheduledOperation]]:
        rows: list[list[ScheduledOperation]] = [[] for _ in range(self.problem.devices)]
        for operation in sorted(self.operations, key=lambda operation: operation.start):
            rows[operation.device].append(operation)
        return rows

    @property
    def orders(self) -> list[Order]:
        """What each device does, without times."""
        return [[(operation.model, operation.kind) for operation in row] for row in self.by_device]

    @cached_property
    def device_memory(self) -> list[float]:
        """The most that the activations alive on each device take at one time."""
        return [self._peak(device) for device in range(self.problem.devices)]

    @property
    def peak_memory(self) -> float:
        return max(self.device_memory)

    def _peak(self, device: int) -> float:
        problem = self.problem
        changes = []  # (time, -1 or 1, model): what ends at a time is freed before what begins then is taken
        for operation in self.by_device[device]:
            if operation.kind == FORWARD:
                changes.append((operation.start, 1, operation.model))
            elif operation.kind == problem.models[operation.model].kinds[-1]:
                changes.append((operation.end, -1, operation.model))
        alive, peak = [0, 0], 0.0
        for _, change, model in sorted(changes):
            alive[model] += change
            peak = max(peak, sum(number * problem.activation(model, device) for model, number in enumerate(alive)))
        return peak


def timed(problem: SchedulingProblem, orders: Sequence[Order]) -> Schedule:
    """Start every operation as early as its device's order and its predecessors allow: the longest path to it.

    Raises ImpossibleSchedule where the orders make a cycle or are not those of the problem.
    """
    given = Counter((device, *operation) for device, order in enumerate(orders) for operation in order)
    needed = Counter(
        {
            (device, model, kind): pipeline.micro_batches
            for device, (model, pipeline) in itertools.product(range(problem.devices), enumerate(problem.models))
            for kind in pipeline.kinds
        }
    )
    for key in sorted(given | needed):
        if given[key] != needed[key]:
            device, model, kind = key
            name = f"{KINDS[kind]}s of {MODELS[model]}"
            raise ImpossibleSchedule(f"device {device} has {given[key]} {name} and needs {needed[key]}")
    operations, blocked = operations_of(problem, orders)
    if blocked:
        device, (model, kind) = min(blocked.items())
        raise ImpossibleSchedule(
            f"the devices wait for each other: device {device} for a {KINDS[kind]} of {MODELS[model]}"
        )
    return Schedule(problem, tuple(operations))


def operations_of(
    problem: SchedulingProblem, orders: Sequence[Order]
) -> tuple[list[ScheduledOperation], dict[int, tuple[int, int]]]:
    """Return the operations of orders that need not be complete and, where devices wait forever, for what they do."""
    ends: dict[tuple[int, int, int], list[float]] = {
        (device, model, kind): []
        for device, model, kind in itertools.product(range(problem.devices), range(2), range(3))
    }
    operations: list[ScheduledOperation] = []
    done, free = [0] * problem.devices, [0.0] * problem.devices
    moved = True
    while moved:
        moved = False
        for device, order in enumerate(orders):
            while done[device] < len(order):
                model, kind = order[done[device]]
                ready = _ready(problem, ends, device, model, kind)
                if ready is None:
                    break
                number = len(ends[device, model, kind])
                start = max(free[device], ready)
                free[device] = end = start + problem.times(model, device)[kind]
                operations.append(ScheduledOperation(device, model, kind, number, start, end))
                ends[device, model, kind].append(end)
                done[device] += 1
                moved = True
    blocked = {device: order[done[device]] for device, order in enumerate(orders) if done[device] < len(order)}
    return operations, blocked


def _ready(
    problem: SchedulingProblem, ends: dict[tuple[int, int, int], list[float]], device: int, model: int, kind: int
) -> float | None:
    """Return when the predecessor, in the micro-batch or on another device, has ended; None before that is known."""
    number, predecessor = len(ends[device, model, kind]), (device, model, BACKWARD)
    if kind == FORWARD:
        source = problem.before(model, device)
        if source is None:
            return 0.0
        predecessor = source, model, FORWARD
    elif kind == BACKWARD:
        source = problem.after(model, device)
        predecessor = (device, model, FORWARD) if source is None else (source, model, BACKWARD)
    return ends[predecessor][number] if number < len(ends[predecessor]) else None


def one_forward_one_backward(problem: SchedulingProblem, model: int, device: int) -> Order:
    """Order one model on one device by 1F1B: forwards until the pipeline is full, then backward and forward in turn."""
    pipeline = problem.models[model]
    full = min(pipeline.micro_batches, pipeline.stages - problem.stage(model, device))
    backward = [(model, kind) for kind in (BACKWARD, WEIGHT) if kind in pipeline.kinds]
    steady = [*backward, (model, FORWARD)] * (pipeline.micro_batches - full)
    return [*[(model, FORWARD)] * full, *steady, *backward * full]


def serial_1f1b(problem: SchedulingProblem) -> Schedule:
    """Schedule model A under 1F1B, then model B, with a barrier between them."""
    operations: list[ScheduledOperation] = []
    before = 0.0
    for model in range(2):
        orders = [one_forward_one_backward(problem, model, device) for device in range(problem.devices)]
        of_model, _ = operations_of(problem, orders)
        operations += [op._replace(start=op.start + before, end=op.end + before) for op in of_model]
        before = max(operation.end for operation in operations)
    return Schedule(problem, tuple(operations))
