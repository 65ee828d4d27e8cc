"""Makespan and memory of schedules: two evaluators, closed forms, figures by hand, and what is refused."""

import itertools
import random
from dataclasses import replace

import pytest

from benchmarks.fused_replay import check, replay
from benchmarks.fused_schedules import interleaved_greedy, split_problem, split_schedule
from training.planner.schedules.problem import BACKWARD, FORWARD, WEIGHT, Pipeline, SchedulingProblem
from training.planner.schedules.schedule import ImpossibleSchedule, Schedule, serial_1f1b, timed

from .conftest import random_orders, with_cap

A_FORWARD, A_BACKWARD, B_FORWARD, B_BACKWARD = (0, FORWARD), (0, BACKWARD), (1, FORWARD), (1, BACKWARD)
ONE_DEVICE = SchedulingProblem(Pipeline(1, 2, 1, 2, 3), Pipeline(1, 1, 1, 2, 5))
TWO_DEVICES = SchedulingProblem(Pipeline(2, 1, 2, 4, 1), Pipeline(2, 1, 1, 2, 1))
TWO_ORDERS = [[A_FORWARD, B_FORWARD, B_BACKWARD, A_BACKWARD], [B_FORWARD, A_FORWARD, A_BACKWARD, B_BACKWARD]]


@pytest.mark.parametrize("seed", range(20))
def test_two_evaluators_agree_on_random_schedules(problem, seed):
    orders = random_orders(problem, random.Random(seed))
    schedule = timed(problem, orders)
    check(schedule)
    assert replay(problem, orders) == (schedule.makespan, schedule.peak_memory)
    assert timed(problem, schedule.orders) == schedule


@pytest.mark.parametrize(
    "forward, weight, message",
    [
        ((1, 2), 0, "3 stages need one number for all or 3"),
        ((1, 0, 1), 0, "above 0"),
        (1, (1, 0, 1), "all stages or on"),
    ],
)
def test_numbers_by_stage_that_do_not_fit_are_refused(forward, weight, message):
    with pytest.raises(ValueError, match=message):
        Pipeline(3, 1, forward, 2, 1, weight)


@pytest.mark.parametrize("stages, micro_batches", [(4, 8), (4, 4), (4, 2), (1, 3)])
def test_1f1b_has_its_closed_forms(stages, micro_batches):
    """(M + N - 1)(f + b), and min(M, N - stage) micro-batches alive."""
    problem = SchedulingProblem(Pipeline(stages, micro_batches, 5, 10, 2), Pipeline(stages, 3, 1, 3, 1e-3))
    schedule = serial_1f1b(problem)
    check(schedule)
    alone = (micro_batches + stages - 1) * 15
    assert schedule.makespan == alone + (3 + stages - 1) * 4
    assert schedule.device_memory == [2 * min(micro_batches, stages - stage) for stage in range(stages)]
    assert min(each.start for each in schedule.operations if each.model == 1) == alone, "a barrier between the models"


def test_a_schedule_by_hand():
    """Device 0 holds A's first and B's last stage: A 0-2, B's forward arrives at 1 but A runs, so 2-3; its backward
    3-5; A's backward arrives at 8. Device 1: B 0-1, waits for A until 2, 2-4, 4-8, then B's backward 8-10."""
    schedule = timed(TWO_DEVICES, TWO_ORDERS)
    times = {each[:3]: (each.start, each.end) for each in schedule.operations}
    assert times == {
        (0, 0, FORWARD): (0, 2), (0, 1, FORWARD): (2, 3), (0, 1, BACKWARD): (3, 5), (0, 0, BACKWARD): (8, 12),
        (1, 1, FORWARD): (0, 1), (1, 0, FORWARD): (2, 4), (1, 0, BACKWARD): (4, 8), (1, 1, BACKWARD): (8, 10),
    }  # fmt: skip
    assert schedule.makespan == 12 and schedule.device_memory == [2, 2]


@pytest.mark.parametrize(
    "order, peak",
    [
        ([A_FORWARD, A_BACKWARD, A_FORWARD, A_BACKWARD, B_FORWARD, B_BACKWARD], 5),
        ([A_FORWARD, A_FORWARD, A_BACKWARD, B_FORWARD, A_BACKWARD, B_BACKWARD], 3 + 5),
        ([A_FORWARD, B_FORWARD, A_FORWARD, A_BACKWARD, A_BACKWARD, B_BACKWARD], 3 + 5 + 3),
    ],
)
def test_memory_is_held_from_the_start_of_a_forward_to_the_end_of_its_backward(order, peak):
    schedule = timed(ONE_DEVICE, [order])
    assert schedule.peak_memory == peak and schedule.makespan == 9


def test_a_split_backward_frees_memory_with_its_second_part():
    problem = split_problem(ONE_DEVICE)
    late = [A_FORWARD, A_BACKWARD, A_FORWARD, A_BACKWARD, (0, WEIGHT), (0, WEIGHT), B_FORWARD, B_BACKWARD, (1, WEIGHT)]
    schedule = timed(problem, [late])
    assert schedule.peak_memory == 6 and schedule.makespan == 9


def test_whole_backwards_cut_in_two_take_the_same_time_and_memory(problem):
    if any(each.is_split for each in problem.models):
        pytest.skip("cut already")
    schedule = timed(problem, random_orders(problem, random.Random(1)))
    cut = split_schedule(schedule, 0.3)
    check(cut)
    assert cut.problem == split_problem(problem, 0.3)
    assert (cut.makespan, cut.peak_memory) == (schedule.makespan, schedule.peak_memory)


def test_a_cycle_is_refused():
    """Device 0 wants A's backward before it lets B's forward through, device 1 the other way round."""
    orders = [[A_FORWARD, A_BACKWARD, B_FORWARD, B_BACKWARD], [B_FORWARD, B_BACKWARD, A_FORWARD, A_BACKWARD]]
    with pytest.raises(ImpossibleSchedule, match=r"wait for each other: device 0 for a backward of A"):
        timed(TWO_DEVICES, orders)
    with pytest.raises(ImpossibleSchedule, match="wait for each other"):
        replay(TWO_DEVICES, orders)


def test_an_operation_too_few_or_too_many_is_refused():
    with pytest.raises(ImpossibleSchedule, match="device 1 has 0 backwards of B and needs 1"):
        timed(TWO_DEVICES, [TWO_ORDERS[0], TWO_ORDERS[1][:3]])
    with pytest.raises(ImpossibleSchedule):
        timed(TWO_DEVICES, [[*TWO_ORDERS[0], A_FORWARD], TWO_ORDERS[1]])


def changed(schedule: Schedule, place: int, **fields) -> Schedule:
    operations = list(schedule.operations)
    operations[place] = operations[place]._replace(**fields)
    return replace(schedule, operations=tuple(operations))


def test_a_schedule_that_breaks_a_rule_is_refused_with_the_reason():
    schedule = timed(TWO_DEVICES, TWO_ORDERS)
    places = {each[:3]: place for place, each in enumerate(schedule.operations)}
    with pytest.raises(ImpossibleSchedule, match="backward of A 0 on device 0 starts at 7, before the end of backward"):
        check(changed(schedule, places[0, 0, BACKWARD], start=7, end=11))
    with pytest.raises(ImpossibleSchedule, match="forward of B 0 on device 0 starts at 1, while forward of A 0"):
        check(changed(schedule, places[0, 1, FORWARD], start=1, end=2))
    with pytest.raises(ImpossibleSchedule, match="runs from 8 to 11"):
        check(changed(schedule, places[0, 0, BACKWARD], end=11))
    with pytest.raises(ImpossibleSchedule, match="missing, unknown or there twice"):
        check(replace(schedule, operations=schedule.operations[1:]))
    with pytest.raises(ImpossibleSchedule, match="missing, unknown or there twice"):
        check(replace(schedule, operations=(*schedule.operations, schedule.operations[0])))


def test_a_schedule_over_the_memory_cap_is_refused():
    problem = SchedulingProblem(Pipeline(1, 2, 1, 2, 1), Pipeline(1, 1, 1, 2, 0.5))
    schedule = timed(problem, [[A_FORWARD, A_FORWARD, A_BACKWARD, A_BACKWARD, B_FORWARD, B_BACKWARD]])
    check(replace(schedule, problem=with_cap(problem, 2)))
    with pytest.raises(ImpossibleSchedule, match=r"memory is 2, more than 1\.5"):
        check(replace(schedule, problem=with_cap(problem, 1.5)))


def test_micro_batches_go_first_in_first_out():
    schedule = timed(ONE_DEVICE, [[A_FORWARD, A_FORWARD, A_BACKWARD, A_BACKWARD, B_FORWARD, B_BACKWARD]])
    for _, group in itertools.groupby(sorted(schedule.operations), key=lambda each: each[:3]):
        rows = list(group)
        assert [each.start for each in rows] == sorted(each.start for each in rows)
    one, other = (place for place, each in enumerate(schedule.operations) if each[1:3] == (0, BACKWARD))
    with pytest.raises(ImpossibleSchedule, match="backward of A 1 on device 0 starts at 2, before the end of backward"):
        check(changed(changed(schedule, one, micro_batch=1), other, micro_batch=0))


def test_the_greedy_schedule_is_possible_and_lets_forwards_run_ahead(problem):
    schedule = interleaved_greedy(problem)
    check(schedule)
    assert schedule.makespan < serial_1f1b(problem).makespan


@pytest.mark.parametrize("first_stage, model", [(5, 0), (1, 1)])
def test_the_greedy_schedule_prefers_what_is_heavier_on_the_device(first_stage, model):
    problem = SchedulingProblem(Pipeline(2, 2, (first_stage, 4), 4, 1), Pipeline(1, 2, 2, 4, 1))
    assert interleaved_greedy(problem).orders[0][0] == (model, FORWARD)
