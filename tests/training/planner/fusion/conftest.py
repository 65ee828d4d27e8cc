"""Small instances, random schedules of them, and all schedules of the smallest."""

import random
from dataclasses import replace

import pytest

from training.planner.fusion.instance import BACKWARD, FORWARD, WEIGHT, Instance, Pipeline
from training.planner.fusion.schedule import Order

INSTANCES = {
    "equal": Instance(Pipeline(3, 4, 2, 4, 1.5), Pipeline(3, 4, 1, 2, 1)),
    "copies": Instance(Pipeline(4, 4, 3, 6, 1.5), Pipeline(2, 2, 2, 4, 2)),
    "no whole multiple": Instance(Pipeline(3, 2, 1, 1.5, 1), Pipeline(2, 3, 0.7, 1.4, 0.3)),
    "split": Instance(Pipeline(3, 4, 2, 4, 1.5), Pipeline(3, 3, 1, 2, 1)).split(0.5),
    "one split": Instance(Pipeline(4, 3, 2, 4, 1.5).split(0.4), Pipeline(2, 3, 1, 2, 1)),
    "unequal": Instance(Pipeline(3, 4, (1, 2, 3), (2, 5, 4), (1, 2, 0.5)), Pipeline(3, 3, 2, (3, 6, 4), (2, 0, 1))),
    "unequal copies": Instance(
        Pipeline(4, 3, (3, 1, 2, 5), (6, 2, 3, 4), (1, 0.5, 2, 1)), Pipeline(2, 2, (2, 3), (4, 7), 1.5)
    ),
    "unequal split": Instance(
        Pipeline(3, 4, (1, 2, 3), (2, 4, 3), 1, (0.5, 2, 1)), Pipeline(3, 3, (3, 1, 1), (4, 2, 2), 1).split(0.25)
    ),
}


@pytest.fixture(params=INSTANCES)
def instance(request) -> Instance:
    return INSTANCES[request.param]


def random_orders(instance: Instance, rng: random.Random) -> list[Order]:
    """Operations one by one in an order that keeps to all predecessors; each goes to the end of its device's."""
    orders: list[list[tuple[int, int]]] = [[] for _ in range(instance.devices)]
    done: dict[tuple[int, int, int], int] = {}
    while True:
        can = []
        for device in range(instance.devices):
            for model, each in enumerate(instance.models):
                for kind in each.kinds:
                    number = done.get((device, model, kind), 0)
                    before, after = instance.before(model, device), instance.after(model, device)
                    needs = {
                        FORWARD: None if before is None else (before, model, FORWARD),
                        BACKWARD: (device, model, FORWARD) if after is None else (after, model, BACKWARD),
                        WEIGHT: (device, model, BACKWARD),
                    }[kind]
                    if number < each.micro_batches and (needs is None or done.get(needs, 0) > number):
                        can.append((device, model, kind))
        if not can:
            return orders
        device, model, kind = chosen = rng.choice(can)
        done[chosen] = done.get(chosen, 0) + 1
        orders[device].append((model, kind))


def interleavings(counts: list[list[int]]) -> list[list[tuple[int, int]]]:
    """All orders of a device: what is left of [model][kind], where a backward needs its forward before it."""
    if not any(map(sum, counts)):
        return [[]]
    found = []
    for model in range(2):
        for kind in (FORWARD, BACKWARD):
            forwards, backwards = counts[model]
            if counts[model][kind] and (kind == FORWARD or backwards > forwards):
                rest = [row[:] for row in counts]
                rest[model][kind] -= 1
                found += [[(model, kind), *tail] for tail in interleavings(rest)]
    return found


def all_orders(instance: Instance) -> list[list[tuple[int, int]]]:
    """Of one device; each device has the same ones."""
    return interleavings([[each.micro_batches] * 2 for each in instance.models])


def with_cap(instance: Instance, cap: float) -> Instance:
    return replace(instance, memory_cap=cap)
