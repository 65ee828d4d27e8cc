"""Scored samples of one iteration, gathered from all ranks, and what PPO makes of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inference.generation.sampler import Sample
from training.data.batching import TokenBatch
from training.distributed import Ranks
from training.formulas.estimators import ESTIMATORS, Scored
from training.formulas.own import loaded
from training.rlhf_settings import RLHFSettings
from training.step3_rlhf import ppo_math

ROUNDING = 1e-5
"""Scores of a group that differ by less than this share of the largest one are alike."""


@dataclass(frozen=True)
class Experience:
    """Holds one sample with all that PPO needs of it; tensors on the CPU, (response tokens) unless said otherwise.

    What is added later makes a copy (`dataclasses.replace`).
    """

    index: int
    prompt: Tensor  # (prompt tokens) int64
    response: Tensor  # int64
    generation_logprobs: Tensor
    ended: bool
    logprobs: Tensor
    """Those of the policy that generated it: the `old` ones of PPO."""
    reference_logprobs: Tensor
    values: Tensor
    score: float
    """That of the reward model; once the other sources are asked, what PPO raises (training.rewards). No penalty in
    it."""

    @classmethod
    def of(cls, sample: Sample) -> "Experience":
        zeros = torch.zeros(len(sample.response_ids))
        return cls(
            index=sample.index,
            prompt=sample.prompt_ids,
            response=torch.tensor(sample.response_ids),
            generation_logprobs=torch.tensor(sample.logprobs),
            ended=sample.ended,
            logprobs=torch.tensor(sample.logprobs),
            reference_logprobs=zeros,
            values=zeros.clone(),
            score=0.0,
        )

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt) + len(self.response)


def token_batch(experience: list[Experience], device: torch.device) -> TokenBatch:
    """Return prompts and responses as the models read them."""
    return TokenBatch.of([(e.prompt, e.response) for e in experience], device)


@dataclass(frozen=True)
class Targets:
    """Holds what the losses of one iteration aim at; (samples, tokens) each, response tokens flush left."""

    mask: Tensor
    logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    total_score: Tensor  # (samples), the penalty for a missing end taken off
    kl_penalty: Tensor  # (samples), in the rewards or in the loss
    advantages: Tensor
    returns: Tensor
    """What the critic aims at; of no use without one."""
    lengths: list[int]
    """Response tokens of the samples."""

    @classmethod
    def of(cls, experience: list[Experience], settings: RLHFSettings, kl_coefficient: float) -> "Targets":
        """Compute KL penalty, score, advantages and whitening over the whole batch, which every rank holds."""
        logprobs = pad([e.logprobs for e in experience])
        reference = pad([e.reference_logprobs for e in experience])
        values = pad([e.values for e in experience])
        mask = pad([torch.ones(len(e.response)) for e in experience]).bool()
        score = torch.tensor([total_score(e, settings) for e in experience])
        in_loss, estimator = settings.kl_in_loss, loaded(ESTIMATORS, settings.advantage)
        centering = 0.0 if in_loss else settings.kl.centering
        penalty = ppo_math.kl_penalty(logprobs, reference, mask, kl_coefficient, centering)
        in_rewards = torch.zeros_like(penalty) if in_loss else penalty
        group, gamma, lam = settings.samples_per_prompt, settings.gamma, settings.lam
        advantages = estimator.advantages(Scored(score, in_rewards, values, mask, group, gamma, lam))
        returns = advantages + values  # before whitening
        if settings.whiten_advantages and estimator.whiten:
            advantages = ppo_math.whiten(advantages, mask)
        lengths = [len(e.response) for e in experience]
        return cls(mask, logprobs, reference, values, score, penalty.sum(1), advantages, returns, lengths)

    def of_tokens(self, rows: list[int], device: torch.device) -> "TokenTargets":
        """Return the targets of some samples, token by token."""

        def flat(padded: Tensor) -> Tensor:
            return torch.cat([padded[row, : self.lengths[row]] for row in rows]).to(device, non_blocking=True)

        return TokenTargets(
            flat(self.logprobs),
            flat(self.reference_logprobs),
            flat(self.values),
            flat(self.advantages),
            flat(self.returns),
        )

    def metrics(self, experience: list[Experience], settings: RLHFSettings, kl_coefficient: float) -> dict[str, float]:
        """Return the metrics of the rollout, by the names that users of such trainers know."""
        lengths = torch.tensor([float(len(e.response)) for e in experience])
        metrics = {
            "reward/scaled_std": float(torch.tensor([e.score for e in experience]).std(correction=0)),
            "reward/total": float((self.total_score - self.kl_penalty).mean()),
            "advantage/mean": float(ppo_math.masked_mean(self.advantages, self.mask)),
            "advantage/std": float(self.advantages[self.mask].std(correction=0)),
            "response/length_mean": float(lengths.mean()),
            "response/length_max": float(lengths.max()),
            "response/ended_fraction": sum(e.ended for e in experience) / len(experience),
        }
        if settings.has_reference:
            k1 = ppo_math.kl_k1(self.logprobs, self.reference_logprobs)
            k3 = ppo_math.kl_k3(self.logprobs, self.reference_logprobs) * self.mask
            metrics |= {
                "kl/reference": float(k3.sum(1).mean()),
                "kl/reference_k1": float((k1 * self.mask).sum(1).mean()),
                "kl/reference_per_token": float(ppo_math.masked_mean(k3, self.mask)),
                "kl/coefficient": kl_coefficient,
            }
        if settings.has_critic:
            metrics |= {
                "returns/mean": float(ppo_math.masked_mean(self.returns, self.mask)),
                "value/mean": float(ppo_math.masked_mean(self.values, self.mask)),
                "value/explained_variance": ppo_math.explained_variance(self.values, self.returns, self.mask),
            }
        if settings.samples_per_prompt > 1:
            by_prompt = torch.tensor([e.score for e in experience]).view(-1, settings.samples_per_prompt)
            apart = by_prompt.amax(1) - by_prompt.amin(1)
            metrics["reward/group_std"] = float(by_prompt.std(1, correction=0).mean())
            metrics["reward/groups_alike"] = float((apart <= ROUNDING * by_prompt.abs().max()).float().mean())
        return metrics


@dataclass(frozen=True)
class TokenTargets:
    """Holds the targets of some samples, one behind the other; (response tokens) each."""

    logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


def score_metrics(raw: list[float], experience: list[Experience]) -> dict[str, float]:
    """Return the metrics of the scores as their sources gave them, neither normalised nor clipped."""
    scores = torch.tensor(raw)
    return {
        "reward/score_mean": float(scores.mean()),
        "reward/score_std": float(scores.std(correction=0)),
        "reward/score_min": float(scores.min()),
        "reward/score_max": float(scores.max()),
        "reward/length_correlation": ppo_math.correlation(
            scores, torch.tensor([float(len(e.response)) for e in experience])
        ),
    }


def total_score(experience: Experience, settings: RLHFSettings) -> float:
    """Return the score, less the penalty for a response that did not end."""
    return experience.score - (0.0 if experience.ended else settings.missing_end_penalty)


def pad(rows: list[Tensor]) -> Tensor:
    """Pad (length) float rows to (rows, longest), with zeros on the right."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


WORDS = torch.int32
PER_SAMPLE = 4
"""Index, whether it ended, tokens of its response, score."""


def gather_experience(
    ranks: Ranks, ours: list[Experience], prompts: Sequence[Tensor], numbers: Sequence[str]
) -> list[Experience]:
    """Return the samples of all ranks, in order: one flat tensor of 32-bit words each, nothing pickled, no prompts.
    `numbers` are the keys of a number a token that they have; the others are made from these. `prompts` are those of
    all samples, by index."""
    if ranks.size == 1:
        return in_order(ours)
    gathered: list[Experience] = []
    for words in ranks.gather_flat(pack(ours, numbers, with_tokens=True), "the samples of an iteration"):
        index, ended, lengths, scores, tokens = unpack(words, 1 + len(numbers))
        ids, *rows = [tokens[0].long().split(lengths), *(row.view(torch.float32).split(lengths) for row in tokens[1:])]
        zeros = torch.zeros(sum(lengths)).split(lengths)
        for i in range(len(index)):
            of_token = {name: row[i] for name, row in zip(numbers, rows, strict=True)}
            generated = of_token["generation_logprobs"]
            gathered.append(
                Experience(
                    index[i],
                    prompts[index[i]],
                    ids[i],
                    generated,
                    bool(ended[i]),
                    of_token.get("logprobs", generated),
                    of_token.get("reference_logprobs", zeros[i]),
                    of_token.get("values", zeros[i]),
                    scores[i],
                )
            )
    return in_order(gathered)


def gather_scores(
    ranks: Ranks, ours: list[Experience], experience: list[Experience], numbers: Sequence[str]
) -> list[Experience]:
    """Return `experience`, which every rank has in order, with the `numbers` that ranks have for `ours`: `scores`, one
    a sample, and the keys of a number a token."""
    of_tokens, with_scores = [name for name in numbers if name != "scores"], "scores" in numbers
    scored = list(experience)
    for words in ranks.gather_flat(pack(ours, of_tokens, with_tokens=False), "the scores of an iteration"):
        index, _, lengths, scores, tokens = unpack(words, len(of_tokens))
        rows = [row.view(torch.float32).split(lengths) for row in tokens]
        for i, sample in enumerate(index):
            values: dict[str, Any] = {name: row[i] for name, row in zip(of_tokens, rows, strict=True)}
            if with_scores:
                values["score"] = scores[i]
            scored[sample] = replace(experience[sample], **values)
    return scored


def pack(ours: list[Experience], numbers: Sequence[str], with_tokens: bool) -> Tensor:
    """Pack the number of samples; PER_SAMPLE words of each, key by key; response ids if wanted; the `numbers`."""
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
    """Return index, ended, tokens and score of each sample, and the words of all tokens (rows, tokens)."""
    samples = int(words[0])
    head = 1 + PER_SAMPLE * samples
    of_samples = words[1:head].view(PER_SAMPLE, samples)
    index, ended, lengths = of_samples[:3].tolist()
    return index, ended, lengths, of_samples[3].view(torch.float32).tolist(), words[head:].view(rows, sum(lengths))


def in_order(experience: list[Experience]) -> list[Experience]:
    return sorted(experience, key=lambda e: e.index)
