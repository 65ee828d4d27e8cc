"""The search: exact on the smallest problems, the published bound met, and never worse with more freedom."""

import math
import random
from dataclasses import replace

import pytest

from benchmarks.fused_replay import check, replay
from benchmarks.fused_schedules import read_rows, split_problem, split_schedule
from training.planner.schedules.best import QUICK, find_schedule
from training.planner.schedules.event_loop import Rule
from training.planner.schedules.problem import Pipeline, SchedulingProblem
from training.planner.schedules.schedule import serial_1f1b, timed
from training.planner.schedules.scheduler import ListScheduler

from .conftest import PROBLEMS, with_cap
from .test_bound import FILE, SMALLEST, best_of_all

SMALL = PROBLEMS["equal"]


@pytest.mark.parametrize("problem", SMALLEST)
def test_the_best_of_all_schedules_is_found(problem):
    found = find_schedule(problem, effort=QUICK).schedule
    check(found)
    assert (found.makespan, found.peak_memory) == best_of_all(problem)


def test_a_published_problem():
    """8 and 4 stages, 8 and 4 micro-batches; 225 and 15.6 are the published bound, and the memory of serial 1F1B."""
    row = next(row for row in read_rows(FILE) if row.name == "5")
    outcome = find_schedule(row.problem, seconds=60)
    check(outcome.schedule)
    assert outcome.schedule.makespan == row.bound == 225 and outcome.is_optimal
    assert outcome.schedule.peak_memory <= 1.1 * row.memory_annealed
    assert replay(row.problem, outcome.schedule.orders) == (225, outcome.schedule.peak_memory)


def test_every_kind_of_problem(problem):
    outcome = find_schedule(problem, effort=QUICK)
    check(outcome.schedule)
    assert outcome.lower_bound <= outcome.schedule.makespan + 1e-9
    assert outcome.memory_bound <= outcome.schedule.peak_memory
    assert replay(problem, outcome.schedule.orders)[0] == pytest.approx(outcome.schedule.makespan)


@pytest.mark.parametrize("seed", range(5))
def test_limits_that_a_schedule_keeps_to_do_not_stop_it(problem, seed):
    scheduler = ListScheduler(problem, random.Random(seed))
    for direction, view in enumerate(scheduler.directions):
        priority, windows = scheduler.draw(direction)
        free = Rule(priority, windows, [[math.inf] * (total + 1) for total in view.loop.total])
        found = scheduler.run(direction, free)
        limits = view.latest(found.makespan, found.peak)
        limited = replace(free, latest=limits, room=found.peak, limit=found.makespan, strict=True)
        assert scheduler.run(direction, limited) == found
        schedule = timed(problem, scheduler.orders(found))
        check(schedule)
        assert schedule.makespan <= found.makespan + 1e-9
        if direction == 0:
            assert (found.makespan, found.peak) == (schedule.makespan, schedule.peak_memory)


def test_the_same_seed_gives_the_same_schedule():
    one, same, other = (find_schedule(PROBLEMS["copies"], seed, QUICK) for seed in (3, 3, 4))
    assert one.schedule == same.schedule and one.dispatched == same.dispatched
    assert (other.dispatched, other.schedule) != (one.dispatched, one.schedule), "the seed matters"


def test_the_memory_cap_is_kept():
    free = find_schedule(SMALL, effort=QUICK).schedule
    capped = find_schedule(with_cap(SMALL, 0.75 * free.peak_memory), effort=QUICK).schedule
    check(capped)
    assert capped.peak_memory <= 0.75 * free.peak_memory
    assert capped.makespan > free.makespan, "memory at the shortest makespan was as small as can be"
    tight = find_schedule(with_cap(SMALL, SMALL.a.activation + SMALL.b.activation), effort=QUICK).schedule
    check(tight)


def test_a_cap_without_room_is_refused():
    by_device = SchedulingProblem(Pipeline(2, 1, 1, 1, (1, 5)), Pipeline(2, 1, 1, 1, (1, 4)), memory_cap=6)
    for problem, cap in ((SMALL, 2), (by_device, 5.9)):
        with pytest.raises(ValueError, match="room for one micro-batch of each model"):
            with_cap(problem, cap)


@pytest.mark.parametrize("stages, micro_batches", [(2, 8), (4, 16)])
def test_a_quick_search_fuses_stages_of_any_times(stages, micro_batches):
    """The head makes the last stage slower."""
    last = stages - 1
    actor = Pipeline(stages, micro_batches, (2.0,) * last + (3.1,), (4.1,) * last + (5.7,), 1)
    critic = Pipeline(stages, micro_batches, 1.3, 2.7, (1,) * last + (0.9,))
    problem = SchedulingProblem(actor, critic, memory_cap=2 * stages)
    outcome, unfused = find_schedule(problem, effort=QUICK), timed(problem, serial_1f1b(problem).orders)
    check(outcome.schedule)
    assert outcome.schedule.makespan < 0.95 * unfused.makespan and outcome.dispatched < 1.1 * QUICK


def test_the_search_starts_from_1f1b_without_the_barrier():
    """What is found first, of length 41, is shorter than with the barrier (42) and longer than without."""
    problem = SchedulingProblem(Pipeline(2, 2, 2, 2, 1), Pipeline(2, 2, 3, 7, 1), memory_cap=4)
    assert serial_1f1b(problem).makespan == 42
    for effort in (0, 1):
        assert find_schedule(problem, effort=effort).schedule.makespan == 40


def test_equal_stages_may_be_spelt_out():
    a, b = PROBLEMS["copies"].models
    spelt = SchedulingProblem(
        replace(a, forward=(a.forward,) * 4, activation=(a.activation,) * 4), replace(b, backward=(4, 4))
    )
    one, other = (find_schedule(problem, effort=1_000).schedule for problem in (PROBLEMS["copies"], spelt))
    assert one.operations == other.operations


@pytest.mark.parametrize("name", ["equal", "copies", "no whole multiple"])
def test_split_backwards_are_never_worse(name):
    whole = find_schedule(PROBLEMS[name], effort=QUICK)
    start = split_schedule(whole.schedule)
    split = find_schedule(start.problem, effort=QUICK, start=start)
    check(split.schedule)
    assert split.lower_bound <= whole.lower_bound + 1e-9
    assert split.schedule.makespan <= whole.schedule.makespan + 1e-9


def test_split_backwards_fill_what_whole_ones_cannot():
    """Model B is nothing to speak of. A: 2 stages, 2 micro-batches, f = 1, b = 2. Whole: (2 + 1) x 3 = 9. In halves:
    the last stage works from 1 to 7 (F B F B W W); the first does F F, and from 3 on B W B W, which ends at 7 too."""
    problem = SchedulingProblem(Pipeline(2, 2, 1, 2, 1), Pipeline(2, 1, 1e-6, 2e-6, 0))
    assert find_schedule(problem, effort=QUICK).schedule.makespan == pytest.approx(9, abs=1e-4)
    assert find_schedule(split_problem(problem), effort=QUICK).schedule.makespan == pytest.approx(7, abs=1e-4)


def test_a_start_that_is_better_is_kept():
    good = find_schedule(SMALL, effort=QUICK)
    again = find_schedule(SMALL, seed=1, effort=1, start=good.schedule)
    assert (again.schedule.makespan, again.schedule.peak_memory) == (good.schedule.makespan, good.schedule.peak_memory)


def test_times_may_be_fractions():
    problem = SchedulingProblem(Pipeline(4, 8, 0.37, 0.71, 1.3), Pipeline(2, 4, 0.113, 0.229, 0.7))
    outcome = find_schedule(problem, effort=QUICK)
    check(outcome.schedule)
    assert outcome.is_optimal


def test_the_time_limit_ends_the_search():
    large = SchedulingProblem(Pipeline(16, 32, 2, 4, 1.64), Pipeline(16, 32, 1, 2, 1))
    outcome = find_schedule(large, seconds=0.3)
    check(outcome.schedule)
    assert outcome.seconds < 3, "a schedule in the making is finished"
    assert outcome.schedule.makespan < serial_1f1b(large).makespan
