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
        self.kept: dict[str, list[Tensor]] = {}
        self.is_kept = False
        """Whether there is something to go back to, here or on other ranks."""

    def keep(self) -> None:
        self.is_kept = True
        self.kept = {kind: [each.to("cpu", copy=True) for each in tensors] for kind, tensors in self._present.items()}

    @property
    def _present(self) -> dict[str, list[Tensor]]:
        if self.engine is None:
            return {}
        weights = {"weight": [each.detach() for each in self.engine.own_weights()]}
        return weights | ({"average": self.averages} if self.averages else {})

    def put_back(self) -> None:
        """All ranks call it."""
        if self.engine is None:
            return
        for kind, tensors in self._present.items():
            for tensor, before in zip(tensors, self.kept[kind], strict=True):
                tensor.copy_(before)
        self.engine.refresh()

    def save(self, directory: Path) -> None:
        """All ranks call it; each writes its part."""
        if self.engine is not None:
            self.engine.write(directory, self.kept)

    def save_present(self, directory: Path) -> None:
        """As `save`, of the weights as they are now, which are not kept in memory."""
        if self.engine is not None:
            self.engine.write(directory, self._present)

    def load(self, directory: Path) -> None:
        """Go on from what `save` wrote."""
        self.is_kept = True
        if self.engine is None:
            return
        self.kept = {
            kind: [torch.zeros_like(each, device="cpu") for each in tensors] for kind, tensors in self._present.items()
        }
        self.engine.read(directory, self.kept)
