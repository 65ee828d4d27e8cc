"""An exponential moving average of a role's weights under ZeRO 0-3: each rank averages the part that it trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from training.hybrid_engine.zero_engine import ZeroEngine


class MovingAverage:
    """average = decay * average + (1 - decay) * weights after each optimiser step; fp32, beside the weights.

    Nothing is communicated but in `weights`, at the end.
    """

    def __init__(self, engine: ZeroEngine, decay: float):
        self.engine, self.decay = engine, decay
        self.averages = [part.detach().float().clone() for part in engine.own_weights()]

    @torch.no_grad()
    def update(self) -> None:
        """After an optimiser step."""
        for average, part in zip(self.averages, self.engine.own_weights(), strict=True):
            average.lerp_(part.float(), 1 - self.decay)

    def weights(self) -> dict[str, Tensor]:
        """Whole averaged weights, as `ZeroEngine.trained_weights` gives the trained ones. All ranks call it."""
        with self._in_place():
            return self.engine.trained_weights()

    def save(self, directory: Path) -> None:
        """All ranks call it; each writes its part."""
        self.engine.write(directory, {"weight": self.averages})

    def load(self, directory: Path) -> None:
        """Go on from what `save` wrote."""
        self.engine.read(directory, {"weight": self.averages})

    @contextmanager
    @torch.no_grad()
    def _in_place(self) -> Iterator[None]:
        """Inside, the averages stand where the optimiser keeps the weights."""
        own = self.engine.own_weights()
        kept = [part.detach().clone() for part in own]
        for part, average in zip(own, self.averages, strict=True):
            part.copy_(average)
        try:
            yield
        finally:
            for part, before in zip(own, kept, strict=True):
                part.copy_(before)
