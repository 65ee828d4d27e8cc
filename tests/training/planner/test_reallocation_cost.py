"""Reallocation between cuts, by hand; 0 only where layout and placement are equal."""

import itertools
import random

import numpy as np
import pytest
import torch

from tests.training.planner.conftest import graphs_on
from training.hybrid_engine.layout import Layout
from training.hybrid_engine.transfers import transfers
from training.plan import Assignment, Plan
from training.planner.hardware import Cluster
from training.planner.reallocation_cost import KINDS, SETUP_SECONDS, Shares, Traffic, bytes_by_kind, seconds_between

CLUSTER = Cluster.named("a100-80g", 2, 4)
LINK, NETWORK, COPY = 300e9 * 0.8, 25e9 * 0.8, 2 / (2039e9 * 0.8)
GB = 1e9
SIZES, LAYERS = GB * np.eye(KINDS)[0], 24


def seconds(source: Layout, target: Layout) -> float:
    return seconds_between(Assignment(source).cut, Assignment(target).cut, SIZES, CLUSTER, LAYERS)


def test_equal_cuts_on_equal_ranks_cost_nothing():
    node = (0, 1, 2, 3)
    assert seconds(Layout(node, 2, 2), Layout(node, 2, 2)) == 0
    assert seconds(Layout(node, 4, zero_stage=1), Layout(node, 4)) == 0  # it divides no weights
    assert seconds(Layout(node, 4, zero_stage=3), Layout(node, 4)) > 0
    even = Layout(node, 2, pipeline=2), Layout(node, 2, pipeline=2, layers=(12, 12))
    assert seconds(*even) == seconds(Layout(node, 4), Layout(node, 4, layers=(24,))) == 0
    assert seconds(even[0], Layout(node, 2, pipeline=2, layers=(11, 13))) > 0


def test_any_other_pair_costs_something(random_plans):
    cuts = {assignment.cut for plan in random_plans for assignment in plan.assignments.values()}
    for source in cuts:
        for target in list(cuts)[:40]:
            assert (seconds_between(source, target, SIZES, CLUSTER, LAYERS) == 0) == (source == target)


def test_placement_counts():
    """A defect of the released estimator: the mesh was not part of the key."""
    near, far = Layout((0, 1), tensor=2), Layout((4, 5), tensor=2)
    assert seconds(near, Layout((2, 3), tensor=2)) == pytest.approx(SETUP_SECONDS + GB / 2 / LINK + GB / 2 * COPY)
    assert seconds(near, far) == pytest.approx(SETUP_SECONDS + GB / NETWORK + GB / 2 * COPY)


def test_from_parts_to_whole_within_a_node():
    node = (0, 1, 2, 3)
    whole = SETUP_SECONDS + 3 / 4 * GB / LINK + GB * COPY
    assert seconds(Layout(node, tensor=4), Layout(node, 4)) == pytest.approx(whole)
    assert seconds(Layout(node, pipeline=4), Layout(node, 4)) == pytest.approx(whole)
    assert seconds(Layout(node, 4, zero_stage=3), Layout(node, 4)) == pytest.approx(whole)
    only_copied = SETUP_SECONDS + GB / 4 * COPY
    assert seconds(Layout(node, 4), Layout(node, tensor=4)) == pytest.approx(only_copied)


def test_over_nodes_each_node_receives_what_it_lacks_once():
    all_ = tuple(range(8))
    two_stages, copies = Layout(all_, 1, 4, 2), Layout(all_, 8)
    assert seconds(two_stages, copies) == pytest.approx(SETUP_SECONDS + GB / 2 / NETWORK + GB * COPY)
    assert seconds(copies, two_stages) == pytest.approx(SETUP_SECONDS + GB / 8 * COPY)


@pytest.mark.parametrize("is_tied", [True, False])
def test_bytes_are_those_that_the_runtime_moves(is_tied):
    """For a model whose sizes all divide, on aligned meshes, exactly; `transfers` is what the runtime executes. Under
    ZeRO 3 with tensor-parallel parts over two nodes what a node holds is no box; there only what ranks receive is."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from training.hybrid_engine.reallocation import weights_of
    from training.planner.workload import Model
    from training.shape import Shape

    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=is_tied,
    )  # fmt: skip
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    sizes = bytes_by_kind(Model(Shape.from_config_values(config.to_dict()), True), llama.dtype.itemsize)
    staged = [
        Layout((0, 1, 2, 3, 4, 5), 2, pipeline=3),
        Layout((4, 5, 6, 7, 0, 1, 2, 3), 2, 2, 2, layers=(1, 2)),
        Layout((5, 1), pipeline=2),
    ]
    layouts = [
        Layout(tuple(range(start, start + size)), size // tensor, tensor, zero_stage=stage)
        for size in (1, 2, 4, 8)
        for start in range(0, 8, size)
        for tensor in (1, 2, 4)
        if size % tensor == 0
        for stage in (0, 3)
        if stage == 0 or size > tensor
    ]
    pairs = [(a, b) for a, b in random.Random(2).sample([*itertools.product(layouts, repeat=2)], 8) if a != b]
    for one in staged:
        pairs += [(one, layouts[0]), (layouts[3], one), (one, layouts[-2]), (one, staged[staged.index(one) - 1])]
    sources, targets = (Shares.of([Assignment(pair[end]).cut for pair in pairs], CLUSTER, 3) for end in (0, 1))
    places = np.arange(len(pairs))
    traffic = Traffic.between(sources, places, targets, places, sizes)
    assert traffic.received.any(axis=1).mean() > 0.7 and traffic.imported.any(axis=1).mean() > 0.3
    for place, (source, target) in enumerate(pairs):
        weights = weights_of(llama, (source, target))
        moves = [m for layer in transfers(source, target, weights, 4) for m in layer if m.sender != m.receiver]
        received, imported = np.zeros(8), np.zeros(2)
        for move in moves:
            received[move.receiver] += move.bytes
            imported[move.receiver // 4] += move.bytes * (move.sender // 4 != move.receiver // 4)
        assert np.allclose(traffic.received[place], received), (source, target)
        if not any(
            layout.zero_stage == 3 and layout.tensor > 1 and len(layout.mesh) > 4 for layout in (source, target)
        ):
            assert np.allclose(traffic.imported[place], imported), (source, target)


def test_every_call_on_a_trained_role_is_charged(two_nodes, random_plans):
    """Another: only the last non-training layout was."""
    for plan in random_plans:
        nodes = {node.name: node for node in two_nodes.nodes(plan)}
        for role, use in (("actor", "actor_generate"), ("critic", "critic_score")):
            differs = plan[use].cut != plan[f"{role}_train"].cut
            assert (f"reallocate for {use}" in nodes) == differs
            if differs:
                assert nodes[f"reallocate for {use}"].seconds >= SETUP_SECONDS
                both = {*plan[use].layout.mesh, *plan[f"{role}_train"].layout.mesh}
                assert nodes[f"reallocate for {use}"].ranks == both


def test_transfers_and_loading_are_nodes_of_their_own():
    graphs = graphs_on(1, 4)
    one, other = Assignment(Layout((0,))), Assignment(Layout((1,)), offload=True)
    names = [call.name for call in graphs.graph.calls]
    mixed = Plan({name: other if name == "reward_score" else one for name in names})
    nodes = {node.name: node for node in graphs.nodes(mixed)}
    assert nodes["actor_generate -> reward_score"].kind == "transfer"
    assert nodes["reward_score -> actor_train"].ranks == frozenset()
    assert "actor_generate -> critic_score" not in nodes
    loading = nodes["load for reward_score"]
    size = graphs.costs.workload.models["reward"].parameters * 2
    assert loading.seconds == pytest.approx(size / (25e9 * 0.8)) and loading.ranks == {1}
    assert [after.name for after in nodes["reward_score"].after] == ["load for reward_score"]
