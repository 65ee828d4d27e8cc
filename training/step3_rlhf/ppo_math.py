"""The mathematics of PPO for language models, as pure functions of tensors.

Names are those of the papers: PPO (Schulman et al. 2017, arXiv 1707.06347), the KL estimators k1 and k3 (Schulman 2020,
"Approximating KL divergence"). Advantages are in training.formulas.estimators. Padded tensors have the shape
(samples, tokens) with a bool mask of the same shape, True on response tokens, which are flush left; flat ones have the
shape (tokens). All are float32.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0  # exp stays finite


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the masked entries; a scalar."""
    return (values * mask).sum() / mask.sum()


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Masked entries with mean 0 and standard deviation 1, zeros elsewhere; the mean is *not* added back."""
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
    """coefficient * k1 on every token; (samples, tokens).

    `centering` is the share of the mean k1 of all tokens that is taken off each: at 1 an average token costs nothing,
    so a response gains nothing by being short.
    """
    kl = kl_k1(logprobs, reference)
    return coefficient * (kl - centering * masked_mean(kl, mask)) * mask


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's; 0 where one of the two does not vary."""
    a, b = first - first.mean(), second - second.mean()
    spread = a.norm() * b.norm()
    return float((a * b).sum() / spread) if spread > 0 else 0.0


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, equation 7, summed over tokens, and the ratio; flat tensors."""
    logratio = (logprobs - old_logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio = logratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(unclipped, clipped).sum(), ratio


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Half squared error, clipped around the old prediction (clip 0: not clipped), summed; and where clipping acted."""
    unclipped = (values - returns).square()
    if clip == 0:
        return 0.5 * unclipped.sum(), torch.zeros_like(values, dtype=torch.bool)
    outside = (values - old_values).abs() > clip  # inside, rounding alone would tell the two apart
    clipped = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    acted = outside & (clipped > unclipped)
    return 0.5 * torch.maximum(unclipped, clipped).sum(), acted


@dataclass(frozen=True)
class Loss:
    """The loss of some tokens, summed, and what is reported of it by the names of the metrics."""

    total: Tensor
    sums: dict[str, Tensor]
    """What the metric is a mean of, token by token or summed."""
    largest: dict[str, Tensor] = field(default_factory=dict)
    """What the metric is the largest value of, token by token."""


def actor_loss(
    logprobs: Tensor,
    entropy: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor,
    advantages: Tensor,
    clip: float,
    kl_coefficient: float | None,
) -> Loss:
    """The clipped surrogate and, unless it is in the rewards (`kl_coefficient` None), the KL penalty (k3); flat."""
    loss, ratio = policy_loss(logprobs, old_logprobs, advantages, clip)
    sums = {
        "policy/loss": loss,
        "policy/entropy": entropy,
        "policy/ratio_mean": ratio,
        "policy/clip_fraction": ((ratio - 1).abs() > clip).float(),
        "kl/old_k1": kl_k1(old_logprobs, logprobs),
        "kl/old_k3": kl_k3(old_logprobs, logprobs),
    }
    if kl_coefficient is not None:
        k3 = kl_k3(logprobs, reference_logprobs)
        loss = loss + kl_coefficient * k3.sum()
        sums["policy/kl_penalty"] = kl_coefficient * k3
    return Loss(loss, sums, {"policy/ratio_max": ratio, "policy/log_ratio_max": (logprobs - old_logprobs).abs()})


def critic_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Loss:
    """The clipped squared error; flat tensors."""
    loss, clipped = value_loss(values, old_values, returns, clip)
    return Loss(loss, {"value/loss": loss, "value/clip_fraction": clipped.float()})


def ptx_loss(logprobs: Tensor, demonstrated: int, tokens: int) -> Loss:
    """The negative log-likelihood of demonstrations (InstructGPT's PPO-ptx), a mean over the `demonstrated` tokens of
    an optimiser step. It is reported times `tokens`, by which all sums of that step are divided; flat.
    """
    loss = -logprobs.sum() / demonstrated
    return Loss(loss, {"ptx/loss": loss * tokens})


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is perfect, 0 no better than a constant, negative is worse."""
    errors, targets = (returns - values)[mask], returns[mask]
    variance = targets.var(correction=0)
    return float(1 - errors.var(correction=0) / variance) if variance > 0 else 0.0


@dataclass
class KLController:
    """Weight of the KL penalty; with a target it follows Ziegler et al. 2019 (arXiv 1909.08593), section 2.2."""

    coefficient: float
    target: float
    horizon: float

    def update(self, kl: float, samples: int) -> None:
        """After an iteration of `samples` samples whose mean KL was `kl` nats a response."""
        if self.target:
            error = max(-0.2, min(0.2, kl / self.target - 1))
            self.coefficient *= 1 + error * min(1.0, samples / self.horizon)
