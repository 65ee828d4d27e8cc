"""Orders on real layouts: 1F1B as everybody draws it, fused where roles run against each other, and what is refused."""

import itertools

import pytest

from benchmarks.fused_schedules import split_problem
from tests.training.pipelines.works import random_orders
from training.hybrid_engine.layout import Layout
from training.pipelines.orders import (
    CannotFuse,
    Operation,
    Orders,
    Pipelines,
    devices,
    fused,
    makespan,
    one_forward_one_backward,
    serial,
    timeline,
)
from training.planner.schedules.best import find_schedule
from training.planner.schedules.problem import FORWARD, Pipeline, SchedulingProblem
from training.planner.schedules.schedule import ImpossibleSchedule, serial_1f1b, timed
from training.planner.schedules.schedule import one_forward_one_backward as planned_1f1b


def roles_of(a: Layout, b: Layout, micro_batches=(4, 3)):
    return {"actor": Pipelines.of(a, micro_batches[0]), "critic": Pipelines.of(b, micro_batches[1])}


def text(order):
    return " ".join(f"{'FB'[each.kind]}{each.micro_batch}" for each in order)


def test_serial_and_1f1b_by_hand():
    roles = {"actor": Pipelines.of(Layout((5, 3, 7), pipeline=3), 4)}
    assert {text(order) for order in serial(roles).by_rank.values()} == {"F0 B0 F1 B1 F2 B2 F3 B3"}
    assert {rank: text(order) for rank, order in one_forward_one_backward(roles).by_rank.items()} == {
        5: "F0 F1 F2 B0 F3 B1 B2 B3",
        3: "F0 F1 B0 F2 B1 F3 B2 B3",
        7: "F0 B0 F1 B1 F2 B2 F3 B3",
    }


def test_a_pipeline_that_is_never_full():
    roles = {"actor": Pipelines.of(Layout((0, 1, 2, 3), pipeline=4), 2)}
    assert text(one_forward_one_backward(roles).by_rank[0]) == "F0 F1 B0 B1"
    assert text(one_forward_one_backward(roles).by_rank[2]) == "F0 F1 B0 B1"


def test_whole_models_on_every_rank():
    roles = roles_of(Layout((0, 1), 2), Layout((1,)), (2, 1))
    for orders in (serial(roles), one_forward_one_backward(roles)):
        assert {rank: text(order) for rank, order in orders.by_rank.items()} == {
            0: "F0 B0 F1 B1",
            1: "F0 B0 F1 B1 F0 B0",
        }


def test_scoring_is_forwards_only():
    roles = {name: Pipelines.of(Layout((0, 1), pipeline=2), 3, (FORWARD,)) for name in ("actor", "reward")}
    for orders in (serial(roles), one_forward_one_backward(roles)):
        assert text(orders.by_rank[1]) == "F0 F1 F2 F0 F1 F2"
        assert makespan(timeline(orders, lambda rank, operation: 1)) == 7


def test_one_role_after_the_other_where_they_share_ranks_and_beside_it_where_not():
    roles = roles_of(Layout((0, 1), pipeline=2), Layout((1, 2, 3), pipeline=3), (2, 2))
    orders = one_forward_one_backward(roles)
    assert [each.role for each in orders.by_rank[1]] == ["actor"] * 4 + ["critic"] * 4
    apart = one_forward_one_backward(roles_of(Layout((0, 1), pipeline=2), Layout((3, 2), pipeline=2), (2, 2)))
    assert makespan(timeline(apart, lambda rank, operation: 1)) == 2 * (2 + 2 - 1)


@pytest.mark.parametrize(
    "a, b, lines",
    [
        (Layout((0, 1), pipeline=2), Layout((1, 0), pipeline=2), [(0, 1)]),
        (Layout((0, 1, 2, 3), pipeline=4), Layout((1, 3, 0, 2), 2, pipeline=2), [(0, 1, 2, 3)]),
        (Layout((0, 1, 2, 3), pipeline=4), Layout((3, 1, 2, 0), 2, pipeline=2), [(0, 1, 2, 3)]),
        (Layout((0, 2, 1, 3), 2, pipeline=2), Layout((3, 1, 2, 0), 2, pipeline=2), [(0, 1), (2, 3)]),
        (Layout((3, 1, 2, 0), 2, pipeline=2), Layout((0, 1, 2, 3), pipeline=4), [(3, 2, 1, 0)]),
        (Layout((0, 2, 4, 1, 3, 5), 3, pipeline=2), Layout((2, 5, 1, 4, 0, 3), 2, pipeline=3), [(0, 1, 2, 3, 4, 5)]),
        (Layout((0, 1, 2, 3), pipeline=4), Layout((0, 1, 2, 3), 4), [(0, 1, 2, 3)]),
        (Layout((1, 0), 2), Layout((0, 1), 2), [(0,), (1,)]),
        (Layout((0, 1, 2, 3), 1, 2, 2), Layout((2, 3, 0, 1), 1, 2, 2), [(0, 2), (1, 3)]),
    ],
)
def test_lines_of_devices(a, b, lines):
    roles = roles_of(a, b)
    assert devices(roles) == lines
    for line in lines:
        for place, rank in enumerate(line):
            assert roles["actor"].stage(rank) == place % a.pipeline
            assert roles["critic"].stage(rank) == b.pipeline - 1 - place % b.pipeline


@pytest.mark.parametrize(
    "a, b, why",
    [
        (Layout((0, 1), pipeline=2), Layout((0, 1), pipeline=2), "the mesh [1, 0]"),
        (Layout((0, 1, 2, 3), pipeline=4), Layout((0, 2, 1, 3), 2, pipeline=2), "the mesh [1, 3, 0, 2]"),
        (Layout((0, 1, 2, 3), pipeline=4), Layout((2, 1, 0, 3), 2, pipeline=2), "the mesh [1, 3, 0, 2]"),
        (Layout((0, 2, 1, 3), 2, pipeline=2), Layout((2, 1, 0, 3), 2, pipeline=2), "the mesh [1, 3, 0, 2]"),
        (Layout((0, 1, 2, 3), pipeline=4), Layout((3, 1, 2, 0), pipeline=4), "the mesh [3, 2, 1, 0]"),
        (Layout((0, 1, 2), pipeline=3), Layout((1, 0), pipeline=2), "rank 2 trains the actor alone"),
        (Layout((0, 1), pipeline=2), Layout((1, 0, 2, 3), pipeline=4), "rank 2 trains the critic alone"),
    ],
)
def test_why_roles_cannot_be_fused(a, b, why):
    with pytest.raises(CannotFuse) as error:
        devices(roles_of(a, b))
    assert why in str(error.value)
    if "mesh" in why:
        fitting = tuple(int(each) for each in why[why.index("[") + 1 : -1].split(", "))
        devices(roles_of(a, Layout(fitting, b.data, pipeline=b.pipeline)))
    one_forward_one_backward(roles_of(a, b)), serial(roles_of(a, b))


@pytest.mark.parametrize("stages", itertools.product((1, 2, 4), repeat=2))
def test_every_mesh_of_four_ranks_is_fused_where_the_roles_run_against_each_other(stages):
    """A line is there where pipelines of the first role, in some sequence, are pipelines of the second, reversed."""
    a, b = stages
    first = Layout((0, 1, 2, 3), 4 // a, pipeline=a)
    fusing = 0
    for mesh in itertools.permutations(range(4)):
        roles = roles_of(first, Layout(mesh, 4 // b, pipeline=b))
        sequences = [sum(pipelines, ()) for pipelines in itertools.permutations(roles["actor"].ranks)]
        reversed_pieces = [{each[start : start + b][::-1] for start in range(0, 4, b)} for each in sequences]
        if set(roles["critic"].ranks) in reversed_pieces:
            fusing += 1
            assert sorted(sum(devices(roles), ())) == [0, 1, 2, 3]
        else:
            with pytest.raises(CannotFuse):
                devices(roles)
    assert 0 < fusing <= 24


def test_it_takes_two():
    with pytest.raises(CannotFuse, match="two roles, and here train actor"):
        devices({"actor": Pipelines.of(Layout((0, 1), pipeline=2), 1)})


PROBLEM = SchedulingProblem(Pipeline(4, 5, 2, 4, 1), Pipeline(2, 3, 3, 5, 1))
LAYOUTS = Layout((6, 5, 4, 7), pipeline=4), Layout((5, 7, 6, 4), 2, pipeline=2)


def seconds(rank, operation):
    return PROBLEM.times(("actor", "critic").index(operation.role), LAYOUTS[0].mesh.index(rank))[operation.kind]


def test_a_schedule_keeps_its_times_on_ranks():
    roles = roles_of(*LAYOUTS, (5, 3))
    schedule = find_schedule(PROBLEM, effort=20_000).schedule
    events = timeline(fused(roles, schedule), seconds)
    ranks = LAYOUTS[0].mesh
    assert {(each.rank, *each.operation, each.start, each.end) for each in events} == {
        (ranks[each.device], ("actor", "critic")[each.model], *each[2:6]) for each in schedule.operations
    }
    assert [each.start for each in events] == sorted(each.start for each in events)


def test_1f1b_is_the_planners():
    orders = one_forward_one_backward(roles_of(*LAYOUTS, (5, 3)))
    for device, rank in enumerate(LAYOUTS[0].mesh):
        planned = [*planned_1f1b(PROBLEM, 0, device), *planned_1f1b(PROBLEM, 1, device)]
        assert [(("actor", "critic").index(each.role), each.kind) for each in orders.by_rank[rank]] == planned
    without_barrier = timed(PROBLEM, [[*planned_1f1b(PROBLEM, 0, d), *planned_1f1b(PROBLEM, 1, d)] for d in range(4)])
    assert makespan(timeline(orders, seconds)) == without_barrier.makespan <= serial_1f1b(PROBLEM).makespan


@pytest.mark.parametrize("seed", range(5))
def test_random_orders_are_no_shorter_than_their_work(seed):
    orders = random_orders(roles_of(*LAYOUTS, (5, 3)), seed)
    events = timeline(orders, seconds)
    assert makespan(events) >= 5 * 6 + 3 * 8
    known = {(each.rank, each.operation): each for each in events}
    for each in events:
        needed = orders.needed(each.rank, each.operation)
        assert needed is None or known[needed].end <= each.start


TWO = roles_of(Layout((0, 1), pipeline=2), Layout((1, 0), pipeline=2), (1, 1))


def orders(*rows):
    """Of ranks 0 and 1: `aF0` is the forward of the actor's first micro-batch."""
    names = {"a": "actor", "c": "critic"}
    return {
        rank: [Operation(names[each[0]], "FB".index(each[1]), int(each[2:])) for each in row.split()]
        for rank, row in enumerate(rows)
    }


@pytest.mark.parametrize(
    "rows, why",
    [
        (("cF0 aF0 aB0 cB0", "aF0 aB0 cF0 cB0"), "wait for each other: rank 0 for forward 0 of critic"),
        (("aF0 cF0 aB0 cB0", "cF0 cB0 aF0 aB0"), "wait for each other: rank 0 for backward 0 of actor"),
        (("aB0 aF0 cF0 cB0", "aF0 aB0 cF0 cB0"), "wait for each other: rank 0 for backward 0 of actor"),
        (("aF0 aB0 cF0 cB0", "aB0 aF0 cF0 cB0"), "wait for each other: rank 0 for backward 0 of actor"),
        (("aF0 aB0 cF0", "aF0 aB0 cF0 cB0"), r"rank 0 does the backwards \[\] of critic"),
        (("aF0 aB0 cF0 cB0 cB0", "aF0 aB0 cF0 cB0"), r"rank 0 does the backwards \[0, 0\] of critic"),
        (("aF1 aB0 cF0 cB0", "aF0 aB0 cF0 cB0"), r"rank 0 does the forwards \[1\] of actor"),
        (("aF0 aB0 cF0 cB0",), "rank 1 has no order"),
        (("aF0 aB0 cF0 cB0", "aF0 aB0 cF0 cB0", "aF0"), "rank 2 has no forward of actor"),
    ],
)
def test_what_cannot_be_computed_is_refused(rows, why):
    Orders(TWO, orders("aF0 cF0 cB0 aB0", "cF0 aF0 aB0 cB0"))
    with pytest.raises(ImpossibleSchedule, match=why):
        Orders(TWO, orders(*rows))


@pytest.mark.parametrize(
    "problem, why",
    [
        (SchedulingProblem(Pipeline(2, 1, 1, 2, 1), Pipeline(1, 1, 1, 2, 1)), "1 stages and 1 micro-batches of critic"),
        (SchedulingProblem(Pipeline(2, 2, 1, 2, 1), Pipeline(2, 1, 1, 2, 1)), "2 stages and 2 micro-batches of actor"),
        (SchedulingProblem(Pipeline(4, 1, 1, 2, 1), Pipeline(2, 1, 1, 2, 1)), "4 stages and 1 micro-batches of actor"),
        (split_problem(SchedulingProblem(Pipeline(2, 1, 1, 2, 1), Pipeline(2, 1, 1, 2, 1))), "weight of actor"),
    ],
)
def test_a_schedule_of_something_else_is_refused(problem, why):
    with pytest.raises(ImpossibleSchedule, match=why):
        fused(TWO, find_schedule(problem, effort=2_000).schedule)
