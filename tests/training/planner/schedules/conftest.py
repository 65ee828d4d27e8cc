"""Small problems, random schedules of them, and all schedules of the smallest."""

import random
from dataclasses import replace

import pytest

from benchmarks.fused_schedules import split_pipeline, split_problem
from training.planner.schedules.problem import BACKWARD, FORWARD, WEIGHT, Pipeline, SchedulingProblem
from training.planner.schedules.schedule import Order

PROBLEMS = {
    "equal": SchedulingProblem(Pipeline(3, 4, 2, 4, 1.5), Pipeline(3, 4, 1, 2, 1)),
    "copies": SchedulingProblem(Pipeline(4, 4, 3, 6, 1.5), Pipeline(2, 2, 2, 4, 2)),
    "no whole multiple": SchedulingProblem(Pipeline(3, 2, 1, 1.5, 1), Pipeline(2, 3, 0.7, 1.4, 0.3)),
    "split": split_problem(SchedulingProblem(Pipeline(3, 4, 2, 4, 1.5), Pipeline(3, 3, 1, 2, 1))),
    "one split": SchedulingProblem(split_pipeline(Pipeline(4, 3, 2, 4, 1.5), 0.4), Pipeline(2, 3, 1, 2, 1)),
    "unequal": SchedulingProblem(
        Pipeline(3, 4, (1, 2, 3), (2, 5, 4), (1, 2, 0.5)), Pipeline(3, 3, 2, (3, 6, 4), (2, 0, 1))
    ),
    "unequal copies": SchedulingProblem(
        Pipeline(4, 3, (3, 1, 2, 5), (6, 2, 3, 4), (1, 0.5, 2, 1)), Pipeline(2, 2, (2, 3), (4, 7), 1.5)
    ),
    "unequal split": SchedulingProblem(
        Pipeline(3, 4, (1, 2, 3), (2, 4, 3), 1, (0.5, 2, 1)),
        split_pipeline(Pipeline(3, 3, (3, 1, 1), (4, 2, 2), 1), 0.25),
    ),
}


@pytest.fixture(params=PROBLEMS)
def problem(request) -> SchedulingProblem:
    return PROBLEMS[request.param]


def random_orders(problem: SchedulingProblem, rng: random.Random) -> list[Order]:
    """Operations one by one in an order that keeps to all predecessors; each goes to the end of its device's."""
    orders: list[list[tuple[int, int]]] = [[] for _ in range(problem.devices)]
    done: dict[tuple[int, int, int], int] = {}
    while True:
        can = []
        for device in range(problem.devices):
            for model, each in enumerate(problem.models):
                for kind in each.kinds:
                    number = done.get((device, model, kind), 0)
                    before, after = problem.before(model, device), problem.after(model, device)
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


def all_orders(problem: SchedulingProblem) -> list[list[tuple[int, int]]]:
    """Of one device; each device has the same ones."""
    return interleavings([[each.micro_batches] * 2 for each in problem.models])


def with_cap(problem: SchedulingProblem, cap: float) -> SchedulingProblem:
    return replace(problem, memory_cap=cap)
