"""Mean and deviation of all numbers seen so far, for rewards that nobody normalised."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

ROUNDING = 1e-6
"""Deviations this small beside the numbers themselves are rounding: dividing by them would make noise of it."""


@dataclass
class RunningStatistics:
    """Plain floats, which a checkpoint keeps to the bit."""

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

    def normalized(self, values: Sequence[float]) -> list[float]:
        return [(value - self.mean) / self.deviation for value in values]

    def as_dict(self) -> dict[str, float]:
        return asdict(self)
