"""Bounds hold for every schedule: against random ones, all of the smallest problems, and the published figures."""

import itertools
import random
from functools import cache
from pathlib import Path

import pytest

from benchmarks.fused_schedules import read_rows
from training.planner.schedules.problem import Pipeline, SchedulingProblem, Slack
from training.planner.schedules.schedule import ImpossibleSchedule, timed

from .conftest import all_orders, random_orders, with_cap

FILE = Path(__file__).parents[3] / "data" / "fused_schedule_instances.csv"


def test_the_published_bounds():
    for row in read_rows(FILE):
        assert Slack.of(row.problem).lower_bound() == row.bound


@pytest.mark.parametrize("seed", range(5))
def test_no_random_schedule_is_below_a_bound(problem, seed):
    schedule = timed(problem, random_orders(problem, random.Random(seed)))
    for cap in (float("inf"), schedule.peak_memory):
        slack = Slack.of(with_cap(problem, cap))
        assert slack.lower_bound() <= schedule.makespan + 1e-9
        assert slack.memory_bound(schedule.makespan) <= schedule.peak_memory
        latest = slack.latest(schedule.makespan)
        for each in schedule.operations:
            key = each[:3]
            assert slack.heads[key][each.micro_batch] - 1e-9 <= each.start <= latest[key][each.micro_batch] + 1e-9


SMALLEST = [
    SchedulingProblem(Pipeline(2, 2, 2, 4, 2), Pipeline(2, 1, 3, 6, 1)),
    SchedulingProblem(Pipeline(2, 1, 5, 5, 1), Pipeline(1, 2, 1, 3, 3)),
    SchedulingProblem(Pipeline(1, 2, 1, 2, 1), Pipeline(1, 3, 1, 1, 2)),
    SchedulingProblem(Pipeline(2, 2, (1, 5), (7, 2), (1, 3)), Pipeline(2, 1, (4, 1), (2, 6), (2, 1))),
    SchedulingProblem(Pipeline(2, 2, (5, 1), (2, 1), (0, 1)), Pipeline(1, 1, 0.25, 0.25, 0)),
    SchedulingProblem(Pipeline(1, 1, 2, 5, 1), Pipeline(3, 1, (3, 1, 6), (2, 7, 1), (4, 1, 2))),
    SchedulingProblem(Pipeline(2, 2, (2, 5), (4, 5), (2, 3)), Pipeline(1, 1, 3, 4, 2), memory_cap=5),
]


@cache
def best_of_all(problem: SchedulingProblem) -> tuple[float, float]:
    """Makespan and memory of the best of all schedules within the cap."""
    best = (float("inf"), float("inf"))
    for orders in itertools.product(all_orders(problem), repeat=problem.devices):
        try:
            schedule = timed(problem, orders)
        except ImpossibleSchedule:
            continue
        if schedule.peak_memory <= problem.memory_cap:
            best = min(best, (schedule.makespan, schedule.peak_memory))
    return best


@pytest.mark.parametrize("problem", SMALLEST)
def test_bounds_of_all_schedules(problem):
    makespan, memory = best_of_all(problem)
    slack = Slack.of(problem)
    assert slack.lower_bound() <= makespan
    assert slack.memory_bound(makespan) <= memory


def test_a_model_alone_is_bound_by_1f1b():
    """When the other model is nothing to speak of."""
    problem = SchedulingProblem(Pipeline(4, 6, 2, 4, 1), Pipeline(4, 1, 1e-3, 1e-3, 1))
    assert Slack.of(problem).lower_bound() == pytest.approx(9 * 6, rel=1e-3)


def test_a_memory_cap_raises_the_bound():
    """Two stages, room for one micro-batch: they go one by one, 2 x 2 forwards and 2 x 4 backwards each."""
    a = Pipeline(2, 3, 2, 4, 1)
    problem = SchedulingProblem(a, Pipeline(2, 1, 1e-6, 1e-6, 0))
    assert Slack.of(problem).lower_bound() == pytest.approx((3 + 1) * 6, rel=1e-3)
    assert Slack.of(with_cap(problem, 1)).lower_bound() == pytest.approx(3 * 12, rel=1e-3)
