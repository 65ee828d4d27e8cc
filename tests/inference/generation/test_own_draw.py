"""Samples with settings and seeds of their own, drawn side by side."""

import pytest
import torch

from inference.families import build_tiny_model
from inference.generation.engine import GenerationEngine
from inference.generation.sampler import OwnDraw, OwnSample, Sample, SamplingKey, SamplingSettings

ENDS, PADS, SLOTS, ROOM = (1, *range(100, 180)), 0, 3, 64
SETTINGS = [
    SamplingSettings(20, 1.0),
    SamplingSettings(12, 0.0),
    SamplingSettings(16, 0.7, top_p=0.8),
    SamplingSettings(9, 1.3, top_k=20),
    SamplingSettings(20, 1.0, min_tokens=15),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("own")
    build_tiny_model(directory)
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def requested(place: int) -> OwnSample:
    prompt = torch.arange(5, 9 + 3 * place)
    key = SamplingKey(100 + place, iteration=place % 2)
    return OwnSample(place % 2, prompt, SETTINGS[place].max_tokens, settings=SETTINGS[place], key=key)


def test_each_gets_what_it_gets_by_itself(model):
    expected = []
    for place in range(len(SETTINGS)):
        sample, engine = requested(place), GenerationEngine(model, ENDS, PADS, slots=1, graphs=False)
        (drawn,) = engine.generate([sample.prompt_ids], sample.settings, sample.key, [sample.index])
        expected.append(drawn.response_ids)
    engine = GenerationEngine(model, ENDS, PADS, SLOTS, graphs=False)
    decoding = engine.start_with(OwnDraw(ENDS), [], (SLOTS, ROOM))
    assert decoding.is_over and decoding.step(1) == []
    samples = [requested(place) for place in range(len(SETTINGS))]
    for sample in samples[:2]:
        decoding.enqueue(sample)
    for _ in range(4):
        decoding.step(1)
    for sample in samples[2:]:  # come while others run; the last two wait for a slot
        decoding.enqueue(sample)
    assert len(decoding.unfinished) == 5
    steps = 0
    while not decoding.is_over:
        assert len(decoding.step(1)) <= SLOTS
        steps += 1
    assert [sample.response_ids for sample in samples] == expected
    assert steps < sum(map(len, expected))  # side by side


def test_a_sample_without_settings_is_refused(model):
    decoding = GenerationEngine(model, ENDS, PADS, 1, graphs=False).start_with(OwnDraw(ENDS), [], (1, ROOM))
    decoding.enqueue(Sample(0, torch.tensor([5]), 3))
    with pytest.raises(TypeError, match="OwnSample"):
        decoding.step(1)
