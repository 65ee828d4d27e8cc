"""The memory estimate against numbers worked out by hand."""

import json
from typing import Any

import pytest
import torch

from applications.preset_store import load_preset
from inference.errors import UserError
from training.config import RunConfig
from training.config_files import load_config
from training.memory import (
    SAMPLING_BYTES_PER_LOGIT,
    Part,
    StepMemory,
    _rlhf_parts,
    estimate_step_memory,
    rows_per_micro_batch,
    slots_in,
    training_parts,
    with_slots,
)
from training.plan import Plan
from training.role_settings import OptimizerSettings
from training.shape import Shape
from training.steps import DPO, PPO, REWARD, SFT

OPT_13B = 12_853_473_280
OPT_350M = 331_196_416
TOY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def opt_13b() -> Shape:
    return Shape.from_config_values(load_preset("opt-13b")["architecture"]["model"])


@pytest.fixture(scope="module")
def opt_350m() -> Shape:
    return Shape.from_config_values(load_preset("opt-13b")["architecture"]["reward_model"])


@pytest.fixture(scope="module")
def toy() -> Shape:
    return Shape.from_config_values(TOY)


def sizes(memory: StepMemory) -> dict[tuple[str, str], int]:
    return {(part.phase, part.name): part.bytes for part in memory.parts}


def opt_config(*overrides: str) -> RunConfig:
    return load_config([], list(overrides), load_preset("opt-13b"))


def test_opt_13b_counted_by_hand(opt_13b):
    h, f, v, positions, layers = 5120, 20480, 50272, 2050, 40  # OPT numbers its positions from 2
    layer = 4 * (h * h + h) + (h * f + f) + (f * h + h) + 2 * 2 * h  # attention, feed-forward, two norms
    assert opt_13b.parameters == v * h + positions * h + layers * layer + 2 * h == OPT_13B
    assert (opt_13b.layers, opt_13b.ffn, opt_13b.kv_heads, opt_13b.head_dim) == (40, 20480, 40, 128)
    assert not opt_13b.is_gated and opt_13b.output_matrix == 0


def test_opt_350m_has_projections_and_no_last_norm(opt_350m):
    h, f, v, e, layers = 1024, 4096, 50272, 512, 24
    layer = 4 * (h * h + h) + (h * f + f) + (f * h + h) + 2 * 2 * h
    assert opt_350m.parameters == v * e + 2050 * h + 2 * e * h + layers * layer == OPT_350M


def test_grouped_queries_gate_and_untied_output(toy):
    layer = 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 24 + 2 * 8  # q and o; k and v (2 heads of 2); gate, up, down; two norms
    assert toy.parameters == 2 * 32 * 8 + 2 * layer + 8
    assert toy.scorer_parameters == toy.parameters - 32 * 8
    assert (toy.kv_heads, toy.head_dim, toy.is_gated) == (2, 2, True)
    assert toy.cache_values(tokens=10) == 10 * 2 * 2 * 2 * 2  # tokens, layers, k and v, heads, head size


def test_adapters_are_counted_as_peft_makes_them(toy):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    for targets in ("all-linear", ["q_proj", "down_proj"], r".*\.1\..*gate_proj"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TOY))
        made = get_peft_model(model, LoraConfig(r=3, target_modules=targets)).get_nb_trainable_parameters()[0]
        assert toy.lora_parameters(3, targets) == made
    assert toy.lora_parameters(1, "all-linear") == 2 * (2 * 16 + 2 * 12 + 3 * 32)


def test_activations_by_hand(toy):
    layer = 4 * 8 + 2 * 8 + 2 * 4 + 4 * 24  # norms, attention and MLP inputs; q, output; k, v; gate factors
    assert toy.activation_values(tokens=5, checkpointing=False) == 5 * 2 * layer
    assert toy.activation_values(tokens=5, checkpointing=True) == 5 * (2 * 8 + layer)


@pytest.mark.parametrize(
    ("dtype", "stage", "expected"),  # bytes a parameter of weights, gradients, optimiser on each of 4 ranks
    [
        (torch.float32, 0, (4, 4, 8)),
        (torch.float32, 1, (4, 4, 3)),
        (torch.bfloat16, 0, (2, 4, 3)),  # the engine takes stage 1: 12 / 4
        (torch.bfloat16, 1, (2, 4, 3)),
        (torch.bfloat16, 2, (2, 1, 3)),
        (torch.bfloat16, 3, (0.5, 1, 3)),
        (torch.float16, 0, (2, 2, 3)),  # 12 / 4 too
        (torch.float16, 2, (2, 0.5, 3)),
    ],
)
def test_zero_divides_what_its_paper_says(opt_13b, dtype, stage, expected):
    settings = OptimizerSettings.model_validate({"zero_stage": stage})
    parts = training_parts("", OPT_13B, opt_13b, settings, dtype, ranks=4, phase="training")
    assert [part.bytes for part in parts[:3]] == [OPT_13B * share for share in expected]
    assert [part.name for part in parts[:3]] == ["weights", "gradients", "optimiser states"]


@pytest.mark.parametrize(("stage", "bytes_a_weight"), [(0, 2 + 2 + 4), (1, 2 + 2 + 6 / 4)])
def test_bf16_without_master_weights_holds_less(opt_13b, stage, bytes_a_weight):
    settings = OptimizerSettings(zero_stage=stage, master_weights=False)
    parts = training_parts("", OPT_13B, opt_13b, settings, torch.bfloat16, ranks=4, phase="training")
    held = sum(part.bytes for part in parts if not part.phase)
    assert held == pytest.approx(OPT_13B * bytes_a_weight)


def test_step_1_of_opt_13b_on_8_ranks(opt_13b, opt_350m):
    memory = estimate_step_memory(SFT, opt_config(), opt_13b, opt_350m, torch.bfloat16, ranks=8)
    tokens = 4096  # 8 rows of 512
    assert sizes(memory) == {
        ("", "weights"): OPT_13B * 2 // 8,
        ("", "gradients"): OPT_13B * 4 // 8,
        ("", "optimiser states"): OPT_13B * 12 // 8,
        ("loading", "weights, whole (first rank)"): OPT_13B * 2,
        ("training", "weights gathered by ZeRO, at most"): 2 * 10**9,
        ("training", "activations"): 2 * tokens * (40 * 5120 + 16 * 5120),
        ("training", "logits"): 16 * (8 * 256) * 50272,
        ("saving", "trained weights, fp32 (first rank)"): OPT_13B * 4,
        ("saving", "whole model, fp32 (first rank)"): OPT_13B * 4,
    }
    assert memory.held("device") == OPT_13B * 18 // 8
    passes = sum(bytes_ for (phase, _), bytes_ in sizes(memory).items() if phase == "training")
    assert memory.peak("device") == OPT_13B * 18 // 8 + passes  # no GPU ever holds the model whole
    assert memory.peak("device", "host") == OPT_13B * 18 // 8 + OPT_13B * 8
    assert memory.host_peak(processes=8) == OPT_13B * 8  # the first rank gathers and saves


def test_step_2_trains_the_scorer_on_pairs(opt_13b, opt_350m):
    config = opt_config("reward.micro_batch_tokens=600")  # not even one pair of 512: one pair is taken
    memory = sizes(estimate_step_memory(REWARD, config, opt_13b, opt_350m, torch.bfloat16, ranks=1))
    assert memory[("", "weights")] == 2 * OPT_350M
    assert memory[("training", "activations")] == 2 * 2 * 512 * 24 * 16 * 1024
    assert ("training", "logits") not in memory


@pytest.mark.parametrize("lora", [0, 8])
def test_a_reference_of_ones_own_has_its_own_size(opt_13b, opt_350m, lora):
    """Beside the actor in PPO; in DPO before the policy is loaded; both divided by ZeRO 3."""
    own = "reference_model=small", f"rlhf.actor.lora.rank={lora}", "dpo.optimizer.zero_stage=3"
    memory = estimate_step_memory(PPO, opt_config(*own), opt_13b, opt_350m, torch.bfloat16, ranks=8, reference=opt_350m)
    assert sizes(memory)[("", "reference weights")] == opt_350m.parameters * 2 // 8
    memory = estimate_step_memory(
        DPO, opt_config(*own, "method=dpo"), opt_13b, opt_350m, torch.bfloat16, ranks=8, reference=opt_350m
    )
    assert sizes(memory)[("loading", "reference weights")] == opt_350m.parameters * 2 // 8


def test_dpo_trains_the_actor_on_pairs_and_holds_no_reference(opt_13b, opt_350m):
    config = opt_config("dpo.optimizer.zero_stage=2", "dpo.micro_batch_tokens=2048")
    memory = estimate_step_memory(DPO, config, opt_13b, opt_350m, torch.bfloat16, ranks=8)
    tokens = 2 * 2 * 512  # two pairs
    assert sizes(memory) == {
        ("", "weights"): OPT_13B * 2,
        ("", "gradients"): OPT_13B * 4 // 8,
        ("", "optimiser states"): OPT_13B * 12 // 8,
        ("loading", "weights, fp32"): OPT_13B * 4,
        ("training", "activations"): 2 * tokens * (40 * 5120 + 16 * 5120),
        ("training", "logits"): 16 * (4 * 256) * 50272,
        ("saving", "trained weights, fp32 (first rank)"): OPT_13B * 4,
        ("saving", "whole model, fp32 (first rank)"): OPT_13B * 4,
    }


def test_what_generation_keeps_can_be_released(opt_13b, opt_350m):
    kept = estimate_step_memory(PPO, opt_config(), opt_13b, opt_350m, torch.bfloat16, ranks=8)
    config = opt_config("rlhf.release_generation=true")
    released = estimate_step_memory(PPO, config, opt_13b, opt_350m, torch.bfloat16, ranks=8)
    cache = 2 * (16 * 512) * 40 * 2 * 5120
    assert kept.held("device") - released.held("device") == 2 * OPT_13B
    assert sizes(released)["generation", "key-value cache"] == cache
    assert kept.phases("device")["generation"] + cache + 2 * OPT_13B == released.phases("device")["generation"]
    assert released.peak("device") < kept.peak("device")


@pytest.mark.parametrize("released", ["true", "false"])
def test_slots_are_as_many_as_a_gpu_has_room_for(opt_13b, opt_350m, released):
    config = opt_config("rlhf.prompts_per_iteration=4096", f"rlhf.release_generation={released}")

    def memory_of(config: RunConfig) -> StepMemory:
        return estimate_step_memory(PPO, config, opt_13b, opt_350m, torch.bfloat16, 8)

    def slots_on(gib: int, config: RunConfig = config) -> int | str:
        return with_slots(config, 8, gib * 2**30, memory_of).rlhf.generation_batch

    def peak(slots: int) -> int:
        rlhf = config.rlhf.model_copy(update={"generation_batch": slots})
        return memory_of(config.model_copy(update={"rlhf": rlhf})).peak("device")

    found = slots_on(141)
    assert peak(found) <= 0.92 * 141 * 2**30 < peak(found + 1) and 1 < found < 512
    assert slots_on(1000) == 512  # an iteration's, on one of 8 ranks
    assert slots_on(10) == 1
    evaluated = opt_config("rlhf.eval_every=1", "rlhf.eval_prompts=8192", "rlhf.generation_tensor_parallel=2")
    assert slots_on(1000, evaluated) == 2048
    named = opt_config("rlhf.generation_batch=5")
    assert with_slots(named, 8, 2**50, memory_of) is named


def test_slots_in_memory_that_nothing_else_wants(opt_13b):
    each = 512 * 40 * 2 * 5120 * 2 + 50272 * SAMPLING_BYTES_PER_LOGIT
    assert slots_in(int(10 * each / 0.92) + 1, opt_13b, 512, torch.bfloat16) == 10
    assert slots_in(0, opt_13b, 512, torch.bfloat16) == 1


def test_step_3_holds_four_roles_and_the_copy_that_generates(opt_13b, opt_350m):
    memory = estimate_step_memory(PPO, opt_config(), opt_13b, opt_350m, torch.bfloat16, ranks=8)
    by_name = sizes(memory)
    assert by_name[("", "actor weights to generate, whole")] == 2 * OPT_13B
    assert by_name[("", "reference weights")] == 2 * OPT_13B // 8
    assert by_name[("", "reward weights")] == 2 * OPT_350M // 8
    assert by_name[("", "critic weights")] == 2 * OPT_350M  # stage 1
    assert by_name[("generation", "key-value cache, kept while training")] == (
        2 * (16 * 512) * 40 * 2 * 5120  # 128 samples on 8 ranks
    )
    assert by_name[("generation", "logits to sample")] == 24 * 16 * 50272
    assert by_name[("actor loading", "actor weights, whole (first rank)")] == 2 * OPT_13B
    assert memory.held("device") == (
        18 * OPT_13B // 8 + 2 * OPT_13B + 2 * OPT_13B // 8 + 6 * OPT_350M + 12 * OPT_350M // 8 + 2 * OPT_350M // 8
    )


def test_step_3_holds_what_its_estimator_and_rewards_need(opt_13b, opt_350m):
    free = opt_config("rlhf.advantage=reinforce++", "rlhf.reward_weights.model=0", "rlhf.reward_function=a.py:f")
    whole, memory = (estimate_step_memory(PPO, c, opt_13b, opt_350m, torch.bfloat16, 8) for c in (opt_config(), free))
    gone = {name for name in sizes(whole) if name not in sizes(memory)}
    assert {name for _, name in gone if not name.startswith("critic ")} <= {
        "reward weights",
        "reward weights, whole (first rank)",
        "activations",
    }
    assert whole.held("device") - memory.held("device") == (6 + 12 / 8 + 2 / 8) * OPT_350M
    averaged = estimate_step_memory(PPO, opt_config("rlhf.ema=0.9"), opt_13b, opt_350m, torch.bfloat16, ranks=8)
    assert averaged.held("device") - whole.held("device") == 4 * OPT_13B // 8


def test_step_3_without_kl_holds_no_reference(opt_13b, opt_350m):
    no_kl = opt_config("rlhf.kl.coefficient=0"), opt_config("rlhf.kl={coefficient: 0, measure: true}")
    whole, free, measured = (
        estimate_step_memory(PPO, config, opt_13b, opt_350m, torch.bfloat16, ranks=8)
        for config in (opt_config(), *no_kl)
    )
    assert whole.held("device") - free.held("device") == 2 * OPT_13B // 8
    assert sizes(whole).keys() - sizes(free).keys() == {
        ("", "reference weights"),
        ("reference loading", "reference weights, whole (first rank)"),
    }
    assert sizes(measured) == sizes(whole)


def test_tensor_parallel_scoring_keeps_parts(opt_13b, opt_350m):
    degrees = "rlhf.scoring_tensor_parallel={reference: 4, reward: 2, critic: 8}"
    config = opt_config("rlhf.reference.zero_stage=0", "rlhf.reward.zero_stage=0", degrees)
    memory = sizes(estimate_step_memory(PPO, config, opt_13b, opt_350m, torch.bfloat16, ranks=8))
    assert memory[("", "reference weights")] == 2 * OPT_13B // 4
    assert memory[("", "reward weights")] == 2 * OPT_350M // 2
    assert memory[("", "critic weights")] == 2 * OPT_350M
    assert memory[("", "critic weights to score, 1 of 8 parts")] == 2 * OPT_350M // 8


def test_tensor_parallel_generation_keeps_a_part(opt_13b, opt_350m):
    config = opt_config("rlhf.generation_tensor_parallel=4")
    memory = sizes(estimate_step_memory(PPO, config, opt_13b, opt_350m, torch.bfloat16, ranks=8))
    assert memory[("", "actor weights to generate, 1 of 4 parts")] == 2 * OPT_13B // 4
    rows = 32  # of 128 samples on 2 groups, as many as there are slots
    assert memory[("generation", "key-value cache, kept while training")] == 2 * (rows * 512) * 40 * 2 * 5120 // 4


def planned(**meshes: int) -> RunConfig:
    """OPT-13B on three ranks; calls that are not named run on the first."""
    calls = ("actor_generate", "actor_score", "reference_score", "reward_score", "critic_score", "actor_train")
    blocks = {call: {"mesh": meshes.get(call, 0)} for call in (*calls, "critic_train")}
    return opt_config(f"rlhf.plan={json.dumps(blocks)}", "rlhf.actor.offload=optimizer")


@pytest.mark.parametrize(
    ("generates_on", "scores_on", "copies"),
    [
        (0, 0, [[], [], []]),
        (0, 1, [[], ["score"], []]),
        (1, 1, [[], ["generate and score"], []]),
        (1, 2, [[], ["generate"], ["score"]]),
    ],
)
def test_a_plan_copies_the_actor_where_it_generates_and_scores(opt_13b, opt_350m, generates_on, scores_on, copies):
    config = planned(actor_generate=generates_on, actor_score=scores_on)
    plan = Plan.of(config.rlhf, 3, config.data.longest)
    for rank, uses in enumerate(copies):
        parts = _rlhf_parts(config, plan, opt_13b, opt_350m, torch.bfloat16, rank)
        found = {part.name: part.bytes for part in parts if part.name.startswith("actor weights to")}
        assert found == {f"actor weights to {use}, whole": 2 * OPT_13B for use in uses}


def test_a_stage_holds_its_layers_and_the_first_one_more_passes(opt_13b, opt_350m):
    """OPT's output matrix is its embedding, which both stages have; the critic runs the other way, without one."""
    blocks = {call: {"mesh": 0} for call in ("actor_generate", "actor_score", "reference_score", "reward_score")}
    blocks["critic_score"] = {"mesh": 1}
    blocks["actor_train"] = {"mesh": "0-1", "pipeline": 2, "layers": [30, 10], "micro_batches": 4}
    blocks["critic_train"] = {"mesh": [1, 0], "pipeline": 2}
    config = opt_config(f"rlhf.plan={json.dumps(blocks)}", "rlhf.actor.gradient_checkpointing=true")
    plan, embedding = Plan.of(config.rlhf, 2, config.data.longest), opt_13b.vocabulary * opt_13b.hidden
    found = [
        sizes(StepMemory(tuple(_rlhf_parts(config, plan, opt_13b, opt_350m, torch.bfloat16, rank)))) for rank in (0, 1)
    ]
    in_layers = OPT_13B - embedding
    for rank, share in enumerate((3 / 4, 1 / 4)):
        assert found[rank]["", "actor weights"] == pytest.approx(2 * (in_layers * share + embedding), rel=1e-6)
    rows = config.rlhf.prompts_per_iteration * config.rlhf.samples_per_prompt // config.rlhf.mini_batches // 4
    tokens = rows * config.data.longest
    layer = 6 * 5120 + 2 * 5120 + 2 * 20480
    phase = "actor training"
    for rank, inputs in enumerate((2 * 30, 10)):  # of the second stage one micro-batch is alive at a time
        assert found[rank][phase, "activations"] == 2 * tokens * (inputs * 5120 + layer)
    assert (phase, "logits") in found[1] and (phase, "logits") not in found[0]
    assert found[1]["", "critic weights"] - found[0]["", "critic weights"] == 2 * opt_350m.vocabulary * 512
    assert found[1]["", "critic weights to score, whole"] == 2 * opt_350m.scorer_parameters


def test_the_lowest_rank_of_a_pipeline_saves(opt_13b, opt_350m):
    blocks: dict[str, Any] = {
        call: {"mesh": 0}
        for call in ("actor_generate", "actor_score", "reference_score", "reward_score", "critic_score", "critic_train")
    }
    blocks["actor_train"] = {"mesh": [1, 0], "pipeline": 2}
    config = opt_config(f"rlhf.plan={json.dumps(blocks)}")
    plan = Plan.of(config.rlhf, 2, config.data.longest)
    of_ranks = [_rlhf_parts(config, plan, opt_13b, opt_350m, torch.bfloat16, rank) for rank in (0, 1)]
    assert [any(part.phase == "saving" for part in parts) for parts in of_ranks] == [True, False]


def test_the_fullest_rank_is_that_of_each_place(opt_13b, opt_350m):
    """The first rank trains with its optimiser on the host, the second has the actor and the reference on its GPU."""
    config = planned(actor_generate=1, reference_score=1)
    memories = [
        estimate_step_memory(PPO, config, opt_13b, opt_350m, torch.bfloat16, 3, places)
        for places in (("device", "host"), ("device",))
    ]
    together, apart = map(sizes, memories)
    assert ("", "actor optimiser states") in together and ("", "reference weights") not in together
    assert ("", "actor optimiser states") in apart and ("", "reference weights") in apart
    assert memories[0].peak("device") < memories[1].peak("device")
    assert memories[0].host_peak(1) == memories[1].host_peak(1)


def test_lora_needs_no_second_copy(opt_13b, opt_350m):
    config = opt_config("rlhf.actor.lora.rank=16", "rlhf.actor.zero_stage=2", "rlhf.reward.zero_stage=0")
    memory = sizes(estimate_step_memory(PPO, config, opt_13b, opt_350m, torch.bfloat16, ranks=1))
    adapters = 16 * 40 * (4 * (5120 + 5120) + 2 * (5120 + 20480))
    assert memory[("", "actor weights")] == 2 * (OPT_13B + adapters)
    assert memory[("", "actor gradients")] == 4 * adapters
    assert memory[("", "actor optimiser states")] == 12 * adapters
    assert ("", "reference weights") not in memory
    assert ("", "actor weights to generate, whole") not in memory


def test_offload_moves_bytes_to_the_host(opt_13b, opt_350m):
    plain = opt_config()
    for offload, moved in (("optimizer", 16), ("optimizer+parameters", 18)):
        config = opt_config(f"sft.optimizer.offload={offload}")
        before = estimate_step_memory(SFT, plain, opt_13b, opt_350m, torch.bfloat16, ranks=8)
        after = estimate_step_memory(SFT, config, opt_13b, opt_350m, torch.bfloat16, ranks=8)
        assert after.held("host") == OPT_13B * moved // 8
        assert after.held("device") == OPT_13B * (18 - moved) // 8
        assert after.peak("device", "host") == before.peak("device", "host")


def test_peak_takes_the_largest_phase_and_not_their_sum():
    parts = (Part("a", 10), Part("b", 5, phase="generation"), Part("c", 7, phase="training"), Part("d", 1, "host"))
    memory = StepMemory(parts)
    assert memory.peak("device") == 17
    assert memory.peak("device", "host") == 18
    assert StepMemory((*parts, Part("e", 30, phase="loading"))).peak("device") == 30


def test_each_process_loads_into_main_memory_one_model_after_the_other(opt_13b, opt_350m):
    for stage, loaded in ((0, 8 * 4), (3, 2)):  # fp32 in each of 8 processes; bf16 in the first alone
        config = opt_config(f"rlhf.actor.zero_stage={stage}", "rlhf.reference.zero_stage=0", "rlhf.reward.zero_stage=0")
        memory = estimate_step_memory(PPO, config, opt_13b, opt_350m, torch.bfloat16, ranks=8)
        assert all(part.location == "host" for part in memory.parts if part.phase.endswith("loading"))
        read = {part.name: part.bytes for part in memory.parts if part.phase == "actor loading"}
        assert list(read.values()) == [OPT_13B * (4 if stage == 0 else 2)]
        reference = 8 * 2  # bytes a parameter: every process reads it whole
        assert memory.host_peak(processes=8) == OPT_13B * max(loaded, reference, 8)  # 8: the first rank saves


def test_what_a_phase_leaves_is_held_in_the_others():
    parts = (Part("a", 10), Part("b", 5, phase="generation", persists=True), Part("c", 7, phase="training"))
    memory = StepMemory(parts)
    assert memory.held("device") == 10
    assert memory.peak("device") == 22
    assert StepMemory((*parts, Part("d", 30, phase="loading"))).peak("device") == 30


def test_rows_per_micro_batch():
    assert rows_per_micro_batch(4096, 512) == 8
    assert rows_per_micro_batch(4095, 512) == 7
    assert rows_per_micro_batch(100, 512) == 1
    assert rows_per_micro_batch(4095, 512, rows_together=2) == 6


def test_values_that_make_no_model_are_one_sentence():
    with pytest.raises(UserError, match="make no causal language model"):
        Shape.from_config_values({"model_type": "no-such-thing"})
