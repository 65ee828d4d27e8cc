"""The estimators of the advantages, which `rlhf.advantage` names. What they differ in stands in their entries.

Imports torch where it is needed alone: settings are read without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from training.formulas.table import Entry, Table

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Scored:
    """The samples of an iteration, of all ranks: float32 on the CPU, (samples, tokens) unless said otherwise.

    Response tokens are flush left, with zeros behind them. The samples of a prompt stand together.
    """

    score: Tensor  # (samples); the sum of all that rewards, on one scale, less the penalty for a missing end
    kl_penalty: Tensor  # the weighed penalty of each token; zeros where it is a part of the loss
    values: Tensor  # the critic's values; zeros without one
    mask: Tensor  # bool; True on response tokens
    group: int  # samples of a prompt
    gamma: float
    lam: float

    @property
    def rewards(self) -> Tensor:
        """The reward of each token: less its penalty, and with the score on the last one."""
        last = self.mask.sum(1) - 1
        return (-self.kl_penalty).scatter_add(1, last[:, None], self.score[:, None])

    @property
    def by_prompt(self) -> Tensor:
        """The rewards of whole samples, (prompts, group)."""
        return self.rewards.sum(1).view(-1, self.group)


@dataclass(frozen=True)
class Estimator(Entry):
    """`formula` makes of Scored the advantages: (samples, tokens), or (samples) for one of all tokens of a sample."""

    critic: bool = False  # whether a critic is trained, whose values it reads
    kl: Literal["reward", "loss"] = "reward"
    """Where the KL penalty acts unless `rlhf.kl.place` says so."""
    samples: int = 1  # the fewest samples a prompt
    whiten: bool = False  # whether `rlhf.whiten_advantages` whitens what it makes

    def __post_init__(self) -> None:
        if self.kl not in ("reward", "loss") or self.samples < 1:
            raise ValueError("has kl='reward' or kl='loss', and samples of 1 or more")

    def advantages(self, scored: Scored) -> Tensor:
        """(samples, tokens), float32, not whitened."""
        result = self.formula(scored).float()
        return result if result.dim() == 2 else result[:, None] * scored.mask

    def complaint(self, result: Any, *given: Any) -> str:
        import torch

        shape = tuple(given[0].mask.shape)
        if not isinstance(result, torch.Tensor) or tuple(result.shape) not in (shape, shape[:1]):
            return f"must return a tensor of shape {shape} or {shape[:1]}, not {str(result)[:80]!r}"
        return "" if result.isfinite().all() else "returned advantages that are not finite numbers"

    def example(self, settings: Any) -> tuple[Any, ...]:
        """Two prompts, whose samples have one to three tokens."""
        import torch

        lengths = torch.arange(2 * settings.samples_per_prompt) % 3 + 1
        mask = torch.arange(3) < lengths[:, None]
        group, gamma, lam = settings.samples_per_prompt, settings.gamma, settings.lam
        return (Scored(lengths - 1.5, 0.1 * mask, 0.5 * mask, mask, group, gamma, lam),)


def gae(scored: Scored) -> Tensor:
    """The sum of (gamma * lam)^l * delta_{t+l}, delta_t = reward_t + gamma * value_{t+1} - value_t (Schulman et al.
    2016, arXiv 1506.02438, equation 16)."""
    rewards, values = scored.rewards, scored.values
    advantages = rewards.new_zeros(rewards.shape)
    next_value = running = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):  # nothing follows a sample's last token
        real = scored.mask[:, t].to(rewards)
        delta = rewards[:, t] + scored.gamma * next_value - values[:, t]
        running = (delta + scored.gamma * scored.lam * running) * real
        next_value = values[:, t] * real
        advantages[:, t] = running
    return advantages


def rloo(scored: Scored) -> Tensor:
    """R_i - mean of the other R of the prompt (Ahmadian et al. 2024, arXiv 2402.14740, equation 8)."""
    by_prompt = scored.by_prompt
    others = (by_prompt.sum(1, keepdim=True) - by_prompt) / (scored.group - 1)
    return (by_prompt - others).flatten()


def grpo(scored: Scored) -> Tensor:
    """(R_i - mean R of the prompt) / (their deviation + 1e-4), unbiased as in TRL and OpenRLHF (Shao et al. 2024, arXiv
    2402.03300, section 4.1.2)."""
    by_prompt = scored.by_prompt
    centred = by_prompt - by_prompt.mean(1, keepdim=True)
    return (centred / (by_prompt.std(1, keepdim=True) + 1e-4)).flatten()


def dr_grpo(scored: Scored) -> Tensor:
    """R_i - mean R of the prompt, for `rlhf.loss_mean=constant` (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783)."""
    by_prompt = scored.by_prompt
    return (by_prompt - by_prompt.mean(1, keepdim=True)).flatten()


def reinforce(scored: Scored) -> Tensor:
    """The rewards of this token and those after it, discounted by gamma; with several samples a prompt the mean of
    their scores is taken off each first (REINFORCE++, Hu et al. 2025, arXiv 2501.03262)."""
    score = scored.score.view(-1, scored.group)
    score = (score - score.mean(1, keepdim=True)).flatten() if scored.group > 1 else scored.score
    return gae(replace(scored, score=score, values=scored.values * 0, lam=1.0))


ESTIMATORS = Table(
    "rlhf.advantage",
    Estimator,
    {
        "gae": Estimator(gae, critic=True, whiten=True),
        "rloo": Estimator(rloo, samples=2),
        "grpo": Estimator(grpo, samples=2, kl="loss"),
        "dr_grpo": Estimator(dr_grpo, samples=2, kl="loss"),
        "reinforce++": Estimator(reinforce, whiten=True),
    },
)


ROUNDING = 1e-6
"""Deviations this small beside the numbers themselves are rounding: dividing by them would make noise of it."""


@dataclass
class RunningStatistics:
    """Mean and deviation of all numbers seen so far; plain floats, which a checkpoint stores to the bit."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # summed squared differences from the mean

    def update(self, values: Sequence[float]) -> None:
        """Take a batch in (Chan et al. 1979, the pairwise formula)."""
        if not values:
            return
        mean = sum(values) / len(values)
        count, apart = self.count + len(values), mean - self.mean
        self.squares += sum((value - mean) * (value - mean) for value in values)
        self.squares += apart * apart * self.count * len(values) / count
        self.mean += apart * len(values) / count
        self.count = count

    @property
    def deviation(self) -> float:
        """The standard deviation; 1 where the numbers do not vary."""
        deviation = (self.squares / max(1, self.count)) ** 0.5
        return deviation if deviation > ROUNDING * abs(self.mean) else 1.0

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Shaping(Entry):
    """`formula` makes (shift, scale) of an iteration's scores and the RunningStatistics of all so far, these included:
    a score becomes (score - shift) / scale. A critic that begins as the reward model gets the first of them."""

    clip: bool = True  # whether `rlhf.score_clip` bounds what comes out

    def complaint(self, result: Any, *given: Any) -> str:
        try:
            (shift, scale), _ = map(float, result), len(result)  # what is read once alone has no length
        except (TypeError, ValueError):
            return f"must return two numbers, (shift, scale), not {str(result)[:80]!r}"
        return "" if math.isfinite(shift) and math.isfinite(scale) and scale > 0 else f"returned {shift}, {scale}"

    def example(self, settings: Any) -> tuple[Any, ...]:
        scores, statistics = [0.0, 1.0, 5.0], RunningStatistics()
        statistics.update(scores)
        return scores, statistics


def running(scores: Sequence[float], so_far: RunningStatistics) -> tuple[float, float]:
    """Less the mean and over the deviation of all scores so far."""
    return so_far.mean, so_far.deviation


def scale(scores: Sequence[float], so_far: RunningStatistics) -> tuple[float, float]:
    """Over the deviation of all scores so far: 0 stays 0."""
    return 0.0, so_far.deviation


def batch(scores: Sequence[float], so_far: RunningStatistics) -> tuple[float, float]:
    """Less the mean and over the deviation of the iteration's own scores."""
    own = RunningStatistics()
    own.update(scores)
    return own.mean, own.deviation


def none(scores: Sequence[float], so_far: RunningStatistics) -> tuple[float, float]:
    """As they are."""
    return 0.0, 1.0


SHAPINGS = Table(
    "rlhf.reward_normalization",
    Shaping,
    {
        "running": Shaping(running),
        "scale": Shaping(scale),
        "batch": Shaping(batch),
        "none": Shaping(none, clip=False),
    },
)
