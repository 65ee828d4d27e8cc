"""Bytes by hand."""

from dataclasses import replace

import pytest

from inference.errors import UserError
from tests.training.planner.conftest import LARGE, SMALL, graphs_on, ppo_workload
from training.hybrid_engine.layout import Layout, StageCut
from training.plan import Assignment, Plan
from training.planner.footprint import Footprints
from training.planner.hardware import GIB
from training.planner.search import megatron_plan

GRAPHS = graphs_on(1, 8)
FOOTPRINTS = Footprints(GRAPHS.costs.workload, GRAPHS.graph)
CALLS = {call.name: call for call in GRAPHS.graph.calls}
P, V = LARGE.parameters, 50272
EIGHT = tuple(range(8))


def parts(name: str, layout: Layout, micro_batches: int = 1, own_weights: bool = True, offload: bool = False):
    found = FOOTPRINTS.parts(CALLS[name], Assignment(layout, micro_batches, offload), own_weights)
    return {(part.name, part.location, bool(part.phase)): part.bytes for part in found}


def test_training_on_two_tensor_ranks_of_two_stages_with_divided_optimiser_states():
    found = parts("actor_train", Layout(EIGHT, 2, 2, 2, zero_stage=1), 4)
    tokens, layer = (64 // 4 // 2 // 4) * 256, 4 * 2048 + 4 * 2048 + 2 * 8192
    stage = (P + V * 2048) // 2  # embedding and output matrix are one, which both stages have
    assert found == {
        ("actor weights", "device", False): 2 * stage // 2,
        ("actor gradients", "device", False): 2 * stage // 2,
        ("actor optimiser states", "device", False): 12 * stage // 2 // 2,
        ("activations", "device", True): 2 * (2 * tokens * 12 * 2048 + tokens * layer // 2),
        ("logits", "device", True): 2 * 128 * V * 16 // 2,
        ("actor weights, whole", "host", True): 4 * stage,
    }


def test_the_stage_that_holds_most_decides():
    """The actor's output matrix is its embedding, the critic has none."""
    layer, embedding = 12 * 1024**2, V * 1024
    assert LARGE.stage(StageCut(1, (20, 4))).parameters == 4 * 12 * 2048**2 + V * 2048
    for runs, most in (((12, 12), 12 * layer + embedding), ((8, 16), max(8 * layer + embedding, 16 * layer))):
        found = parts("critic_score", Layout((0, 1), pipeline=2, layers=runs))
        assert found["critic weights, a copy", "device", True] == 2 * most


def test_generation_keeps_a_copy_and_the_cache():
    found = parts("actor_generate", Layout(EIGHT, 2, 4), 2)
    assert found["actor weights, a copy", "device", True] == 2 * P // 4
    assert found["key-value cache", "device", True] == 16 * 256 * 24 * 2 * 2048 * 2 // 4
    assert found["logits", "device", True] == 16 * V * 24 // 4
    assert not any(name == "actor weights" for name, *_ in found)


def test_waves_of_generation_share_the_cache_and_stages_do_not():
    one, waves, stages = (
        parts("actor_generate", Layout((0, 1), 2 // p, pipeline=p), m) for p, m in [(1, 1), (1, 4), (2, 4)]
    )
    cache = ("key-value cache", "device", True)
    assert one[cache] == 4 * waves[cache] == 2 * stages[cache]  # twice the rows, half the layers, 2 of 4 parts alive


def test_offloaded_weights_are_on_the_device_while_they_are_used():
    found = parts("reward_score", Layout((0, 1), tensor=2), offload=True)
    assert found["reward weights, on the host", "host", False] == SMALL.parameters
    assert found["reward weights", "device", True] == SMALL.parameters
    assert ("logits", "device", True) not in found
    divided = parts("reward_score", Layout((0, 1), 2, zero_stage=3))
    assert divided["reward weights", "device", False] == SMALL.parameters
    assert divided["weights gathered by ZeRO, at most", "device", True] == 2 * SMALL.parameters


def test_a_rank_needs_what_is_held_and_the_largest_call():
    one, two = Assignment(Layout((0,))), Assignment(Layout((1,)))
    plan = Plan({name: two if "critic" in name or "reward" in name else one for name in CALLS})
    by_rank = FOOTPRINTS.by_rank(plan)
    assert set(by_rank) == {0, 1}
    assert by_rank[0].held("device") == 18 * P  # actor 16, reference 2
    assert by_rank[1].held("device") == 18 * SMALL.parameters
    phases = by_rank[0].phases("device")
    assert set(phases) == {"actor_generate", "reference_score", "actor_train"}
    assert by_rank[0].peak("device") == 18 * P + max(phases.values())


def test_generation_holds_the_samples_that_it_decodes_together():
    two = Layout((0, 1), 2)
    for limit, rows in ((8, 8), (100, 32), (0, 16)):  # of 32 samples of a data rank
        parts = FOOTPRINTS.parts(CALLS["actor_generate"], Assignment(two, 2, micro_batch_limit=limit), False)
        found = {part.name: part.bytes for part in parts}
        assert found["key-value cache"] == rows * 256 * 24 * 2 * 2048 * 2
        assert found["logits"] == rows * V * 24


def test_with_adapters_the_reference_is_the_actor_in_its_cut():
    graphs = graphs_on(1, 8, workload=ppo_workload(lora_rank=8))
    footprints, both = Footprints(graphs.costs.workload, graphs.graph), dict.fromkeys(CALLS, Assignment(Layout((0,))))
    actor, others = 16 * P, 16 * SMALL.parameters + 2 * SMALL.parameters
    for reference, held in (
        (Assignment(Layout((0,)), 4), [actor + others]),
        (Assignment(Layout((0,)), offload=True), [actor + others]),
        (Assignment(Layout((1,))), [actor + others, 2 * P]),
    ):
        by_rank = footprints.by_rank(Plan(both | {"reference_score": reference}))
        assert [memory.held("device") for memory in by_rank.values()] == held
        is_loaded = "reference loading" in by_rank[reference.layout.mesh[0]].phases("host")
        assert is_loaded == (reference.offload or len(held) > 1)


def test_models_are_loaded_in_main_memory_role_after_role():
    two = Layout((0, 1), 2)
    divided, plan = Layout((0, 1), 2, zero_stage=3), dict.fromkeys(CALLS, Assignment(two))
    cluster = GRAPHS.costs.cluster
    assert FOOTPRINTS.host_peak(Plan(plan), cluster) == 2 * 4 * P  # both ranks read the actor in fp32
    plan |= {"actor_train": Assignment(divided), "actor_generate": Assignment(two)}
    assert FOOTPRINTS.host_peak(Plan(plan), cluster) == 2 * 2 * P  # then the reference takes most
    plan |= {"reference_score": Assignment(divided)}
    assert FOOTPRINTS.host_peak(Plan(plan), cluster) == max(2 * P, 2 * 4 * SMALL.parameters)  # one rank reads it
    small = replace(cluster, host_memory=GIB)
    with pytest.raises(UserError, match=r"GiB of a node's main memory, which has 1\.0, to load models"):
        FOOTPRINTS.require_fit(Plan(plan), small)


def test_a_plan_that_does_not_fit_names_the_rank_and_the_part():
    cluster = graphs_on(1, 1, "rtx-4090").costs.cluster
    with pytest.raises(UserError, match=r"GiB on rank 0, of which actor optimiser states .* but 22.1 GiB can be used"):
        FOOTPRINTS.require_fit(megatron_plan(GRAPHS.graph, cluster), cluster)
    FOOTPRINTS.require_fit(megatron_plan(GRAPHS.graph, GRAPHS.costs.cluster), GRAPHS.costs.cluster)
