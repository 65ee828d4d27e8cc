"""Seconds against sums by hand, and what must hold for any cost model."""

from dataclasses import replace

import pytest

from tests.training.planner.conftest import LARGE, graphs_on, ppo_workload
from training.hybrid_engine.layout import Layout
from training.plan import Assignment
from training.planner.cost import CallCosts, links_of
from training.planner.hardware import DEVICES, Cluster
from training.planner.workload import Workload
from training.role_settings import LoRASettings

ONE = Assignment(Layout((0,)))
GRAPHS = graphs_on(1, 8)
CALLS = {call.name: call for call in GRAPHS.graph.calls}
LAYER, HEAD = 12 * 2048**2, 50272 * 2048
LAYERS_SHARE = 24 * LAYER / (24 * LAYER + HEAD)  # of an actor's arithmetic; a critic has no output matrix
FLOPS, READ = 312e12 * 0.5, 2039e9 * 0.8  # conftest's calibration


def cost(name: str, assignment: Assignment, **changes):
    return CallCosts(replace(ppo_workload(), **changes), GRAPHS.costs.cluster).cost(CALLS[name], assignment)


def test_scoring_on_one_device_by_hand():
    tokens = 64 * 256
    found = cost("reference_score", ONE)
    assert found.arithmetic == pytest.approx(2 * (24 * LAYER + HEAD) * tokens / FLOPS)
    assert found.attention == pytest.approx(4 * 24 * 2048 * tokens * 128 / FLOPS)
    assert found.seconds == pytest.approx(found.arithmetic + found.attention)  # launches hide behind them


def test_training_is_four_forward_passes_and_an_update_a_mini_batch():
    found, forward = cost("actor_train", ONE), cost("reference_score", ONE)
    assert found.arithmetic == pytest.approx(4 * forward.arithmetic)
    assert cost("actor_train", ONE, checkpointing=False).arithmetic == pytest.approx(3 * forward.arithmetic)
    assert found.optimizer == pytest.approx(4 * 34 * LARGE.parameters / READ)
    assert cost("actor_train", ONE, epochs=2).seconds == pytest.approx(2 * found.seconds)


def test_training_adapters_takes_no_gradients_of_the_matrices():
    """One linear layer of 4096 inputs + outputs has adapters: forward, recomputed forward, gradients of inputs."""
    shape = replace(LARGE, linears=(("q_proj", 4096),))
    lora = {"actor": LoRASettings(rank=8)}
    workload = Workload.of(dict.fromkeys(("actor", "reference", "critic", "reward"), shape), 64, 128, 128, lora=lora)
    costs = CallCosts(workload, GRAPHS.costs.cluster)
    found, forward = costs.cost(CALLS["actor_train"], ONE), costs.cost(CALLS["reference_score"], ONE)
    assert found.arithmetic == pytest.approx(3 * forward.arithmetic)
    assert found.optimizer == pytest.approx(4 * 34 * 8 * 4096 / READ)
    assert costs.cost(CALLS["critic_train"], ONE).arithmetic > 3.5 * forward.arithmetic * LAYERS_SHARE


def test_decode_steps_by_hand():
    found = cost("actor_generate", ONE)
    weights = (24 * LAYER + HEAD) * 2
    prefill = 2 * weights / 2 * 64 * 128 / FLOPS
    assert found.arithmetic == pytest.approx(prefill + 127 * weights / READ)
    assert found.launch == pytest.approx(127 * 25 * 1e-4)
    cache = 64 * (128 + 64) * 24 * 2 * 2048 * 2 / READ
    assert found.attention == pytest.approx(127 * cache + 4 * 24 * 2048 * 64 * 128 * 64 / FLOPS)


def test_pipeline_bubbles_by_hand():
    stages = Layout((0, 1, 2, 3), pipeline=4)
    for micro_batches in (4, 16):
        found = cost("actor_train", Assignment(stages, micro_batches))
        crossing = 5e-5 + 16 // micro_batches * 256 * 2048 * 2 / (300e9 * 0.8)
        sent = 4 * 2 * (micro_batches + 3) * crossing
        assert found.pipeline == pytest.approx(3 / micro_batches * (found.arithmetic + found.attention) + sent)


def test_unequal_stages_are_as_slow_as_the_slowest():
    """The head of this actor is worth two of its layers."""
    even, long_first, long_last = (
        cost("actor_train", Assignment(Layout((0, 1), pipeline=2, layers=runs), 16)).arithmetic
        for runs in ((), (14, 10), (10, 14))
    )
    assert long_first / even == pytest.approx(14 * LAYER / (12 * LAYER + HEAD))
    assert long_last / even == pytest.approx((14 * LAYER + HEAD) / (12 * LAYER + HEAD))


def test_generation_in_a_pipeline_is_as_slow_as_its_last_stage():
    one, four = (cost("actor_generate", Assignment(Layout((0, 1, 2, 3), data=4 // p, pipeline=p), p)) for p in (1, 4))
    assert one.launch == pytest.approx(127 * 25 * 1e-4)
    assert four.launch == pytest.approx(127 * 4 * (6 + 1) * 1e-4)


def test_the_longest_response_decides_how_long_decoding_takes():
    skewed = cost("actor_generate", ONE, response_tokens=32, longest_response=128)
    assert skewed.launch == cost("actor_generate", ONE).launch
    assert skewed.attention < cost("actor_generate", ONE).attention


def test_slots_are_filled_again_as_samples_end():
    """16 samples at a time of 64: three waves last as long as a mean response, the last one as the longest."""
    slots = Assignment(Layout((0,)), micro_batch_limit=16)
    found = cost("actor_generate", slots, response_tokens=32, longest_response=128)
    steps = 3 * 32 + 128 - 4
    assert found.launch == pytest.approx(steps * 25 * 1e-4)
    alone = cost("actor_generate", ONE, response_tokens=32, longest_response=128)
    assert found.attention == pytest.approx(alone.attention, rel=0.05)  # the same keys and values are read
    assert found.seconds < cost("actor_generate", Assignment(Layout((0,)), 4), response_tokens=128).seconds / 2
    assert cost("actor_generate", slots) == cost("actor_generate", Assignment(Layout((0,)), 4))


def test_a_limit_of_tokens_is_filled_with_rows_of_the_mean_length():
    """512 tokens are two samples of 256, or four of 128; the plan counted on samples of 512."""
    tensor = Layout(tuple(range(8)), tensor=8)
    packed = Assignment(tensor, 16, micro_batch_limit=512)
    short = {"prompt_tokens": 64, "response_tokens": 64}
    for name, rows in (("actor_train", 16), ("reference_score", 64)):
        assert cost(name, packed) == cost(name, Assignment(tensor, rows // 2))
        assert cost(name, packed, **short) == cost(name, Assignment(tensor, rows // 4), **short)
        assert cost(name, packed, **short) != cost(name, Assignment(tensor, rows // 2), **short)


def test_a_replayed_decode_step_launches_less_and_nothing_else_changes():
    cluster = replace(GRAPHS.costs.cluster, calibration=replace(GRAPHS.costs.cluster.calibration, decode_seconds=1e-5))
    replayed, eager = CallCosts(ppo_workload(), cluster), CallCosts(ppo_workload(), GRAPHS.costs.cluster)
    for name, call in CALLS.items():
        fast, slow = replayed.cost(call, ONE), eager.cost(call, ONE)
        if name == "actor_generate":
            assert fast.launch == pytest.approx(127 * 25 * 1e-5) and slow.launch == pytest.approx(127 * 25 * 1e-4)
            assert slow.seconds - fast.seconds == pytest.approx(slow.launch - fast.launch)
        else:
            assert fast == slow


def test_responses_count_in_scoring_and_training():
    """A defect of the released estimator: the prompt's length taken for all."""
    for name in ("reward_score", "critic_train"):
        assert cost(name, ONE, response_tokens=384).seconds > 1.9 * cost(name, ONE).seconds


def test_micro_batches_count():
    """Another: mini-batches forced to one."""
    tensor = Layout(tuple(range(8)), tensor=8)
    seconds = [cost("actor_train", Assignment(tensor, m)).seconds for m in (1, 4, 16)]
    assert seconds == sorted(seconds) and seconds[0] < seconds[-1]


def test_zero_stages_by_hand():
    weights, step = LARGE.parameters * 2, 4
    bandwidth = 300e9 * 0.8
    gathered = 7 / 8 * weights / bandwidth
    latency = 3 * 5e-5
    found = [cost("actor_train", Assignment(Layout(tuple(range(8)), 8, zero_stage=z), 2)) for z in range(4)]
    assert [c.gradients for c in found] == pytest.approx(
        [step * (latency + t * gathered) for t in (2, 1)] + [step * 2 * (latency + gathered)] * 2
    )
    assert [c.zero for c in found] == pytest.approx(
        [0, *[step * (latency + gathered)] * 2, step * 2 * 2 * (24 * latency + gathered)]
    )
    assert found[1].optimizer == pytest.approx(found[0].optimizer / 8)


def test_what_zero_sends_and_copies_on_ranks_without_gpus():
    """DeepSpeed flattens all gradients, from ZeRO 1 on out of a bucket, and then a rank's part."""
    shares = {"gather_share": 0.25, "scatter_share": 0.2, "reduce_share": 0.5, "copy_bandwidth": 1e9}
    cluster = GRAPHS.costs.cluster
    cluster = replace(cluster, calibration=replace(cluster.calibration, **shares, hook_seconds=1e-3))
    size, bandwidth, latency, step, parts = LARGE.parameters * 2, 300e9 * 0.8, 5e-5, 4, 2
    sent, copied = size / 2 / bandwidth, size / 1e9
    costs = CallCosts(replace(ppo_workload(), precision="fp16"), cluster)
    found = [costs.cost(CALLS["actor_train"], Assignment(Layout((0, 1), 2, zero_stage=z), parts)) for z in range(4)]
    written = parts * copied
    assert [c.gradients / step for c in found] == pytest.approx([
        written + copied + latency + 2 * sent,
        written + 2.5 * copied + latency + sent / 0.5 + copied / 2,
        written + parts * (2.5 * copied + latency + sent / 0.5) + copied / 2,
        written + parts * (2 * copied + latency + sent / 0.2) + copied / 2,
    ])  # fmt: skip
    gathered = 24 * latency + sent / 0.25 + copied
    hooks = 2 * 24 * 1e-3
    assert [c.zero / step for c in found] == pytest.approx(
        [0, *[latency + sent / 0.25] * 2, parts * (2 * gathered + hooks)]
    )
    alone = costs.cost(CALLS["actor_train"], Assignment(Layout((0,)), parts))
    assert alone.gradients == pytest.approx(step * written) and alone.zero == 0
    scored = costs.cost(CALLS["reference_score"], Assignment(Layout((0, 1), 2, zero_stage=3), parts))
    assert scored.zero == pytest.approx(parts * (gathered + hooks / 2))


@pytest.mark.parametrize(("checkpointing", "most"), [(False, 1e9 / 2), (True, 1e9 / 3)])
def test_weights_of_a_small_model_stay_whole_until_its_backward_pass(checkpointing, most):
    """Under ZeRO 3 DeepSpeed keeps what is read again before 1e9 weights are passed."""
    zero_3 = Assignment(Layout((0, 1), 2, zero_stage=3), 2)
    for parameters, times in ((most - 1, 1), (most + 1, 2)):
        shape = replace(LARGE, parameters=int(parameters))
        roles = dict.fromkeys(("actor", "reference", "critic", "reward"), shape)
        workload = Workload.of(roles, 64, 128, 128, checkpointing=checkpointing, precision="fp16")
        costs = CallCosts(workload, GRAPHS.costs.cluster)
        once = costs.cost(CALLS["reference_score"], zero_3).zero
        assert costs.cost(CALLS["actor_train"], zero_3).zero == pytest.approx(4 * times * once)


def test_collectives_of_a_decode_step_wait_longer():
    cluster = GRAPHS.costs.cluster
    slow = replace(cluster, calibration=replace(cluster.calibration, decode_collective_seconds=2e-4))
    cut = Assignment(Layout((0, 1, 2, 3), tensor=4))
    for name, call in CALLS.items():
        before, after = (CallCosts(ppo_workload(), each).cost(call, cut) for each in (cluster, slow))
        longer = 127 * (2 * 24 + 3) * 2 * (2e-4 - 5e-5) if name == "actor_generate" else 0
        assert after.tensor_parallel - before.tensor_parallel == pytest.approx(longer)


def test_groups_share_the_network():
    cluster = Cluster.named("a100-80g", 2, 4)
    links = links_of(Layout(tuple(range(8)), 2, 4), cluster)
    assert links.tensor.bandwidth == pytest.approx(300e9 * 0.8)
    assert links.data.bandwidth == pytest.approx(25e9 / 4 * 0.8)  # four groups leave each node
    in_node = links_of(Layout(tuple(range(8)), 2, 2, 2), cluster)
    assert in_node.data.bandwidth == pytest.approx(300e9 * 0.8)
    assert in_node.hop.bandwidth == pytest.approx(25e9 / 4 * 0.8)


@pytest.mark.parametrize("what", ["memory_bandwidth", "link_bandwidth", "host_bandwidth", "network_bandwidth", "flops"])
def test_cost_falls_with_bandwidth(two_nodes, random_plans, what):
    cluster = two_nodes.costs.cluster
    if what == "network_bandwidth":
        faster = replace(cluster, network_bandwidth=2 * cluster.network_bandwidth)
    elif what == "flops":
        rates = {name: 2 * rate for name, rate in cluster.device.peak_flops.items()}
        faster = replace(cluster, device=replace(cluster.device, peak_flops=rates))
    else:
        faster = replace(cluster, device=replace(cluster.device, **{what: 2 * getattr(cluster.device, what)}))
    improved = type(two_nodes)(two_nodes.graph, CallCosts(two_nodes.costs.workload, faster))
    falls = 0
    for plan in random_plans:
        before, after = two_nodes.nodes(plan), improved.nodes(plan)
        assert all(a.seconds <= b.seconds + 1e-12 for a, b in zip(after, before, strict=True))
        falls += sum(a.seconds for a in after) < sum(b.seconds for b in before)
    assert falls > 0


def test_every_described_device_can_be_planned_for():
    for name in DEVICES:
        graphs = graphs_on(1, 1, name)
        assert all(graphs.costs.cost(call, ONE).seconds > 0 for call in graphs.graph.calls)
