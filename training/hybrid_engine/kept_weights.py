"""Weights as they were at an earlier moment, to go back to, under ZeRO 0-3: each rank keeps what lies with it."""

from pathlib import Path

import torch
from torch import Tensor

from training.hybrid_engine.moving_average import MovingAverage
from training.hybrid_engine.zero_engine import ZeroEngine


class KeptWeights:
    """Of a trained role and its moving average, in main memory or in files.

    The state of the optimiser is not kept: training ends with what is put back.
    """

    def __init__(self, engine: ZeroEngine | None, average: MovingAverage | None = None):
        """`engine` is None on ranks that do not train the role."""
        self.engine = engine
        self.averages = average.averages if average is not None else []
        self.kept: list[Tensor] = []
        self.is_kept = False
        """Whether there is something to go back to, here or on other ranks."""

    def keep(self) -> None:
        self.is_kept = True
        if self.engine is None:
            return
        self.kept = [tensor.to("cpu", copy=True) for tensor in self._held(self.engine)]

    def _held(self, engine: ZeroEngine) -> list[Tensor]:
        return [tensor.detach() for tensor in (*engine.held_weights(), *self.averages)]

    def put_back(self) -> None:
        """All ranks call it."""
        if self.engine is None:
            return
        weights = len(self.kept) - len(self.averages)
        self.engine.put_weights(self.kept[:weights])
        for average, before in zip(self.averages, self.kept[weights:], strict=True):
            average.copy_(before)

    def save(self, directory: Path) -> None:
        """All ranks call it; each writes its part."""
        if self.engine is not None:
            self._write(self.engine, directory, self.kept)

    def save_present(self, directory: Path) -> None:
        """As `save`, of the weights as they are now, which are not kept in memory."""
        if self.engine is not None:
            self._write(self.engine, directory, self._held(self.engine))

    def _write(self, engine: ZeroEngine, directory: Path, tensors: list[Tensor]) -> None:
        directory = engine.folder(directory)
        directory.mkdir(exist_ok=True, parents=True)
        torch.save(tensors, directory / f"{engine.ranks.rank}.pt")

    def load(self, directory: Path) -> None:
        """Go on from what `save` wrote with as many ranks."""
        self.is_kept = True
        if self.engine is None:
            return
        file = self.engine.folder(directory) / f"{self.engine.ranks.rank}.pt"
        self.kept = torch.load(file, map_location="cpu", weights_only=True)
