"""How scores of an unknown scale are brought to one, which `rlhf.reward_normalization` names."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from training.formulas.table import Entry, Table

ROUNDING = 1e-6
"""Deviations this small beside the numbers themselves are rounding: dividing by them would make noise of it."""


@dataclass
class RunningStatistics:
    """Of all numbers seen so far; plain floats, which a checkpoint keeps to the bit."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Summed squared differences from the mean."""

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
        """1 where the numbers do not vary."""
        deviation = (self.squares / max(1, self.count)) ** 0.5
        return deviation if deviation > ROUNDING * abs(self.mean) else 1.0

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Shaping(Entry):
    """`formula` makes (shift, scale) of an iteration's scores and the RunningStatistics of all so far, these included:
    a score becomes (score - shift) / scale. A critic that begins as the reward model gets the first of them."""

    clip: bool = True
    """Whether `rlhf.score_clip` bounds what comes out."""

    def complaint(self, found: Any, *given: Any) -> str:
        try:
            (shift, scale), _ = map(float, found), len(found)  # what is read once alone has no length
        except (TypeError, ValueError):
            return f"must return two numbers, (shift, scale), not {str(found)[:80]!r}"
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
