"""The check passes for the engine as it is, in every family, and fails for each mistake put in."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from inference.generation.engine import GenerationEngine
from inference.generation.equality import (
    Deviation,
    Findings,
    Redraw,
    Tolerance,
    Work,
    compare,
    deviation,
    generate,
    left_pad,
    up_to_stop,
)
from inference.generation.sampler import Sample
from tests.inference.generation.test_engine import FAMILIES, PAD, VOCABULARY, build_model

WORK = Work.of(VOCABULARY, PAD, context_length=64)
EXACT = Tolerance.of(torch.float32)
ROUNDED = Tolerance.of(torch.bfloat16)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return build_model("llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_equal_to_plain_transformers(family):
    model = build_model(family)
    findings = compare(generate(model, WORK), model, WORK, EXACT)
    assert findings.is_equal, findings.verdict
    assert [deviation.tokens for deviation in findings.deviations] == [16 * 21] * 3  # a third of the context each
    assert findings.verdict.startswith("equal: the largest deviation is ")
    assert [redraw.same for redraw in findings.redraws] == [16, 16]


@pytest.mark.parametrize("family", ["opt", "qwen2", "llama"])
def test_bf16_is_equal_on_average(family):
    model = build_model(family).bfloat16()
    findings = compare(generate(model, WORK), model, WORK, ROUNDED)
    assert findings.is_equal, findings.verdict
    assert findings.worst.largest > 1e-4  # and would not be under the bound of fp32
    assert not dataclasses.replace(findings, tolerance=EXACT).is_equal


def swap_layers(model: Any) -> None:
    layers = model.model.layers
    layers[0].mlp.load_state_dict(layers[1].mlp.state_dict())


def nudge_a_weight(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3, 5] += 0.05


def rotate_differently(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(1.01)


@pytest.mark.parametrize("mistake", [swap_layers, nudge_a_weight, rotate_differently])
@pytest.mark.parametrize("tolerance", [EXACT, ROUNDED], ids=["fp32", "bf16"])
def test_other_weights_are_found(llama, mistake, tolerance):
    wrong = copy.deepcopy(llama)
    mistake(wrong)
    findings = compare(generate(wrong, WORK), llama, WORK, tolerance)
    if mistake is nudge_a_weight and tolerance is ROUNDED:
        assert 1e-4 < findings.worst.mean < 0.1  # too small for what 16 bit can tell
        return
    assert not findings.is_equal
    assert findings.verdict.startswith("NOT equal: the largest ")
    assert "after prompt" in findings.verdict


def test_a_shifted_position_is_found():
    """Decoding one position too far. OPT's positions are absolute; a shift of all of Llama's would change nothing."""
    model = build_model("opt")
    wrong: Any = copy.deepcopy(model)
    forward = wrong.forward

    def shifted(position_ids, **inputs):
        is_decoding = bool((position_ids > 0).all())  # a prompt has a position 0
        return forward(position_ids=position_ids + is_decoding, **inputs)

    wrong.forward = shifted
    findings = compare(generate(wrong, WORK), model, WORK, EXACT)
    assert not findings.is_equal and findings.worst.largest > 0.01


def test_another_temperature_is_found(llama, monkeypatch):
    plain_generate = GenerationEngine.generate

    def warmer(self, prompts, settings, key, indices=None):
        if settings.temperature:
            settings = dataclasses.replace(settings, temperature=1.1)
        return plain_generate(self, prompts, settings, key, indices)

    monkeypatch.setattr(GenerationEngine, "generate", warmer)
    findings = compare(generate(llama, WORK), llama, WORK, EXACT)
    assert [d.is_within(EXACT) for d in findings.deviations] == [True, True, False]
    assert "sampled log-probabilities" in findings.verdict


def test_a_token_that_is_not_the_likeliest_is_found(llama):
    generated = generate(llama, WORK)
    sample = generated.greedy[4]
    sample.response_ids[-1] = (sample.response_ids[-1] + 1) % VOCABULARY
    findings = compare(generated, llama, WORK, EXACT)
    first = findings.deviations[0]
    assert not first.is_within(EXACT)
    assert first.where == f"token {WORK.new_tokens} after prompt 5 of {len(WORK.prompts[4])} tokens"


def test_draws_that_depend_on_the_batch_are_found(llama):
    generated = generate(llama, WORK)
    (name, again), *_ = generated.sampled_again.items()
    again[3].response_ids[0] += 1
    findings = compare(generated, llama, WORK, EXACT)
    assert not findings.is_equal
    assert findings.verdict.startswith(f"NOT equal: 1 of 16 {name} differ")
    assert compare(generated, llama, WORK, ROUNDED).is_equal  # there it is rounding


def test_training_is_compared_row_by_row(llama):
    generated = generate(llama, WORK)

    def training(rows):
        assert [p.tolist() for p, _ in rows] == [prompt.tolist() for prompt in WORK.prompts]
        values = torch.cat([torch.tensor(sample.logprobs) for sample in generated.sampled])
        values[len(generated.sampled[0].response_ids)] -= 0.25  # the first token of the second row
        return values

    findings = compare(generated, llama, WORK, EXACT, training)
    assert findings.worst.name == "training's log-probabilities"
    assert findings.worst.largest == pytest.approx(0.25, abs=1e-6)
    assert findings.worst.where.startswith("token 1 after prompt 2 ")


def test_work_fits_the_context():
    for context, new_tokens, longest in [(0, 24, 48), (2048, 24, 48), (60, 20, 40), (16, 5, 11)]:
        work = Work.of(VOCABULARY, PAD, context)
        assert (work.new_tokens, max(map(len, work.prompts))) == (new_tokens, longest)
        assert len(work.prompts) == 16 and min(map(len, work.prompts)) == 1
        assert not any((prompt == PAD).any() for prompt in work.prompts)
    again = Work.of(VOCABULARY, PAD)
    assert all(torch.equal(a, b) for a, b in zip(again.prompts, Work.of(VOCABULARY, PAD).prompts, strict=True))


def test_a_deviation_by_hand():
    samples = [Sample(0, torch.tensor([1, 2]), 9), Sample(1, torch.tensor([3]), 9)]
    found = deviation("name", samples, [torch.tensor([0.0, 1.0]), torch.tensor([0.5, 2.5, 1.0])])
    assert found == Deviation("name", 5, 1.0, 2.5, "token 2 after prompt 2 of 1 tokens")


@pytest.mark.parametrize(("own", "limit"), [(1e-7, 1e-4), (6e-5, 1.8e-4), (1.0, 1e-3), (math.nan, 1e-4)])
def test_the_tolerance_knows_how_a_model_rounds(own, limit):
    mean = Deviation("itself", 1, own / 2, own, "")
    assert EXACT.beside(mean).limit == pytest.approx(limit)


def test_a_models_own_rounding_is_seen(llama):
    """A forward pass that depends on the batch, as rounding does, widens the tolerance."""
    generated = generate(llama, WORK)
    assert compare(generated, llama, WORK, EXACT).tolerance == EXACT
    unsteady: Any = copy.deepcopy(llama)
    forward = unsteady.forward

    def noisy(input_ids, attention_mask, position_ids, logits_to_keep, use_cache):
        output = forward(input_ids, attention_mask, position_ids, logits_to_keep=logits_to_keep, use_cache=use_cache)
        output.logits[..., 0] += 1e-3 / len(input_ids)
        return output

    unsteady.forward = noisy
    assert 1e-4 < compare(generated, unsteady, WORK, EXACT).tolerance.limit <= 1e-3


def test_what_is_no_number_is_not_equal():
    samples = [Sample(0, torch.tensor([1]), 9)]
    broken = deviation("broken", samples, [torch.tensor([0.0, math.nan])])
    fine = deviation("fine", samples, [torch.tensor([0.0, 5e-5])])
    for tolerance in (EXACT, ROUNDED):
        findings = Findings((fine, broken), (Redraw("again", 1, 1),), fine, tolerance)
        assert not findings.is_equal and findings.worst is broken
    assert Findings((fine,), (), fine, EXACT).is_equal


def test_up_to_stop():
    assert up_to_stop([4, 7, 5, 7], [9, 7]) == [4, 7]
    assert up_to_stop([4, 5], [7]) == [4, 5]


def test_samples_that_are_drawn_again_end_at_different_times(llama):
    for again in generate(llama, WORK).sampled_again.values():
        assert len({len(sample.response_ids) for sample in again}) > 3


def test_left_pad():
    ids, mask = left_pad([torch.tensor([5, 6, 7]), torch.tensor([8])], pad_id=PAD)
    assert ids.tolist() == [[5, 6, 7], [PAD, PAD, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
