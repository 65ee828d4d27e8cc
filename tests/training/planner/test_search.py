"""The search against all plans one by one; the table against simulator and footprints."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.realhf_table import PUBLISHED
from inference.errors import UserError
from tests.training.planner.conftest import Plans, graphs_on, ppo_workload
from tests.training.planner.exhaustive import best_plan
from training.calls import DataflowGraph, with_recomputed_logprobs
from training.plan_checks import problems
from training.planner.cost import CallCosts
from training.planner.options import Options
from training.planner.reallocation_cost import AugmentedGraphs
from training.planner.search import estimate, search
from training.planner.table import UNDECIDED, PlanTable

EFFORT = 0.1
PUBLISHED_ON_TWO = replace(PUBLISHED, smallest_mesh=1)


@pytest.fixture(scope="module")
def table(two_nodes):
    return PlanTable(two_nodes)


def draw_choices(table, count=200):
    draw = np.random.default_rng(0)
    return np.stack([draw.integers(len(column.options), size=count) for column in table.columns])


@pytest.fixture(scope="module")
def random_choices(table):
    return draw_choices(table)


@pytest.mark.parametrize("overlap", [True, False])
def test_the_table_gives_the_simulators_seconds_and_the_footprints_bytes(two_nodes, random_choices, overlap):
    two_nodes = AugmentedGraphs(DataflowGraph(two_nodes.graph.calls, overlap), two_nodes.costs)
    require_like_estimates(PlanTable(two_nodes), random_choices, two_nodes)


def require_like_estimates(table, choices, graphs):
    seconds, fullness = table.evaluate(choices)
    for i in range(choices.shape[1]):
        found = estimate(table.plan(choices[:, i]), graphs)
        assert seconds[i] == pytest.approx(found.iteration_seconds)
        assert fullness[i] == pytest.approx(found.peak_bytes / graphs.costs.cluster.usable_memory)


def test_weights_are_brought_once_for_calls_in_one_cut():
    found = graphs_on(1, 2)
    graphs = AugmentedGraphs(DataflowGraph(with_recomputed_logprobs(found.graph.calls)), found.costs)
    table, score = PlanTable(graphs), graphs.graph.call("actor_score")
    choices, moved = draw_choices(table, 100), [0, 0]
    for plan in map(table.plan, choices.T):
        brought = [node.call.name for node in graphs.nodes(plan) if node.kind == "reallocation"]
        shares = plan["actor_generate"].cut == plan["actor_score"].cut
        assert ("actor_score" in brought) == (plan.reallocates(graphs.graph, score) and not shares)
        moved["actor_generate" in brought and shares] += 1
    assert min(moved) > 5
    require_like_estimates(table, choices, graphs)


def test_a_reference_beside_adapters_needs_weights_of_its_own_only_in_another_cut_or_on_the_host():
    graphs = graphs_on(1, 2, workload=ppo_workload(lora_rank=8))
    table, lora = PlanTable(graphs), graphs.costs.workload.models["actor"].lora
    choices = draw_choices(table, 100)
    shared = [table.plan(choice).actor_is_reference(lora) for choice in choices.T]
    assert 5 < sum(shared) < 95
    zero_3 = [plan["reference_score"].layout.zero_stage == 3 for plan in map(table.plan, choices.T)]
    assert any(a and b for a, b in zip(shared, zero_3, strict=True))
    require_like_estimates(table, choices, graphs)


def test_generation_is_offered_no_more_slots_than_the_settings_have(two_nodes):
    workload = replace(two_nodes.costs.workload, generation_batch=5)
    options = Options(graphs_on(1, 2, workload=workload))
    call = options.graph.call("actor_generate")
    found = list(options.candidates(call, (0, 1)))
    slots = {one.micro_batch_limit for one in found if one.layout.pipeline == 1}
    assert slots == {5, 3, 2, 1}
    for one in found:
        assert one.layout.pipeline > 1 or one.micro_batches == -(-64 // one.layout.data // one.micro_batch_limit)


def test_nothing_waits_in_main_memory_where_ranks_work_in_it(two_nodes):
    costs = two_nodes.costs
    device = replace(costs.cluster.device, host_bandwidth=costs.cluster.device.memory_bandwidth)  # a CPU's profile
    on_cpu = CallCosts(costs.workload, replace(costs.cluster, device=device))
    for graphs, waits in ((two_nodes, True), (AugmentedGraphs(two_nodes.graph, on_cpu), False)):
        options = Options(graphs)
        found = options.candidates(graphs.graph.call("reward_score"), (0, 1))
        assert any(one.offload for one in found) == waits


def test_an_undecided_call_never_costs_more_than_a_decided_one(table, random_choices):
    seconds, fullness = table.evaluate(random_choices)
    for call in range(len(table.columns)):
        partial = random_choices.copy()
        partial[call] = UNDECIDED
        less, emptier = table.evaluate(partial)
        assert (less <= seconds + 1e-12).all() and (emptier <= fullness + 1e-12).all()


def test_leaving_out_dominated_options_loses_no_best_plan():
    """Every candidate of every call of a small graph, one by one, against the table."""
    graphs = graphs_on(1, 2, "a100-40g", algorithm="dpo")
    limit = graphs.costs.cluster.usable_memory
    best = float("inf")
    for plan in Plans(graphs).all():
        found = estimate(plan, graphs)
        if found.peak_bytes <= limit:
            best = min(best, found.iteration_seconds)
    table = PlanTable(graphs)
    assert search(table, effort=EFFORT)[0].seconds == pytest.approx(best)


@pytest.mark.parametrize(("device", "algorithm"), [("a100-80g", "grpo"), ("v100", "grpo"), ("a100-40g", "ppo")])
def test_branch_and_bound_finds_what_trying_all_plans_finds(device, algorithm):
    """Begun with a poor plan."""
    table = PlanTable(graphs_on(1, 2, device, algorithm=algorithm), PUBLISHED_ON_TWO)
    grid = np.stack([axis.ravel() for axis in np.indices([len(c.options) for c in table.columns])])
    seconds, fullness = table.evaluate(grid)
    poor = search(table, progress=lambda _: False)[-1]
    best = seconds[fullness <= 1].min()
    assert best_plan(table, poor).seconds == pytest.approx(best) and poor.seconds > 1.01 * best


@pytest.mark.parametrize("device", ["a100-80g", "a100-40g", "v100"])
@pytest.mark.parametrize("samples", [64, 512])
def test_a_node_of_four_is_solved_exactly(device, samples):
    table = PlanTable(graphs_on(1, 4, device, ppo_workload(samples)))
    found = search(table, seed=1, effort=EFFORT)[0]
    assert found.seconds == pytest.approx(best_plan(table, found).seconds, rel=1e-9)


def test_the_same_seed_gives_the_same_plans(table):
    one, two = (search(table, seed=3, effort=EFFORT) for _ in range(2))
    assert one == two


def test_the_ten_best_are_valid_plans_that_fit_best_first(two_nodes, table):
    found = search(table, effort=EFFORT)
    assert len(found) == 10
    assert [f.seconds for f in found] == sorted({f.seconds for f in found})
    cluster = two_nodes.costs.cluster
    for one in found:
        assert problems(one.plan, two_nodes.graph, two_nodes.costs.workload, cluster.size) == []
        assert estimate(one.plan, two_nodes).peak_bytes <= cluster.usable_memory


def test_progress_can_end_the_search_at_any_time(table):
    seen = []

    def until_forty(progress):
        seen.append(progress)
        return progress.step < 40

    found = search(table, progress=until_forty)
    assert [p.step for p in seen] == list(range(1, 41))
    assert found[0].seconds == seen[-1].best_seconds
    assert seen[0].best_seconds >= seen[-1].best_seconds


def test_nothing_fits():
    with pytest.raises(UserError, match="No cut of 'actor_train' fits"):
        PlanTable(graphs_on(1, 1, "rtx-4090", ppo_workload(response_tokens=4096)))
    tight = PlanTable(graphs_on(1, 1, "rtx-4090"))
    with pytest.raises(UserError, match="No plan fits into 1 x 1 rtx-4090"):
        search(tight, effort=EFFORT)


def test_the_published_space_fixes_micro_batches_and_zero_stage(two_nodes):
    options = Options(two_nodes, PUBLISHED)
    for call in two_nodes.graph.calls:
        for option in options.of(call):
            layout, micro_batches = option.assignment.layout, option.assignment.micro_batches
            assert len(layout.mesh) >= 4
            stages = layout.pipeline
            assert micro_batches == (2 * stages if call.kind == "train" and stages > 1 else stages)
            if call.kind == "train":
                assert layout.zero_stage == (1 if layout.data > 1 else 0)


def test_one_device_and_a_node_of_three():
    for nodes, devices in ((1, 1), (1, 3), (3, 1)):
        found = search(PlanTable(graphs_on(nodes, devices, workload=ppo_workload(48))), effort=EFFORT)
        assert found[0].fullness <= 1
