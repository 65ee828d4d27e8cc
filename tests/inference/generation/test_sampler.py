"""Random numbers and drawing: against textbook statistics and a second, plain Python implementation."""

import math

import pytest
import torch

from inference.generation import sampler
from inference.generation.sampler import SamplingKey, SamplingSettings, restrict, sample_tokens, uniform

KEY = SamplingKey(seed=3, iteration=5)
MASK = 2**64 - 1


def draw(count: int, key: SamplingKey = KEY, position: int = 0) -> torch.Tensor:
    return uniform(key, torch.arange(count), torch.full((count,), position))


def chi_square(observed: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


def splitmix_uniform(key: SamplingKey, sample: int, position: int) -> float:
    """uniform() in unbounded Python integers, with the constants of the paper."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
        return x ^ (x >> 31)

    state = mix(key.seed + 0x9E3779B97F4A7C15 & MASK)
    for word in (key.iteration, sample, position):
        state = mix(state + word + 0x9E3779B97F4A7C15 & MASK)
    return (state >> 11) / 2**53


def test_uniform_equals_the_integer_arithmetic():
    drawn = uniform(KEY, torch.tensor([0, 1, 77]), torch.tensor([0, 9, 1000]))
    expected = [splitmix_uniform(KEY, 0, 0), splitmix_uniform(KEY, 1, 9), splitmix_uniform(KEY, 77, 1000)]
    assert drawn.tolist() == expected


@pytest.mark.parametrize("along", ["samples", "positions", "iterations", "seeds"])
def test_uniform_is_uniform_along_each_coordinate(along):
    count, zeros = 20_000, torch.zeros(20_000, dtype=torch.long)
    steps = torch.arange(count)
    if along == "samples":
        drawn = uniform(KEY, steps, zeros)
    elif along == "positions":
        drawn = uniform(KEY, zeros, steps)
    else:
        keys = [SamplingKey(seed=i) if along == "seeds" else SamplingKey(3, iteration=i) for i in range(2_000)]
        drawn = torch.cat([uniform(key, steps[:10], zeros[:10]) for key in keys])
    assert drawn.min() >= 0 and drawn.max() < 1
    cells = torch.histc(drawn, bins=50, min=0, max=1)
    assert chi_square(cells, torch.full((50,), count / 50)) < 85.4  # 49 degrees of freedom, p = 0.001
    # Neighbours are independent: their correlation is within 4 standard errors of 0.
    assert abs(float(torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1])) < 4 / math.sqrt(count)


def test_uniform_differs_in_each_coordinate():
    base = draw(100)
    others = [draw(100, SamplingKey(4, 5)), draw(100, SamplingKey(3, 6)), draw(100, position=1)]
    assert len({*base.tolist(), *(x for other in others for x in other.tolist())}) == 400
    assert torch.equal(base, draw(100))


def test_frequencies_match_the_probabilities():
    probabilities = torch.tensor([0.5, 0.0, 0.25, 0.15, 0.1])
    rows = 20_000
    logits = probabilities.log().expand(rows, -1)
    settings = SamplingSettings(max_tokens=1)
    tokens, logprobs = sample_tokens(logits, settings, KEY, torch.arange(rows), torch.zeros(rows).long(), end_ids=(0,))
    counts = torch.bincount(tokens, minlength=5).double()
    assert counts[1] == 0
    possible = probabilities > 0
    assert chi_square(counts[possible], probabilities[possible] * rows) < 16.3  # 3 degrees of freedom, p = 0.001
    torch.testing.assert_close(logprobs, probabilities[tokens].log())


@pytest.mark.parametrize("number, expected", [(0.0, 1), (1 - 2**-53, 2)])
def test_the_ends_of_the_interval_draw_no_impossible_token(monkeypatch, number, expected):
    monkeypatch.setattr(sampler, "uniform", lambda key, sample, position: torch.full((1,), number, dtype=torch.double))
    logits = torch.tensor([[0.0, 0.3, 0.7, 0.0]]).log()
    tokens, _ = sample_tokens(
        logits, SamplingSettings(max_tokens=1), KEY, torch.zeros(1).long(), torch.zeros(1).long(), end_ids=(0,)
    )
    assert tokens.tolist() == [expected]


def test_temperature_sharpens_and_its_logprobs_are_those_of_the_draw():
    logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(10_000, -1)
    settings = SamplingSettings(max_tokens=1, temperature=0.5)
    tokens, logprobs = sample_tokens(
        logits, settings, KEY, torch.arange(10_000), torch.zeros(10_000).long(), end_ids=(0,)
    )
    weights = [math.exp(4), math.exp(2), 1.0]  # logits / 0.5
    expected = torch.tensor([weight / sum(weights) for weight in weights])
    assert chi_square(torch.bincount(tokens, minlength=3), expected * 10_000) < 13.8  # 2 degrees of freedom, p = 0.001
    torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_greedy_takes_the_likeliest_at_temperature_one():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 0.0]])
    tokens, logprobs = sample_tokens(
        logits, SamplingSettings(max_tokens=1, temperature=0), KEY, torch.arange(2), torch.zeros(2).long(), end_ids=(0,)
    )
    assert tokens.tolist() == [1, 0]
    e = math.e
    expected = [math.log(e**3 / (1 + e**3 + e)), math.log(e**2 / (e**2 + 2))]
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_some_rows_at_a_time_draw_what_all_do(monkeypatch, temperature):
    logits, index = torch.randn(7, 300, generator=torch.Generator().manual_seed(1)), torch.arange(7)
    settings = SamplingSettings(9, temperature=temperature, top_p=0.9, min_tokens=4)

    def draw():
        return sample_tokens(logits, settings, SamplingKey(3), index, index, end_ids=[2, 5])

    whole = draw()
    monkeypatch.setattr(sampler, "rows_at_once", lambda logits: 3)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(draw(), whole, strict=True))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_tokens_are_forbidden_before_the_minimum(temperature):
    logits = torch.tensor([[50.0, 0.0, 0.0, 40.0]]).expand(4, -1).clone()
    kept = logits.clone()
    settings = SamplingSettings(max_tokens=9, min_tokens=2, temperature=temperature)
    tokens, logprobs = sample_tokens(logits, settings, KEY, torch.arange(4), torch.arange(4), end_ids=(0, 3))
    assert (tokens == 0).tolist() == [False, False, True, True]
    torch.testing.assert_close(logprobs[:2], torch.full((2,), math.log(0.5)))
    assert torch.equal(logits, kept)  # the caller's logits are not changed


def restrict_by_hand(row: list[float], top_k: int, top_p: float) -> set[int]:
    """Tokens that stay: first the k likeliest, then, among these, the likeliest until their mass reaches top_p."""
    order = sorted(range(len(row)), key=lambda token: -row[token])
    if top_k:
        order = order[:top_k]
    total = sum(math.exp(row[token]) for token in order)
    kept: set[int] = set()
    mass = 0.0
    for token in order:
        kept.add(token)
        mass += math.exp(row[token]) / total
        if mass >= top_p:
            break
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 3, 7, 20, 50])
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_restrict_equals_brute_force(top_k, top_p):
    logits = torch.randn(16, 20, generator=torch.Generator().manual_seed(top_k)) * 2
    result = restrict(logits, top_k, top_p)
    for before, after in zip(logits, result, strict=True):
        kept = {token for token in range(20) if after[token] > -math.inf}
        assert kept == restrict_by_hand(before.tolist(), top_k, top_p)
        assert all(after[token] == before[token] for token in kept)


def test_a_draw_never_leaves_the_restricted_set():
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(1)).expand(3_000, -1)
    settings = SamplingSettings(max_tokens=1, top_k=6, top_p=0.8)
    tokens, logprobs = sample_tokens(
        logits, settings, KEY, torch.arange(3_000), torch.zeros(3_000).long(), end_ids=(0,)
    )
    kept = restrict_by_hand(logits[0].tolist(), 6, 0.8)
    assert set(tokens.tolist()) == kept
    mass = sum(math.exp(logits[0, token]) for token in kept)
    expected = [float(logits[0, token]) - math.log(mass) for token in tokens[:50].tolist()]
    assert logprobs[:50].tolist() == pytest.approx(expected, abs=1e-5)
