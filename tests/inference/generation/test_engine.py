"""The engine against a plain forward pass of `transformers`: no cache, no padding, one sample at a time."""

import copy
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from inference.errors import UserError
from inference.generation import cpu
from inference.generation.attention import can_pack
from inference.generation.cpu import BlockedWeights, SharedProduct, is_plain_lora
from inference.generation.engine import GenerationEngine
from inference.generation.passes import right_pad
from inference.generation.sampler import Sample, SamplingKey, SamplingSettings

VOCABULARY = 40
END, PAD = 2, 1
KEY = SamplingKey(seed=11)
IDS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": END}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LLAMA = {**SIZES, "initializer_range": 0.3, "num_key_value_heads": 2}  # two query heads share a key head
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
OPT = {**SIZES, "ffn_dim": 64, "max_position_embeddings": 64, "init_std": 0.3}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {**OPT, "word_embed_proj_dim": 32}),
    "opt-350m": ("opt", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt2": ("gpt2", GPT),
    "gpt_neox": ("gpt_neox", {**SIZES, "initializer_range": 0.3}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}),
    "llama": ("llama", LLAMA),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 16}),
    "mistral": ("mistral", {**LLAMA, "sliding_window": 6}),
    "gptj": ("gptj", {**GPT, "rotary_dim": 4}),
    "gpt_neo": ("gpt_neo", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "initializer_range": 0.3,
                            "attention_types": [[["global", "local"], 1]], "window_size": 4,
                            "max_position_embeddings": 64}),
    "codegen": ("codegen", {**GPT, "rotary_dim": 4}),
    "gemma2": ("gemma2", {**LLAMA, "head_dim": 8, "sliding_window": 6}),
    "cohere2": ("cohere2", {**LLAMA, "sliding_window": 6, "logit_scale": 0.25}),
    "nemotron": ("nemotron", LLAMA),
    "diffllama": ("diffllama", LLAMA),
    "deepseek_v3": ("deepseek_v3", {**LLAMA, "num_key_value_heads": 4, "moe_intermediate_size": 32,
                                    "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
                                    "first_k_dense_replace": 1, "q_lora_rank": None, "kv_lora_rank": 16,
                                    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}),
}  # fmt: skip
PADDED = {"bloom", "gptj", "gpt_neo", "codegen", "diffllama", "nemotron", "gemma2"}
"""Those before nemotron do not go through the attention interface, nemotron drops keywords, gemma2 caps its scores."""


def build_model(family: str) -> nn.Module:
    """Two small layers with weights large enough that tokens and positions matter."""
    torch.manual_seed(7)
    kind, values = FAMILIES[family]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **IDS, **values)).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def any_model(request) -> nn.Module:
    return build_model(request.param)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model("llama")


def make_prompts(lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


PROMPTS = make_prompts([3, 11, 1, 7, 5, 2, 9, 4])


def in_order(samples) -> list[Sample]:
    return sorted(samples, key=lambda sample: sample.index)


def reference_greedy(model: nn.Module, prompt: Tensor, max_tokens: int) -> tuple[list[int], list[float]]:
    tokens, logprobs = prompt.tolist(), []
    for _ in range(max_tokens):
        with torch.no_grad():
            distribution = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(-1)
        tokens.append(int(distribution.argmax()))
        logprobs.append(float(distribution.max()))
        if tokens[-1] == END:
            break
    return tokens[len(prompt) :], logprobs


def reference_logprobs(model: nn.Module, sample: Sample, temperature: float) -> list[float]:
    ids = torch.cat([sample.prompt_ids, torch.tensor(sample.response_ids)])
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0] / temperature
    positions = range(len(sample.prompt_ids) - 1, len(ids) - 1)
    return [float(logits[position].log_softmax(-1)[ids[position + 1]]) for position in positions]


def test_greedy_equals_the_plain_forward(any_model):
    settings = SamplingSettings(max_tokens=12, temperature=0)
    samples = in_order(GenerationEngine(any_model, END, PAD).generate(PROMPTS, settings, KEY))
    assert len(samples) == len(PROMPTS)
    for sample, prompt in zip(samples, PROMPTS, strict=True):
        tokens, logprobs = reference_greedy(any_model, prompt, 12)
        assert sample.response_ids == tokens
        assert sample.logprobs == pytest.approx(logprobs, abs=1e-5)


def test_sampled_logprobs_are_those_of_the_tempered_distribution(any_model):
    settings = SamplingSettings(max_tokens=10, temperature=1.7)
    samples = list(GenerationEngine(any_model, END, PAD).generate(PROMPTS, settings, KEY))
    for sample in samples:
        assert sample.logprobs == pytest.approx(reference_logprobs(any_model, sample, 1.7), abs=1e-5)


def test_an_end_token_ends_a_sample_and_is_part_of_it(model):
    settings = SamplingSettings(max_tokens=16, temperature=1.5)
    samples = list(GenerationEngine(model, END, PAD).generate(PROMPTS, settings, KEY))
    assert {sample.ended for sample in samples} == {True, False}
    for sample in samples:
        assert sample.ended == (sample.response_ids[-1] == END)
        assert END not in sample.response_ids[:-1]
        assert sample.ended or len(sample.response_ids) == 16
        assert len(sample.logprobs) == len(sample.response_ids)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6, 7], [5, 2, 7, 0, 6, 1, 4, 3]])
def test_draws_do_not_depend_on_batch_and_order(model, batch, order):
    settings = SamplingSettings(max_tokens=12, temperature=1.3)
    engine = GenerationEngine(model, END, PAD, slots=batch)
    samples = in_order(engine.generate([PROMPTS[i] for i in order], settings, KEY, indices=order))
    alone = [next(engine.generate([prompt], settings, KEY, indices=[i])) for i, prompt in enumerate(PROMPTS)]
    assert [sample.response_ids for sample in samples] == [sample.response_ids for sample in alone]


def test_draws_depend_on_seed_iteration_and_index(model):
    settings = SamplingSettings(max_tokens=12)
    engine = GenerationEngine(model, END, PAD)
    prompt = PROMPTS[0]

    def response(key: SamplingKey, index: int) -> tuple[int, ...]:
        return tuple(next(engine.generate([prompt], settings, key, indices=[index])).response_ids)

    responses = [response(SamplingKey(s, i), n) for s, i, n in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]]
    assert len(set(responses)) == 4


class ScriptedModel(nn.Module):
    """Says what its script says: a token t is followed by `script[t]`. Counts the rows of each forward pass."""

    def __init__(self, script: dict[int, int]):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.script = script
        self.rows: list[int] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past_key_values, use_cache: bool):
        # No `position_ids` on purpose: they may not be passed to a model without them.
        self.rows.append(len(input_ids))
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        for row, tokens in enumerate(input_ids.tolist()):
            for place, token in enumerate(tokens):
                logits[row, place, self.script.get(token, END)] = 9.0
        return SimpleNamespace(logits=logits)


COUNT_DOWN = {
    token: token - 1 for token in range(3, VOCABULARY)
}  # a prompt that ends in t has an answer of t - 2 tokens
GREEDY = SamplingSettings(max_tokens=20, temperature=0)


def test_a_sample_is_handed_over_when_it_ends():
    model = ScriptedModel(COUNT_DOWN)
    samples = GenerationEngine(model, END, PAD).generate([torch.tensor([t]) for t in (12, 4, 6)], GREEDY, KEY)
    seen = [(sample.index, sample.response_ids, len(model.rows)) for sample in samples]
    assert seen == [
        (1, [3, 2], 2),  # after two of ten forward passes
        (2, [5, 4, 3, 2], 4),
        (0, [11, 10, 9, 8, 7, 6, 5, 4, 3, 2], 10),
    ]


def test_the_batch_shrinks_as_samples_end():
    model = ScriptedModel(COUNT_DOWN)
    list(GenerationEngine(model, END, PAD).generate([torch.tensor([t]) for t in (8, 4, 6)], GREEDY, KEY))
    assert model.rows == [3, 3, 2, 2, 1, 1]


def test_no_more_than_the_batch_is_decoded_together():
    model = ScriptedModel(COUNT_DOWN)
    prompts = [torch.tensor([first, 4]) for first in (10, 11, 12, 13, 14)]
    list(GenerationEngine(model, END, PAD, slots=2).generate(prompts, GREEDY, KEY))
    assert model.rows == [2, 2, 2, 2, 1, 1]  # prefill and decode in turn


def test_a_slot_that_falls_free_is_filled_at_once():
    model = ScriptedModel(COUNT_DOWN)
    prompts = [torch.tensor([t]) for t in (10, 4, 5, 3)]  # answers of 8, 2, 3 and 1 tokens
    engine = GenerationEngine(model, END, PAD, slots=2)
    seen = [sample.index for sample in engine.generate(prompts, GREEDY, KEY)]
    assert seen == [1, 2, 3, 0]
    # prefill of two, a step of both, prefill of the third, two steps, prefill of the fourth, then the first alone
    assert model.rows == [2, 2, 1, 2, 2, 1, 1, 1, 1, 1]
    stats = engine.stats
    assert (stats.samples, stats.response_tokens, stats.decode_steps, stats.row_steps, stats.slots) == (4, 14, 7, 10, 2)


def test_two_hundred_samples_run_on_thirty_two_slots(model):
    prompts = make_prompts([1 + i % 9 for i in range(200)])
    settings = SamplingSettings(max_tokens=24, temperature=1.3)
    engine = GenerationEngine(model, END, PAD, slots=32)
    samples = in_order(engine.generate(prompts, settings, KEY))
    assert len(samples) == 200 and engine.cache.slots == 32
    sizes = 2 * 2 * 32 * (9 + 24) * 16 * 4  # layers, keys and values, slots, tokens, 2 key heads of 8, bytes
    assert engine.cache.bytes == sizes
    assert engine.stats.response_tokens == sum(len(sample.response_ids) for sample in samples)
    assert engine.stats.row_steps == engine.stats.response_tokens - 200  # the first token comes with the prefill
    assert engine.stats.row_steps > 0.8 * 32 * engine.stats.decode_steps  # of the slots
    some = [0, 57, 123, 199]
    alone = engine.generate([prompts[i] for i in some], settings, KEY, indices=some)
    assert [s.response_ids for s in in_order(alone)] == [samples[i].response_ids for i in some]


def test_samples_of_one_prompt_share_its_prefill(any_model):
    settings = SamplingSettings(max_tokens=10, temperature=1.3)
    prompts = [PROMPTS[1]] * 3 + [PROMPTS[3]] * 2
    engine = GenerationEngine(any_model, END, PAD)
    samples = in_order(engine.generate(prompts, settings, KEY))
    assert (engine.stats.prompt_tokens, engine.stats.prefilled_tokens) == (3 * 11 + 2 * 7, 11 + 7)
    assert len({tuple(sample.response_ids) for sample in samples[:3]}) == 3
    for sample in samples:
        (alone,) = engine.generate([sample.prompt_ids], settings, KEY, indices=[sample.index])
        assert alone.response_ids == sample.response_ids
        assert alone.logprobs == pytest.approx(sample.logprobs, abs=1e-5)


def test_what_prompts_begin_with_is_prefilled_once(model, monkeypatch):
    """A system prompt, say; what is kept of each prompt is whole."""
    prompts = [torch.cat([PROMPTS[1], prompt]) for prompt in (PROMPTS[0], PROMPTS[2], PROMPTS[1])]
    forward, counted = model.forward, []

    def count(**inputs):
        counted.append(inputs["input_ids"].shape[1])
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", count)
    settings = SamplingSettings(max_tokens=10, temperature=1.3)
    samples = in_order(GenerationEngine(model, END, PAD).generate(prompts, settings, KEY))
    assert counted[0] == 11 + 3 + 1 + 11
    for sample in samples:
        assert sample.logprobs == pytest.approx(reference_logprobs(model, sample, 1.3), abs=1e-5)


def test_prompts_are_prefilled_within_their_budget(model):
    engine = GenerationEngine(model, END, PAD, prefill_tokens=12)
    forward, counted = model.forward, []

    def count(**inputs):
        counted.append(inputs["input_ids"].shape[1])
        return forward(**inputs)

    model.forward = count
    try:
        samples = in_order(engine.generate(PROMPTS, SamplingSettings(max_tokens=1), KEY))
    finally:
        del model.forward
    assert counted == [3, 11 + 1, 7 + 5, 2 + 9, 4]  # of 3, 11, 1, 7, 5, 2, 9, 4
    assert len(samples) == len(PROMPTS)


@pytest.mark.parametrize("graphs", [False, True])
def test_several_tokens_can_end_a_sample(graphs):
    settings = SamplingSettings(max_tokens=20, temperature=0)
    engine = GenerationEngine(ScriptedModel(COUNT_DOWN), (END, 6, 30), PAD, graphs=graphs)
    (sample,) = engine.generate([torch.tensor([9])], settings, KEY)
    assert sample.response_ids == [8, 7, 6] and sample.ended


@pytest.mark.parametrize("graphs", [False, True])
def test_none_of_the_end_tokens_is_drawn_before_the_minimum_or_where_nothing_may_end(graphs):
    ends = (END, 6, 30)
    engine = GenerationEngine(build_model("llama"), ends, PAD, graphs=graphs)
    samples = engine.generate(PROMPTS * 3, SamplingSettings(max_tokens=30, min_tokens=9), KEY)
    assert {sample.ended for sample in samples} == {True, False}
    for sample in engine.generate(PROMPTS * 3, SamplingSettings(max_tokens=30, min_tokens=9), KEY):
        early = sample.response_ids[: -1 if len(sample.response_ids) > 9 else None]
        assert not {*ends} & {*early} and len(sample.response_ids) > 9
    for sample in engine.generate(PROMPTS, SamplingSettings(max_tokens=1), KEY, lengths=[40] * len(PROMPTS)):
        assert not {*ends} & {*sample.response_ids} and not sample.ended and len(sample.response_ids) == 40


def test_forced_lengths(model):
    engine = GenerationEngine(model, END, PAD, slots=3)
    lengths = [5, 1, 9, 20, 3, 7, 2, 4]
    samples = in_order(engine.generate(PROMPTS, SamplingSettings(max_tokens=4), KEY, lengths=lengths))
    assert [len(sample.response_ids) for sample in samples] == lengths
    assert all(END not in sample.response_ids and not sample.ended for sample in samples)


def test_bf16_keeps_close_to_its_own_forward(any_model):
    """Weights in bf16, keys and attention in fp32: differences are those of rounding (a logit near 8 has steps of
    1/32)."""
    model = copy.deepcopy(any_model).bfloat16()
    settings = SamplingSettings(max_tokens=10, temperature=1.0)
    samples = list(GenerationEngine(model, END, PAD).generate(PROMPTS, settings, KEY))
    differences = [
        abs(ours - theirs)
        for sample in samples
        for ours, theirs in zip(sample.logprobs, reference_logprobs(model, sample, 1.0), strict=True)
    ]
    assert sum(differences) / len(differences) < 0.1


def test_max_tokens_cuts_and_costs_no_further_forward():
    model = ScriptedModel(COUNT_DOWN)
    settings = SamplingSettings(max_tokens=3, temperature=0)
    samples = in_order(
        GenerationEngine(model, END, PAD).generate([torch.tensor([30]), torch.tensor([5])], settings, KEY)
    )
    assert [(sample.response_ids, sample.ended) for sample in samples] == [([29, 28, 27], False), ([4, 3, 2], True)]
    assert len(model.rows) == 3


def test_min_tokens_forbids_an_early_end():
    model = ScriptedModel({token: END for token in range(VOCABULARY)})
    settings = SamplingSettings(max_tokens=10, min_tokens=4, temperature=1.0)
    (sample,) = GenerationEngine(model, END, PAD).generate([torch.tensor([5])], settings, KEY)
    assert END not in sample.response_ids[:4]
    assert sample.response_ids.index(END) >= 4


@pytest.mark.parametrize(
    "settings", [SamplingSettings(max_tokens=8, top_k=1), SamplingSettings(max_tokens=8, top_p=1e-6)]
)
def test_the_narrowest_top_k_and_top_p_are_greedy(model, settings):
    engine = GenerationEngine(model, END, PAD)
    greedy = in_order(engine.generate(PROMPTS, SamplingSettings(max_tokens=8, temperature=0), KEY))
    narrow = in_order(engine.generate(PROMPTS, settings, KEY))
    assert [sample.response_ids for sample in narrow] == [sample.response_ids for sample in greedy]
    assert all(logprob == 0 for sample in narrow for logprob in sample.logprobs)  # the only token that could be drawn


def test_a_step_gives_each_running_sample_a_token():
    seen: list[tuple[int, int]] = []
    samples = [Sample(index, torch.tensor([first]), GREEDY.max_tokens) for index, first in enumerate((5, 4))]
    decoding = GenerationEngine(ScriptedModel(COUNT_DOWN), END, PAD).start(samples, GREEDY, KEY)
    while not decoding.is_over:
        seen += [(sample.index, sample.response_ids[-1]) for sample in decoding.step(1)]
    assert seen == [(0, 4), (1, 3), (0, 3), (1, 2), (0, 2)]


def test_stream_grows_the_sample_that_generate_draws(model):
    settings = SamplingSettings(max_tokens=12, temperature=1.2)
    engine = GenerationEngine(model, END, PAD)
    (whole,) = engine.generate([PROMPTS[1]], settings, KEY)
    lengths = []
    for sample in engine.stream(PROMPTS[1], settings, KEY):
        lengths.append(len(sample.response_ids))
    assert lengths == list(range(1, len(whole.response_ids) + 1))
    assert (sample.response_ids, sample.logprobs, sample.ended) == (whole.response_ids, whole.logprobs, whole.ended)


class Wrapper(nn.Module):
    """Passes everything on, as DeepSpeed's engine does."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **kwargs):
        return self.module(*inputs, **kwargs)


def test_wrapped_models_get_their_positions(model):
    plain = in_order(GenerationEngine(model, END, PAD).generate(PROMPTS, GREEDY, KEY))
    engine = GenerationEngine(Wrapper(model), END, PAD)
    wrapped = in_order(engine.generate(PROMPTS, GREEDY, KEY))
    assert [(s.response_ids, s.logprobs) for s in wrapped] == [(s.response_ids, s.logprobs) for s in plain]
    scripted = GenerationEngine(Wrapper(ScriptedModel(COUNT_DOWN)), END, PAD)
    assert next(scripted.generate([torch.tensor([4])], GREEDY, KEY)).response_ids == [3, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_pack_whose_attention_is_told_of_the_tokens(family):
    assert can_pack(build_model(family)) == (family not in PADDED)


@pytest.mark.parametrize("family", ["mamba", "lfm2"])
def test_models_that_keep_more_than_keys_and_values_are_refused(family):
    kinds = {"layer_types": ["conv", "full_attention"]} if family == "lfm2" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **IDS, **SIZES, **kinds))
    with pytest.raises(UserError, match=f"type '{family}' keep more of a text than keys and values"):
        list(GenerationEngine(model, END, PAD).generate(PROMPTS, GREEDY, KEY))


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_an_adapter_counts(family):
    plain = GenerationEngine(build_model(family), END, PAD)
    adapted = with_adapter(build_model(family))
    engine = GenerationEngine(adapted, END, PAD)
    samples = in_order(engine.generate(PROMPTS, GREEDY, KEY))
    for sample in samples:
        assert (sample.response_ids, sample.logprobs) == (
            reference_greedy(adapted, sample.prompt_ids, 20)[0],
            pytest.approx(reference_greedy(adapted, sample.prompt_ids, 20)[1], abs=1e-5),
        )
    without = in_order(plain.generate(PROMPTS, GREEDY, KEY))
    assert [sample.logprobs for sample in samples] != [sample.logprobs for sample in without]


def test_no_prompts_no_samples(model):
    assert list(GenerationEngine(model, END, PAD).generate([], GREEDY, KEY)) == []


BLOCKED_DTYPES = [torch.float32] + [torch.bfloat16] * cpu.blocks_bf16()


def test_right_pad():
    ids, mask = right_pad([torch.tensor([5, 6, 7]), torch.tensor([8])], pad_id=PAD)
    assert ids.tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", BLOCKED_DTYPES)
def test_blocked_weights_compute_what_the_plain_ones_do(family, dtype):
    model = build_model(family).to(dtype)
    ids = torch.cat(PROMPTS)[None, :30]
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        blocked = BlockedWeights(model)
        with blocked.in_use():
            ours = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, plain)  # and afterwards all is as before
    layers = sum(type(module).__name__ in ("Linear", "Conv1D") for module in model.modules())
    assert len(blocked.forwards) == layers > 8
    scale = float(plain.abs().max())
    assert torch.allclose(ours, plain, atol=scale * (1e-5 if dtype == torch.float32 else 0.05))


def test_changed_weights_are_used_once_the_engine_knows_of_them():
    model = build_model("llama")
    engine = GenerationEngine(model, END, PAD)
    settings = SamplingSettings(max_tokens=6, temperature=0)
    before = in_order(engine.generate(PROMPTS, settings, KEY))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(-1)
    engine.weights_changed()
    samples = in_order(engine.generate(PROMPTS, settings, KEY))
    assert [sample.response_ids for sample in samples] != [sample.response_ids for sample in before]
    for sample, prompt in zip(samples, PROMPTS, strict=True):
        assert sample.response_ids == reference_greedy(model, prompt, 6)[0]


def with_adapter(model):
    """`model` with LoRA in all linear layers, not the nothing that it is at first."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", BLOCKED_DTYPES)
def test_blocked_adapters_compute_what_those_of_peft_do(family, dtype):
    model = build_model(family).to(dtype)
    adapted = with_adapter(model).to(dtype)
    ids = torch.cat(PROMPTS)[None, :30]
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        blocked = BlockedWeights(model)
        assert any(is_plain_lora(layer) for layer in blocked.forwards)
        assert not any(".lora_" in name and layer in blocked.forwards for name, layer in model.named_modules())
        with blocked.in_use():
            ours = model(input_ids=ids).logits
            with adapted.disable_adapter():
                without = model(input_ids=ids).logits
        with adapted.disable_adapter():
            plain_without = model(input_ids=ids).logits
    scale = float(plain.abs().max())
    tolerance = scale * (1e-5 if dtype == torch.float32 else 0.05)
    assert float((plain - plain_without).abs().max()) > 5 * tolerance  # the adapter is not nothing
    assert torch.allclose(ours, plain, atol=tolerance)
    assert torch.allclose(without, plain_without, atol=tolerance)


@pytest.mark.parametrize("dtype", BLOCKED_DTYPES)
def test_layers_that_share_their_inputs_are_one_product(dtype):
    torch.manual_seed(0)
    widths = {"q_proj": 32, "k_proj": 16, "v_proj": 24}
    layers = nn.ModuleDict({name: nn.Linear(48, width, bias=name == "q_proj") for name, width in widths.items()})
    # these two have the names of layers that share their inputs, and do not
    layers.update({"gate_proj": nn.Linear(48, 8), "up_proj": nn.Linear(24, 8)})
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.inject_adapter_in_model(config, layers.to(dtype)).eval().to(dtype)
    inputs, others = torch.randn(2, 1, 7, 48).to(dtype)
    with torch.inference_mode():
        plain, of_others = ({name: adapted[name](x) for name in widths} for x in (inputs, others))
        blocked = BlockedWeights(adapted)
        count = patch.object(SharedProduct, "_all", autospec=True, side_effect=SharedProduct._all)
        with blocked.in_use(), count as computed:
            together = {name: adapted[name](inputs) for name in widths}
            assert computed.call_count == 1
            again = {"k_proj": adapted["k_proj"](inputs), "v_proj": adapted["v_proj"](others)}
            assert computed.call_count == 3
    assert len(blocked.forwards) == 5
    for ours, expected in ((together, plain), (again, {"k_proj": plain["k_proj"], "v_proj": of_others["v_proj"]})):
        for name, values in expected.items():
            assert torch.allclose(ours[name], values, atol=1e-5 if dtype == torch.float32 else 0.05), name


def test_blocked_weights_are_gone_with_their_last_name():
    blocked = BlockedWeights(build_model("llama"))
    products = {forward.func.__self__ for forward in blocked.forwards.values() if isinstance(forward, partial)}
    watched = [weakref.ref(product) for product in products]
    assert len(watched) == 4  # two layers' attention and MLP
    del products, blocked
    assert not any(product() for product in watched)


def test_an_adapter_that_is_more_than_b_a_keeps_its_own_steps():
    model = build_model("llama")
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)).eval()
    assert not any(is_plain_lora(layer) for layer in model.modules())


def test_a_processor_that_does_not_block_bf16_computes_on_plain_weights(monkeypatch):
    monkeypatch.setattr(cpu, "blocks_bf16", lambda: False)
    assert BlockedWeights(build_model("llama").to(torch.bfloat16)).forwards == {}


def test_large_weights_are_not_copied(monkeypatch):
    monkeypatch.setattr(cpu, "MOST_BYTES", 1000)
    assert BlockedWeights(build_model("llama")).forwards == {}
