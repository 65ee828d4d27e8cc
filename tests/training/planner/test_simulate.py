"""Two evaluators that share nothing but plan and costs; bounds; a schedule by hand."""

import itertools
from collections.abc import Sequence

import pytest

from tests.training.planner.events import makespan_by_events
from training.calls import ACTOR_TRAIN, DataflowGraph
from training.planner.reallocation_cost import After, AugmentedGraphs, Node
from training.planner.search import estimate
from training.planner.table import ITERATIONS, IterationSchedule, list_schedule


def node(name: str, seconds: float, ranks: set[int], *after: After) -> Node:
    return Node(name, "call", ACTOR_TRAIN, seconds, frozenset(ranks), after)


def busy_seconds(schedule: IterationSchedule) -> dict[int, float]:
    busy: dict[int, float] = {}
    for interval in schedule.intervals:
        for rank in interval.node.ranks:
            busy[rank] = busy.get(rank, 0.0) + interval.node.seconds
    return busy


def test_a_schedule_by_hand():
    nodes = (
        node("generate", 4, {0, 1}, After("actor", 1)),
        node("reward", 2, {0}, After("generate")),
        node("critic", 3, {1}, After("generate"), After("train", 1)),
        node("actor", 5, {0}, After("reward"), After("critic")),
        node("train", 1, {1}, After("reward"), After("critic")),
    )
    schedule = list_schedule(nodes, iterations=2)
    starts = {(i.node.name, i.iteration): i.start for i in schedule.intervals}
    assert [starts[name.name, 0] for name in nodes] == [0, 4, 4, 7, 7]
    assert [starts[name.name, 1] for name in nodes] == [12, 16, 16, 19, 19]
    assert schedule.makespan == 24 and schedule.iteration_seconds == 12
    assert busy_seconds(schedule) == {0: 22, 1: 16}
    assert makespan_by_events(nodes, 2) == 24


def test_nodes_without_ranks_overlap_with_everything():
    nodes = (
        node("a", 2, {0}),
        node("transfer", 5, set(), After("a")),
        node("b", 4, {0}),
        node("c", 1, {1}, After("transfer")),
    )
    assert list_schedule(nodes, 1).makespan == makespan_by_events(nodes, 1) == 8


def test_iterations_that_do_not_overlap_wait_for_all_training(two_nodes, random_plans):
    apart = AugmentedGraphs(DataflowGraph(two_nodes.graph.calls, iterations_overlap=False), two_nodes.costs)

    def begins_early(graphs: AugmentedGraphs, plan) -> bool:
        intervals = list_schedule(graphs.nodes(plan), 2).intervals
        trained = max(i.end for i in intervals if (i.iteration, i.node.call.kind) == (0, "train"))
        return min(i.start for i in intervals if i.iteration == 1) < trained - 1e-9

    assert not any(begins_early(apart, plan) for plan in random_plans)
    assert any(begins_early(two_nodes, plan) for plan in random_plans)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_both_evaluators_agree_on_random_plans(two_nodes, random_plans, iterations):
    for plan in random_plans:
        nodes = two_nodes.nodes(plan)
        assert list_schedule(nodes, iterations).makespan == pytest.approx(makespan_by_events(nodes, iterations))


def test_no_schedule_beats_its_bounds(two_nodes, random_plans):
    for plan in random_plans:
        nodes = two_nodes.nodes(plan)
        schedule = list_schedule(nodes)
        assert schedule.makespan >= critical_path(nodes) - 1e-9
        assert schedule.makespan >= max(busy_seconds(schedule).values()) - 1e-9


def test_no_rank_does_two_things_at_once(two_nodes, random_plans):
    for plan in random_plans[:10]:
        intervals = list_schedule(two_nodes.nodes(plan)).intervals
        for rank in range(8):
            mine = sorted((i.start, i.end) for i in intervals if rank in i.node.ranks)
            assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(mine))


def test_an_estimate_adds_the_controllers_time(two_nodes, random_plans):
    found = estimate(random_plans[0], two_nodes)
    assert found.iteration_seconds == pytest.approx(found.schedule.makespan / 5 + 6 * 0.01)
    assert found.peak_bytes == max(memory.peak("device") for memory in found.memory.values())


def critical_path(nodes: Sequence[Node], iterations: int = ITERATIONS) -> float:
    """Seconds of the longest chain of nodes that wait for each other, were every node alone on its ranks."""
    ends: dict[tuple[str, int], float] = {}
    for iteration in range(iterations):
        for node in nodes:
            ready = max((ends.get((a.name, iteration - a.iterations_back), 0.0) for a in node.after), default=0.0)
            ends[node.name, iteration] = ready + node.seconds
    return max(ends.values())
