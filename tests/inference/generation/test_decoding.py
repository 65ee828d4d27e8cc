"""Samples that change their engine in the middle of a response go on as if they had stayed."""

import pytest
import torch

from inference.generation.engine import GenerationEngine
from inference.generation.sampler import Sample, SamplingKey, SamplingSettings
from tests.inference.generation.test_engine import END, PAD, VOCABULARY, build_model

KEY = SamplingKey(seed=3, iteration=2)
SETTINGS = SamplingSettings(max_tokens=14, temperature=0.9, top_k=40)
PROMPTS = [
    torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length))
    for length in (5, 9, 3, 7, 4)
]


def make_samples(places):
    return [Sample(place, PROMPTS[place], SETTINGS.max_tokens) for place in places]


def finish(*decodings):
    """All samples that end in any of them, by their index."""
    over = {}
    for decoding in decodings:
        while not decoding.is_over:
            over |= {sample.index: sample for sample in decoding.step() if sample.is_over}
    return over


def undisturbed(model):
    engine = GenerationEngine(model, END, PAD)
    return {sample.index: sample for sample in engine.generate(PROMPTS, SETTINGS, KEY)}


@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
@pytest.mark.parametrize("with_cache", [True, False])
@pytest.mark.parametrize("slots", [2, 8])  # with 2 the receiver is full: what arrives waits and is prefilled again
def test_samples_move_in_the_middle_of_a_response(family, with_cache, slots):
    model = build_model(family)
    expected = undisturbed(model)
    giver, taker = (GenerationEngine(model, END, PAD, slots) for _ in range(2))
    giving = giver.start(make_samples([0, 1, 2]), SETTINGS, KEY, room=(5, 40))
    taking = taker.start(make_samples([3, 4]), SETTINGS, KEY, room=(5, 40))
    over = {}
    for decoding, steps in ((giving, 4), (taking, 3)):
        for _ in range(steps):
            over |= {sample.index: sample for sample in decoding.step() if sample.is_over}
    moved = [sample for sample in giving.unfinished if sample.index in (0, 2)]
    assert moved, "the test needs samples that are still running"
    kept = giving.take(moved, with_cache)
    running = [sample for sample in moved if sample.response_ids]
    assert [numbers is not None for numbers in kept] == [with_cache and sample in running for sample in moved]
    for sample, numbers in zip(moved, kept, strict=True):
        copy = Sample(sample.index, sample.prompt_ids, sample.limit, [*sample.response_ids], [*sample.logprobs])
        taking.add(copy, numbers)
    over |= finish(giving, taking)
    assert {index: sample.response_ids for index, sample in over.items()} == {
        index: sample.response_ids for index, sample in expected.items()
    }
    for index, sample in over.items():
        assert sample.logprobs == pytest.approx(expected[index].logprobs, abs=1e-5)
        assert sample.ended == expected[index].ended


def test_the_cache_of_a_row_travels_whole():
    engine = GenerationEngine(build_model("llama"), END, PAD)
    decoding = engine.start(make_samples([0, 1]), SETTINGS, KEY)
    for _ in range(3):
        decoding.step()
    cache, length = engine.cache, decoding.scheduler.running[1].length - 1
    numbers = cache.read(1, length)
    assert numbers.shape == cache.empty(length).shape
    with torch.inference_mode():
        cache.write(0, length, numbers)
    for part in (cache.keys, cache.values):
        for kept in part.values():
            assert torch.equal(kept[0, :, :length], kept[1, :, :length])
            assert kept[1, :, :length].abs().sum() > 0


def test_the_work_of_each_step_is_told():
    decoding = GenerationEngine(build_model("llama"), END, PAD).start(make_samples([0, 2]), SETTINGS, KEY)
    decoding.step()
    assert (decoding.work.prefilled, decoding.work.rows) == (5 + 3, 0)
    decoding.step()
    assert (decoding.work.prefilled, decoding.work.rows, decoding.work.context) == (0, 2, 5 + 3)
    decoding.step()
    assert decoding.work.context == 5 + 3 + 2
