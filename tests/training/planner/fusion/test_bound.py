"""Bounds hold for every schedule: against random ones, all of the smallest instances, and the published figures."""

import itertools
import random
from functools import cache
from pathlib import Path

import pytest

from benchmarks.fused_schedules import read_rows
from training.planner.fusion.instance import Instance, Pipeline, Slack
from training.planner.fusion.schedule import ImpossibleSchedule, timed

from .conftest import all_orders, random_orders, with_cap

FILE = Path(__file__).parents[3] / "data" / "fused_schedule_instances.csv"


def test_the_published_bounds():
    for row in read_rows(FILE):
        assert Slack.of(row.instance).lower_bound() == row.bound


@pytest.mark.parametrize("seed", range(5))
def test_no_random_schedule_is_below_a_bound(instance, seed):
    schedule = timed(instance, random_orders(instance, random.Random(seed)))
    for cap in (float("inf"), schedule.peak_memory):
        slack = Slack.of(with_cap(instance, cap))
        assert slack.lower_bound() <= schedule.makespan + 1e-9
        assert slack.memory_bound(schedule.makespan) <= schedule.peak_memory
        latest = slack.latest(schedule.makespan)
        for each in schedule.operations:
            key = each[:3]
            assert slack.heads[key][each.micro_batch] - 1e-9 <= each.start <= latest[key][each.micro_batch] + 1e-9


SMALLEST = [
    Instance(Pipeline(2, 2, 2, 4, 2), Pipeline(2, 1, 3, 6, 1)),
    Instance(Pipeline(2, 1, 5, 5, 1), Pipeline(1, 2, 1, 3, 3)),
    Instance(Pipeline(1, 2, 1, 2, 1), Pipeline(1, 3, 1, 1, 2)),
    Instance(Pipeline(2, 2, (1, 5), (7, 2), (1, 3)), Pipeline(2, 1, (4, 1), (2, 6), (2, 1))),
    Instance(Pipeline(2, 2, (5, 1), (2, 1), (0, 1)), Pipeline(1, 1, 0.25, 0.25, 0)),
    Instance(Pipeline(1, 1, 2, 5, 1), Pipeline(3, 1, (3, 1, 6), (2, 7, 1), (4, 1, 2))),
    Instance(Pipeline(2, 2, (2, 5), (4, 5), (2, 3)), Pipeline(1, 1, 3, 4, 2), memory_cap=5),
]


@cache
def best_of_all(instance: Instance) -> tuple[float, float]:
    """Makespan and memory of the best of all schedules within the cap."""
    best = (float("inf"), float("inf"))
    for orders in itertools.product(all_orders(instance), repeat=instance.devices):
        try:
            schedule = timed(instance, orders)
        except ImpossibleSchedule:
            continue
        if schedule.peak_memory <= instance.memory_cap:
            best = min(best, (schedule.makespan, schedule.peak_memory))
    return best


@pytest.mark.parametrize("instance", SMALLEST)
def test_bounds_of_all_schedules(instance):
    makespan, memory = best_of_all(instance)
    slack = Slack.of(instance)
    assert slack.lower_bound() <= makespan
    assert slack.memory_bound(makespan) <= memory


def test_a_model_alone_is_bound_by_1f1b():
    """When the other model is nothing to speak of."""
    instance = Instance(Pipeline(4, 6, 2, 4, 1), Pipeline(4, 1, 1e-3, 1e-3, 1))
    assert Slack.of(instance).lower_bound() == pytest.approx(9 * 6, rel=1e-3)


def test_a_memory_cap_raises_the_bound():
    """Two stages, room for one micro-batch: they go one by one, 2 x 2 forwards and 2 x 4 backwards each."""
    a = Pipeline(2, 3, 2, 4, 1)
    instance = Instance(a, Pipeline(2, 1, 1e-6, 1e-6, 0))
    assert Slack.of(instance).lower_bound() == pytest.approx((3 + 1) * 6, rel=1e-3)
    assert Slack.of(with_cap(instance, 1)).lower_bound() == pytest.approx(3 * 12, rel=1e-3)
