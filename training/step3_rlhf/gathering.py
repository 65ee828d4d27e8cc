"""The experience of all ranks on every rank: one flat tensor of 32-bit words each, nothing pickled.

Every rank has all prompts, so that none travels: what is sent grows with the responses alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from training.distributed import Ranks
from training.step3_rlhf.experience import Experience

WORDS = torch.int32
PER_SAMPLE = 4
"""Index, whether it ended, tokens of its response, score."""


def gather_experience(
    ranks: Ranks, ours: list[Experience], prompts: Sequence[Tensor], numbers: Sequence[str]
) -> list[Experience]:
    """Samples of all ranks, in order. `numbers` are the keys of a number a token that they have; others are made anew
    from these. `prompts` are those of all samples, by index."""
    if ranks.size == 1:
        return in_order(ours)
    found: list[Experience] = []
    for words in ranks.gather_flat(pack(ours, numbers, with_tokens=True), "the samples of an iteration"):
        index, ended, lengths, scores, tokens = unpack(words, 1 + len(numbers))
        ids, *rows = [tokens[0].long().split(lengths), *(row.view(torch.float32).split(lengths) for row in tokens[1:])]
        zeros = torch.zeros(sum(lengths)).split(lengths)
        for place, prompt in enumerate(prompts[i] for i in index):
            of_token = {name: row[place] for name, row in zip(numbers, rows, strict=True)}
            generated = of_token["generation_logprobs"]
            found.append(
                Experience(
                    index[place],
                    prompt,
                    ids[place],
                    generated,
                    bool(ended[place]),
                    of_token.get("logprobs", generated),
                    of_token.get("reference_logprobs", zeros[place]),
                    of_token.get("values", zeros[place]),
                    scores[place],
                )
            )
    return in_order(found)


def gather_scores(
    ranks: Ranks, ours: list[Experience], experience: list[Experience], numbers: Sequence[str]
) -> list[Experience]:
    """`experience`, which every rank has in order, with the `numbers` that ranks have found for `ours`: `scores`, one
    a sample, and the keys of such a token."""
    of_tokens, with_scores = [name for name in numbers if name != "scores"], "scores" in numbers
    scored = list(experience)
    for words in ranks.gather_flat(pack(ours, of_tokens, with_tokens=False), "the scores of an iteration"):
        index, _, lengths, scores, tokens = unpack(words, len(of_tokens))
        rows = [row.view(torch.float32).split(lengths) for row in tokens]
        for place, i in enumerate(index):
            found: dict[str, Any] = {name: row[place] for name, row in zip(of_tokens, rows, strict=True)}
            if with_scores:
                found["score"] = scores[place]
            scored[i] = replace(experience[i], **found)
    return scored


def pack(ours: list[Experience], numbers: Sequence[str], with_tokens: bool) -> Tensor:
    """How many samples; PER_SAMPLE words of each, key by key; response ids if wanted; each of the `numbers`."""
    counted = torch.tensor(
        [[e.index for e in ours], [e.ended for e in ours], [len(e.response) for e in ours]], dtype=WORDS
    )
    scores = torch.tensor([e.score for e in ours], dtype=torch.float32).view(WORDS)
    parts = [torch.tensor([len(ours)], dtype=WORDS), counted.flatten(), scores]
    if ours:
        parts += [torch.cat([e.response for e in ours]).to(WORDS)] if with_tokens else []
        parts += [torch.cat([getattr(e, name) for e in ours]).float().view(WORDS) for name in numbers]
    return torch.cat(parts)


def unpack(words: Tensor, rows: int) -> tuple[list[int], list[int], list[int], list[float], Tensor]:
    """Index, ended, tokens and score of each sample; words of all tokens (rows, tokens)."""
    samples = int(words[0])
    head = 1 + PER_SAMPLE * samples
    of_samples = words[1:head].view(PER_SAMPLE, samples)
    index, ended, lengths = of_samples[:3].tolist()
    return index, ended, lengths, of_samples[3].view(torch.float32).tolist(), words[head:].view(rows, sum(lengths))


def in_order(experience: list[Experience]) -> list[Experience]:
    return sorted(experience, key=lambda e: e.index)
