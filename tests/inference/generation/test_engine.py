"""The engine against a plain forward pass of `transformers`: no cache, no padding, one sample at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from inference.generation.engine import GenerationEngine, left_pad
from inference.generation.sample import Sample, SamplingKey, SamplingSettings

VOCABULARY = 40
END, PAD = 2, 1
KEY = SamplingKey(seed=11)
FAMILIES = ("opt", "llama", "gpt2", "gpt_neox", "bloom")


def build_model(family: str) -> nn.Module:
    """Two small layers with weights large enough that tokens and positions matter."""
    torch.manual_seed(7)
    sizes: dict[str, Any]
    model: nn.Module
    names: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": END}
    if family == "opt":
        sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = OPTForCausalLM(OPTConfig(**names, **sizes, ffn_dim=64, max_position_embeddings=64, init_std=0.3))
    elif family == "llama":  # two query heads share a key head
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**names, **sizes, num_key_value_heads=2, initializer_range=0.3))
    elif family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(**names, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
        )
    elif family == "gpt_neox":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**names, **sizes, initializer_range=0.3))
    else:
        model = BloomForCausalLM(BloomConfig(**names, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3))
    return model.eval()


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
    assert {len(sample.response_ids) for sample in samples} != {10}  # some end early: the batch has shrunk
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
    engine = GenerationEngine(model, END, PAD, batch=batch)
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
    """Says what its script says: row of token t is followed by token `script[t]`. Counts the rows of each forward."""

    def __init__(self, script: dict[int, int]):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.script = script
        self.rows: list[int] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past_key_values, use_cache: bool):
        # No `position_ids` and no `logits_to_keep` on purpose: neither may be passed to a model without them.
        self.rows.append(len(input_ids))
        cache = past_key_values or ScriptedCache()
        assert attention_mask.shape[1] == cache.length + input_ids.shape[1]
        cache.length += input_ids.shape[1]
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        for row, token in enumerate(input_ids[:, -1].tolist()):
            logits[row, -1, self.script[token]] = 9.0
        return ScriptedOutput(logits, cache)


class ScriptedCache:
    length = 0

    def batch_select_indices(self, indices: Tensor) -> None:
        self.kept = indices.tolist()


class ScriptedOutput:
    def __init__(self, logits: Tensor, past_key_values: ScriptedCache):
        self.logits = logits
        self.past_key_values = past_key_values


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
    list(GenerationEngine(model, END, PAD, batch=2).generate([torch.tensor([4]) for _ in range(5)], GREEDY, KEY))
    assert model.rows == [2, 2, 2, 2, 1, 1]


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


def test_on_token_sees_every_token_in_turn():
    seen: list[tuple[int, int]] = []
    engine = GenerationEngine(ScriptedModel(COUNT_DOWN), END, PAD)
    prompts = [torch.tensor([5]), torch.tensor([4])]
    list(engine.generate(prompts, GREEDY, KEY, on_token=lambda s: seen.append((s.index, s.response_ids[-1]))))
    assert seen == [(0, 4), (1, 3), (0, 3), (1, 2), (0, 2)]


def test_stream_grows_the_sample_that_generate_draws(model):
    settings = SamplingSettings(max_tokens=12, temperature=1.2)
    engine = GenerationEngine(model, END, PAD)
    (whole,) = engine.generate([PROMPTS[1]], settings, KEY, indices=[6])
    lengths = []
    for sample in engine.stream(PROMPTS[1], settings, KEY, index=6):
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
    assert {"position_ids", "logits_to_keep"} <= engine.accepted
    wrapped = in_order(engine.generate(PROMPTS, GREEDY, KEY))
    assert [(s.response_ids, s.logprobs) for s in wrapped] == [(s.response_ids, s.logprobs) for s in plain]
    scripted = GenerationEngine(Wrapper(ScriptedModel(COUNT_DOWN)), END, PAD)
    assert next(scripted.generate([torch.tensor([4])], GREEDY, KEY)).response_ids == [3, 2]


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_an_adapter_counts(family):
    peft = pytest.importorskip("peft")
    plain = GenerationEngine(build_model(family), END, PAD)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(build_model(family), config).eval()
    engine = GenerationEngine(adapted, END, PAD)
    assert engine.accepted == plain.accepted
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


def test_left_pad():
    ids, mask = left_pad([torch.tensor([5, 6, 7]), torch.tensor([8])], pad_id=PAD)
    assert ids.tolist() == [[5, 6, 7], [PAD, PAD, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
