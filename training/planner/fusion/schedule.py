"""A schedule: what each device does when, and how long and how much memory that takes."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from training.planner.fusion.instance import BACKWARD, FORWARD, KINDS, MODELS, WEIGHT, Instance


class Operation(NamedTuple):
    """One bar of a Gantt chart."""

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
    instance: Instance
    operations: tuple[Operation, ...]

    @cached_property
    def makespan(self) -> float:
        return max(operation.end for operation in self.operations)

    @cached_property
    def by_device(self) -> list[list[Operation]]:
        rows: list[list[Operation]] = [[] for _ in range(self.instance.devices)]
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
        return [self._peak(device) for device in range(self.instance.devices)]

    @property
    def peak_memory(self) -> float:
        return max(self.device_memory)

    def split(self, share: float = 0.5) -> "Schedule":
        """The same with every backward cut in two, the weight-gradient part right behind the other."""
        instance = self.instance.split(share)
        operations: list[Operation] = []
        for operation in self.operations:
            if operation.kind == BACKWARD:
                middle = operation.start + (1 - share) * (operation.end - operation.start)
                operations.append(operation._replace(end=middle))
                operations.append(operation._replace(kind=WEIGHT, start=middle))
            else:
                operations.append(operation)
        return Schedule(instance, tuple(operations))

    def _peak(self, device: int) -> float:
        instance = self.instance
        changes = []  # (time, -1 or 1, model): what ends at a time is freed before what begins then is taken
        for operation in self.by_device[device]:
            if operation.kind == FORWARD:
                changes.append((operation.start, 1, operation.model))
            elif operation.kind == instance.models[operation.model].kinds[-1]:
                changes.append((operation.end, -1, operation.model))
        alive, peak = [0, 0], 0.0
        for _, change, model in sorted(changes):
            alive[model] += change
            peak = max(peak, sum(number * instance.activation(model, device) for model, number in enumerate(alive)))
        return peak


def timed(instance: Instance, orders: Sequence[Order]) -> Schedule:
    """Every operation as early as its device's order and its predecessors allow: the longest path to it.

    Raises ImpossibleSchedule where the orders make a cycle or are not those of the instance.
    """
    there = Counter((device, *operation) for device, order in enumerate(orders) for operation in order)
    needed = Counter(
        {
            (device, model, kind): each.micro_batches
            for device, (model, each) in itertools.product(range(instance.devices), enumerate(instance.models))
            for kind in each.kinds
        }
    )
    for key in sorted(there | needed):
        if there[key] != needed[key]:
            device, model, kind = key
            name = f"{KINDS[kind]}s of {MODELS[model]}"
            raise ImpossibleSchedule(f"device {device} has {there[key]} {name} and needs {needed[key]}")
    operations, blocked = operations_of(instance, orders)
    if blocked:
        device, (model, kind) = min(blocked.items())
        raise ImpossibleSchedule(
            f"the devices wait for each other: device {device} for a {KINDS[kind]} of {MODELS[model]}"
        )
    return Schedule(instance, tuple(operations))


def operations_of(instance: Instance, orders: Sequence[Order]) -> tuple[list[Operation], dict[int, tuple[int, int]]]:
    """The operations of orders that need not be complete, and where devices wait for ever, what they wait for."""
    ends: dict[tuple[int, int, int], list[float]] = {
        (device, model, kind): []
        for device, model, kind in itertools.product(range(instance.devices), range(2), range(3))
    }
    operations: list[Operation] = []
    done, free = [0] * instance.devices, [0.0] * instance.devices
    moved = True
    while moved:
        moved = False
        for device, order in enumerate(orders):
            while done[device] < len(order):
                model, kind = order[done[device]]
                ready = _ready(instance, ends, device, model, kind)
                if ready is None:
                    break
                number = len(ends[device, model, kind])
                start = max(free[device], ready)
                free[device] = end = start + instance.times(model, device)[kind]
                operations.append(Operation(device, model, kind, number, start, end))
                ends[device, model, kind].append(end)
                done[device] += 1
                moved = True
    blocked = {device: order[done[device]] for device, order in enumerate(orders) if done[device] < len(order)}
    return operations, blocked


def _ready(
    instance: Instance, ends: dict[tuple[int, int, int], list[float]], device: int, model: int, kind: int
) -> float | None:
    """When the predecessors on other devices, and in the micro-batch, have ended; None before that is known."""
    number = len(ends[device, model, kind])
    if kind == FORWARD:
        source = instance.before(model, device)
        found = None if source is None else ends[source, model, FORWARD]
    elif kind == BACKWARD:
        source = instance.after(model, device)
        found = ends[device, model, FORWARD] if source is None else ends[source, model, BACKWARD]
    else:
        found = ends[device, model, BACKWARD]
    if found is None:
        return 0.0
    return found[number] if number < len(found) else None


def one_forward_one_backward(instance: Instance, model: int, device: int) -> Order:
    """1F1B of one model on one device: forwards until the pipeline is full, then backward and forward in turn."""
    each = instance.models[model]
    full = min(each.micro_batches, each.stages - instance.stage(model, device))
    backward = [(model, kind) for kind in (BACKWARD, WEIGHT) if kind in each.kinds]
    steady = [*backward, (model, FORWARD)] * (each.micro_batches - full)
    return [*[(model, FORWARD)] * full, *steady, *backward * full]


def serial_1f1b(instance: Instance) -> Schedule:
    """Model A under 1F1B, then model B, with a barrier between them."""
    operations, before = [], 0.0
    for model in range(2):
        orders = [one_forward_one_backward(instance, model, device) for device in range(instance.devices)]
        found, _ = operations_of(instance, orders)
        operations += [each._replace(start=each.start + before, end=each.end + before) for each in found]
        before = max(each.end for each in operations)
    return Schedule(instance, tuple(operations))
