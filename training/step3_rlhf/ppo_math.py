"""The mathematics of PPO for language models, as pure functions of tensors.

Names are those of the papers: PPO (Schulman et al. 2017, arXiv 1707.06347), the KL estimators k1 and k3 (Schulman 2020,
"Approximating KL divergence"), GRPO (Shao et al. 2024, arXiv 2402.03300), DAPO (Yu et al. 2025, arXiv 2503.14476), Dr.
GRPO (Liu et al. 2025, arXiv 2503.20783), GSPO (Zheng et al. 2025, arXiv 2507.18071). Advantages are in
training.formulas.estimators. Padded tensors have the shape (samples, tokens) with a bool mask of the same shape, True
on response tokens, which are flush left; flat ones have the shape (tokens). All are float32.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0  # exp stays finite


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the masked entries; a scalar."""
    return (values * mask).sum() / mask.sum()


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Scale masked entries to mean 0 and standard deviation 1, zeros elsewhere; the mean is *not* added back."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean).square(), mask)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def kl_k1(logprobs: Tensor, other: Tensor) -> Tensor:
    """k1 estimate of KL(p | other) for tokens drawn from p: unbiased, may be negative."""
    return logprobs - other


def kl_k3(logprobs: Tensor, other: Tensor) -> Tensor:
    """k3 estimate of KL(p | other) for tokens drawn from p: unbiased, never negative, of low variance."""
    logratio = (other - logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return torch.expm1(logratio) - logratio


def kl_penalty(logprobs: Tensor, reference: Tensor, mask: Tensor, coefficient: float, centering: float = 0.0) -> Tensor:
    """Return coefficient * k1 on every token; (samples, tokens).

    `centering` is the share of the mean k1 of all tokens that is taken off each: at 1 an average token costs nothing,
    so a response gains nothing by being short.
    """
    kl = kl_k1(logprobs, reference)
    return coefficient * (kl - centering * masked_mean(kl, mask)) * mask


def correlation(first: Tensor, second: Tensor) -> float:
    """Return Pearson's; 0 where one of the two does not vary."""
    a, b = first - first.mean(), second - second.mean()
    spread = a.norm() * b.norm()
    return float((a * b).sum() / spread) if spread > 0 else 0.0


def policy_ratio(logprobs: Tensor, old_logprobs: Tensor, lengths: list[int] | None = None) -> Tensor:
    """Return pi / pi_old of each token; flat tensors.

    With the `lengths` of the samples it is that of the whole sample, the geometric mean of its tokens' (GSPO, equation
    7). Each token then has the gradient of its own log-probability, times that (GSPO-token, equation 14).
    """
    logratio = logprobs - old_logprobs
    if lengths is not None:
        means = [sample.mean().expand(len(sample)) for sample in logratio.detach().split(lengths)]
        logratio = torch.cat(means) + (logprobs - logprobs.detach())
    return logratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def policy_loss(ratio: Tensor, advantages: Tensor, clip: float, clip_high: float) -> Tensor:
    """Return PPO's clipped surrogate, equation 7, token by token; flat tensors.

    The ratio is clipped from 1 - `clip` to 1 + `clip_high` (DAPO, section 3.1).
    """
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip_high))


def token_weights(lengths: list[int], mean: str, average: float, longest: int) -> Tensor:
    """Return the weights of the tokens of samples of these `lengths` in the actor's loss, which is divided by all
    tokens of the optimiser step; `average` are those a sample. Flat.

    `token`: all count the same (DAPO, section 3.3). `sequence`: the mean over samples of each one's mean (GRPO,
    equation 3). `constant`: the mean over samples of each one's sum over the `longest` length (Dr. GRPO).
    """
    of_samples = {
        "token": [1.0] * len(lengths),
        "sequence": [average / length for length in lengths],
        "constant": [average / longest] * len(lengths),
    }
    weights = zip(of_samples[mean], lengths, strict=True)
    return torch.tensor([weight for weight, length in weights for _ in range(length)])


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Return the half squared error, clipped around the old prediction (clip 0: not clipped), summed; and where
    clipping acted."""
    unclipped = (values - returns).square()
    if clip == 0:
        return 0.5 * unclipped.sum(), torch.zeros_like(values, dtype=torch.bool)
    outside = (values - old_values).abs() > clip  # inside, rounding alone would tell the two apart
    clipped = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    acted = outside & (clipped > unclipped)
    return 0.5 * torch.maximum(unclipped, clipped).sum(), acted


@dataclass(frozen=True)
class Loss:
    """Holds the loss of some tokens, summed, and what it reports by the names of the metrics."""

    total: Tensor
    sums: dict[str, Tensor]
    """Values whose mean is the metric, token by token or summed."""
    largest: dict[str, Tensor] = field(default_factory=dict)
    """Values whose largest is the metric, token by token."""


def actor_loss(
    logprobs: Tensor,
    entropy: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip: float,
    clip_high: float,
    kl_coefficient: float | None,
    lengths: list[int] | None = None,
) -> Loss:
    """Sum the clipped surrogate and, unless it is in the rewards (`kl_coefficient` None), the KL penalty (k3); flat.

    `weights` are those of `token_weights`, `lengths` those of samples whose whole ratios are taken.
    """
    ratio = policy_ratio(logprobs, old_logprobs, lengths)
    loss = (weights * policy_loss(ratio, advantages, clip, clip_high)).sum()
    sums = {
        "policy/loss": loss,
        "policy/entropy": entropy,
        "policy/ratio_mean": ratio,
        "policy/clip_fraction": ((ratio < 1 - clip) | (ratio > 1 + clip_high)).float(),
        "kl/old_k1": kl_k1(old_logprobs, logprobs),
        "kl/old_k3": kl_k3(old_logprobs, logprobs),
    }
    if kl_coefficient is not None:
        penalty = kl_coefficient * weights * kl_k3(logprobs, reference_logprobs)
        loss = loss + penalty.sum()
        sums["policy/kl_penalty"] = penalty
    return Loss(loss, sums, {"policy/ratio_max": ratio, "policy/log_ratio_max": (logprobs - old_logprobs).abs()})


def critic_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Loss:
    """Sum the clipped squared error; flat tensors."""
    loss, clipped = value_loss(values, old_values, returns, clip)
    return Loss(loss, {"value/loss": loss, "value/clip_fraction": clipped.float()})


def ptx_loss(logprobs: Tensor, demonstrated: int, tokens: int) -> Loss:
    """Return the negative log-likelihood of demonstrations (InstructGPT's PPO-ptx), a mean over `demonstrated` tokens
    of an optimiser step. It is reported times `tokens`, by which all sums of that step are divided; flat.
    """
    loss = -logprobs.sum() / demonstrated
    return Loss(loss, {"ptx/loss": loss * tokens})


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns): 1 is perfect, 0 no better than a constant, negative is worse."""
    errors, targets = (returns - values)[mask], returns[mask]
    variance = targets.var(correction=0)
    return float(1 - errors.var(correction=0) / variance) if variance > 0 else 0.0


@dataclass
class KLController:
    """Adapts the weight of the KL penalty to a target, if there is one, by Ziegler et al. 2019 (arXiv 1909.08593),
    section 2.2."""

    coefficient: float
    target: float
    horizon: float

    def update(self, kl: float, samples: int) -> None:
        """Adapt it after an iteration of `samples` samples whose mean KL was `kl` nats a response."""
        if self.target:
            error = max(-0.2, min(0.2, kl / self.target - 1))
            self.coefficient *= 1 + error * min(1.0, samples / self.horizon)
