"""Drawing for samples that come with settings and seeds of their own, side by side in one decoding."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inference.generation.sample import Sample, SamplingKey, SamplingSettings
from inference.generation.sampler import Draw, RowKeys, likeliest, sample_tokens


@dataclass(kw_only=True)
class OwnSample(Sample):
    """A sample that says how it is drawn. Its `limit` counts, not the settings' `max_tokens`."""

    settings: SamplingSettings
    key: SamplingKey
    alternatives: int = 0
    """Tokens beside which each drawn one is to be seen."""
    likeliest: list[list[tuple[int, float]]] = field(default_factory=list)
    """Of each response token so many likeliest ones with their log-probabilities, where `alternatives` are wanted."""


class OwnDraw(Draw):
    """Each `OwnSample` gets the tokens that a decoding of its own, with its settings and key, would give it."""

    def __init__(self, end_ids: tuple[int, ...]):
        super().__init__(SamplingSettings(max_tokens=0), SamplingKey(0), end_ids, may_end=True)

    def __call__(self, logits: Tensor, samples: Sequence[Sample]) -> None:
        rows_of: dict[SamplingSettings, list[int]] = {}
        own = [sample for sample in samples if isinstance(sample, OwnSample)]
        if len(own) != len(samples):
            raise TypeError("each sample must be an OwnSample")
        for row, sample in enumerate(own):
            rows_of.setdefault(sample.settings, []).append(row)
        for settings, rows in rows_of.items():
            drawn = [own[row] for row in rows]
            numbers = [(s.key.seed, s.key.iteration, s.index, len(s.response_ids)) for s in drawn]
            seed, iteration, index, position = torch.tensor(numbers, device=logits.device).T
            wanted = logits if len(rows) == len(own) else logits[rows]
            key = RowKeys(seed, iteration)
            tokens, logprobs = sample_tokens(wanted, settings, key, index, position, self.end_ids)
            for sample, token, logprob in zip(drawn, tokens.tolist(), logprobs.tolist(), strict=True):
                self.write(sample, token, logprob)
            if count := max(sample.alternatives for sample in drawn):
                for sample, tops in zip(drawn, likeliest(wanted, settings, count), strict=True):
                    sample.likeliest.append(tops[: sample.alternatives])
