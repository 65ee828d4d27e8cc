"""Experience of three ranks put together; the ranks are a list here (real ones: tests/training/test_distributed.py)."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from training.step3_rlhf import experience
from training.step3_rlhf.experience import Experience, gather_experience, gather_scores, pack

ALL = ["generation_logprobs", "logprobs", "reference_logprobs", "values"]
PROMPTS = list(torch.arange(2_000_000).split([3, 2, 4, 1, 1_999_990]))[:4]  # views of the tokens of a large data set
SHARES = [[2, 0], [], [3, 1]]
"""Samples by rank; the second one has none."""


def experience_of(index: int) -> Experience:
    drawn = torch.Generator().manual_seed(index)
    response = torch.randint(0, 50_000, (index + 1,), generator=drawn)
    numbers = [torch.randn(index + 1, generator=drawn) for _ in range(4)]
    score = float(torch.randn(1, generator=drawn))
    return Experience(index, PROMPTS[index], response, numbers[0], index % 2 == 0, *numbers[1:], score)


def everything(e: Experience) -> dict[str, Any]:
    return {name: v.tolist() if isinstance(v, torch.Tensor) else v for name, v in vars(e).items()}


def ranks_that_send(parts: list[torch.Tensor]) -> Any:
    return SimpleNamespace(size=len(parts), gather_flat=lambda values, phase: parts)


def test_all_samples_of_all_ranks_come_in_order_bit_for_bit_with_the_prompts_that_are_there():
    sent = [pack([experience_of(i) for i in share], ALL, with_tokens=True) for share in SHARES]
    got = gather_experience(ranks_that_send(sent), [], PROMPTS, ALL)
    assert [everything(e) for e in got] == [everything(experience_of(i)) for i in range(4)]
    assert [e.prompt.data_ptr() for e in got] == [prompt.data_ptr() for prompt in PROMPTS]
    # rank 0: 1 word that counts, 4 of each of 2 samples, and an id and 4 numbers for each of 3 + 1 tokens
    assert [len(words) for words in sent] == [1 + 4 * 2 + 5 * 4, 1, 1 + 4 * 2 + 5 * 6]


def test_after_generation_there_are_its_own_log_probabilities_and_nothing_else():
    sent = [pack([experience_of(i) for i in share], ALL[:1], with_tokens=True) for share in SHARES]
    for e in gather_experience(ranks_that_send(sent), [], PROMPTS, ALL[:1]):
        assert torch.equal(e.generation_logprobs, experience_of(e.index).generation_logprobs)
        assert torch.equal(e.logprobs, e.generation_logprobs)
        assert torch.equal(e.values, torch.zeros(e.index + 1)) and torch.equal(e.reference_logprobs, e.values)


@pytest.mark.parametrize("with_scores", [True, False])
@pytest.mark.parametrize("numbers", [["reference_logprobs", "values"], ["logprobs", "reference_logprobs"], []])
def test_scores_go_to_the_samples_that_every_rank_has(numbers, with_scores):
    known = [dataclasses.replace(experience_of(i), score=9.0, **dict.fromkeys(ALL, torch.zeros(0))) for i in range(4)]
    sent = [pack([experience_of(i) for i in share], numbers, with_tokens=False) for share in SHARES]
    scored = gather_scores(ranks_that_send(sent), [], known, [*numbers, *["scores"] * with_scores])
    assert len(scored) == len(known)
    for e in scored:
        expected = everything(experience_of(e.index)) | ({} if with_scores else {"score": 9.0})
        assert everything(e) == {**expected, **{name: [] for name in ALL if name not in numbers}}
    assert [len(words) for words in sent] == [9 + 4 * len(numbers), 1, 9 + 6 * len(numbers)]  # no response ids


def test_one_rank_keeps_what_it_has(monkeypatch):
    monkeypatch.setattr(experience, "pack", None)
    ours = [experience_of(i) for i in (1, 0)]
    assert gather_experience(SimpleNamespace(size=1), ours, PROMPTS, ALL) == [ours[1], ours[0]]
