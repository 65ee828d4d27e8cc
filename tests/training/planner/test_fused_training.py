"""Actor and critic in pipeline stages on the same ranks: which way they run, and what a fused schedule takes."""

from dataclasses import replace

import pytest

from tests.training.planner.conftest import graphs_on
from training.hybrid_engine.layout import Layout
from training.pipelines.orders import Pipelines, devices
from training.plan import Assignment, Plan
from training.planner.cost import CallCosts
from training.planner.footprint import Footprints
from training.planner.options import _pipeline, fused_training, turned
from training.planner.reallocation_cost import AugmentedGraphs
from training.planner.schedules.best import QUICK, find_schedule
from training.planner.schedules.problem import SchedulingProblem

FOUR = (0, 1, 2, 3)
GRAPHS = graphs_on(1, 4)
CALLS = {call.name: call for call in GRAPHS.graph.calls}


def plan(actor: Layout, critic: Layout, micro_batches: int = 4, **others: Layout) -> Plan:
    layouts = dict.fromkeys(CALLS, Layout(FOUR, 4)) | {"actor_train": actor, "critic_train": critic} | others
    return Plan({name: Assignment(each, micro_batches if "train" in name else 1) for name, each in layouts.items()})


@pytest.mark.parametrize(
    ("actor", "stages", "mesh"),
    [
        (Layout(FOUR, 2, pipeline=2), 2, (2, 3, 0, 1)),
        (Layout(FOUR, pipeline=4), 4, (3, 2, 1, 0)),
        (Layout(FOUR, pipeline=4), 2, (1, 3, 0, 2)),
        (Layout((3, 1), pipeline=2), 2, (1, 3)),
    ],
)
def test_the_critic_is_turned_with_its_calls_in_the_same_cut(actor, stages, mesh):
    ranks = tuple(sorted(actor.mesh))
    critic = Layout(ranks, len(ranks) // stages, pipeline=stages)
    found = turned(plan(actor, critic, critic_score=critic), GRAPHS.graph)
    assert found["actor_train"].layout == actor and found["reward_score"].layout == Layout(FOUR, 4)
    assert found["critic_train"].layout == found["critic_score"].layout == replace(critic, mesh=mesh)
    devices({role: Pipelines.of(found[f"{role}_train"].layout, 4) for role in ("actor", "critic")})
    assert turned(found, GRAPHS.graph) == found


@pytest.mark.parametrize(
    "critic", [Layout((0, 1), pipeline=2), Layout(FOUR, 4), Layout((4, 5, 6, 7), 2, pipeline=2), Layout(FOUR, 1, 2, 2)]
)
def test_nothing_turns_where_nothing_can_be_fused(critic):
    same = plan(Layout(FOUR, 2, pipeline=2), critic)
    assert turned(same, GRAPHS.graph) == same and fused_training(same, GRAPHS) is None


def test_a_schedule_as_short_as_predicted_is_found():
    """Stages of 14 and 10 layers: the head of the actor is worth two."""
    actor = Layout((0, 1), pipeline=2, layers=(14, 10))
    found = turned(plan(actor, replace(actor, layers=()), 8), GRAPHS.graph)
    training = fused_training(found, GRAPHS)
    problem = SchedulingProblem(*(_pipeline(CALLS[name], found, GRAPHS) for name in ("actor_train", "critic_train")))
    assert find_schedule(problem, effort=QUICK).schedule.makespan * 4 == pytest.approx(training.fused, rel=0.02)
    by_stage = {name: GRAPHS.costs.micro_batch_by_stage(CALLS[name], found[name]) for name in CALLS if "train" in name}
    a, b = by_stage.values()
    assert a[0][0] / a[1][0] == pytest.approx(14 / (10 + 2.05), rel=0.03)
    busiest = 8 * max(sum((*a[rank], *b[1 - rank])) for rank in (0, 1))
    assert 4 * busiest * (1 - 1e-9) <= training.fused < training.serial
    calls = sum(GRAPHS.costs.cost(CALLS[name], found[name]).seconds for name in by_stage)
    assert 0.8 * calls < training.serial < calls  # which count updates, and bubbles as long as the slowest stage


def test_roles_that_run_the_same_way_or_find_no_room_are_not_fused():
    both = Layout((0, 1), pipeline=2)
    assert fused_training(plan(both, both), GRAPHS) is None
    against = turned(plan(both, both), GRAPHS.graph)
    assert fused_training(against, GRAPHS) is not None
    held = max(
        memory.held("device") for memory in Footprints(GRAPHS.costs.workload, GRAPHS.graph).by_rank(against).values()
    )
    cluster = GRAPHS.costs.cluster
    full = replace(cluster, device=replace(cluster.device, memory=held))
    assert fused_training(against, AugmentedGraphs(GRAPHS.graph, CallCosts(GRAPHS.costs.workload, full))) is None
