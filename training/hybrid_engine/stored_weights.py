"""Weights beside those in use: on the host until they are needed, averaged, or of an earlier moment to go back to.

All work under ZeRO 0-3: each rank stores its own part. Frozen roles are made here too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from training.deepspeed_config import deepspeed_config
from training.distributed import Ranks
from training.hybrid_engine.deepspeed_setup import deepspeed, divide
from training.hybrid_engine.zero_engine import ZeroEngine
from training.role_settings import FrozenSettings


class WaitingWeights:
    """Stores the parameters and buffers of `module` on the host until they are needed."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.device = device
        self.waiting: list[tuple[Tensor, Tensor]] = []
        """The module's tensors, each with its copy on the host."""
        for tensor in [*module.parameters(), *module.buffers()]:
            host = tensor.detach().to("cpu", copy=tensor.device.type != "cpu")
            self.waiting.append((tensor, host.pin_memory() if device.type == "cuda" else host))
        self._leave()

    @contextmanager
    def present(self) -> Iterator[None]:
        """Inside, the weights are on the device; it must not be entered twice at a time."""
        for tensor, host in self.waiting:
            tensor.data = host.to(self.device, non_blocking=True)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        for tensor, host in self.waiting:
            tensor.data = host


def freeze(model: nn.Module, settings: FrozenSettings, dtype: torch.dtype, ranks: Ranks) -> nn.Module:
    """Return a role that only scores: as it is on every rank's device, or divided over the ranks by ZeRO 3."""
    model.eval().requires_grad_(False)
    if settings.zero_stage == 0:
        return model.to(ranks.device)
    divide_to_score(model, dtype, ranks, settings)
    return gathering(model, dtype, ranks, settings)


DIVIDED = FrozenSettings(zero_stage=3)


def divide_to_score(model: nn.Module, dtype: torch.dtype, ranks: Ranks, settings: FrozenSettings = DIVIDED) -> None:
    with ranks.as_world():
        divide(model, deepspeed_config(settings.as_optimizer, dtype, trained=False), dtype, ranks)


def gathering(model: nn.Module, dtype: torch.dtype, ranks: Ranks, settings: FrozenSettings = DIVIDED) -> nn.Module:
    """Give `model`, which is divided, a forward pass that gathers what it needs."""
    config = deepspeed_config(settings.as_optimizer, dtype, trained=False)
    with ranks.as_world():
        engine, *_ = deepspeed.initialize(model=model.eval(), config=config, dist_init_required=False)
    engine.eval()  # returns nothing, unlike torch's
    return engine


class MovingAverage:
    """Makes average = decay * average + (1 - decay) * weights after each optimiser step; fp32, beside the weights.

    Ranks communicate in `weights` alone, at the end.
    """

    def __init__(self, engine: ZeroEngine, decay: float):
        self.engine, self.decay = engine, decay
        self.averages = [part.detach().float().clone() for part in engine.own_weights()]

    @torch.no_grad()
    def update(self) -> None:
        for average, part in zip(self.averages, self.engine.own_weights(), strict=True):
            average.lerp_(part.float(), 1 - self.decay)

    def weights(self) -> dict[str, Tensor]:
        """Return whole averaged weights, as `ZeroEngine.trained_weights` gives the trained ones. All ranks call it."""
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
        """Inside, the averages are in place of the optimiser's weights."""
        own = self.engine.own_weights()
        weights = [part.detach().clone() for part in own]
        for part, average in zip(own, self.averages, strict=True):
            part.copy_(average)
        try:
            yield
        finally:
            for part, before in zip(own, weights, strict=True):
                part.copy_(before)


class WeightsBackup:
    """Stores the weights of a trained role and its moving average, in main memory or in files.

    The state of the optimiser is not stored: training ends with what is put back.
    """

    def __init__(self, engine: ZeroEngine | None, average: MovingAverage | None = None):
        """`engine` is None on ranks that do not train the role."""
        self.engine = engine
        self.averages = average.averages if average is not None else []
        self.stored: dict[str, list[Tensor]] = {}
        self.is_stored = False
        """Whether there are weights to go back to, here or on other ranks."""

    def store(self) -> None:
        self.is_stored = True
        self.stored = {kind: [part.to("cpu", copy=True) for part in parts] for kind, parts in self._present.items()}

    @property
    def _present(self) -> dict[str, list[Tensor]]:
        if self.engine is None:
            return {}
        weights = {"weight": [part.detach() for part in self.engine.own_weights()]}
        return weights | ({"average": self.averages} if self.averages else {})

    def put_back(self) -> None:
        """Write the stored weights into the role and its average. All ranks call it."""
        if self.engine is None:
            return
        for kind, parts in self._present.items():
            for part, before in zip(parts, self.stored[kind], strict=True):
                part.copy_(before)
        self.engine.refresh()

    def save(self, directory: Path) -> None:
        """All ranks call it; each writes its part."""
        if self.engine is not None:
            self.engine.write(directory, self.stored)

    def save_present(self, directory: Path) -> None:
        """Save the weights as they are now, without storing them in memory."""
        if self.engine is not None:
            self.engine.write(directory, self._present)

    def load(self, directory: Path) -> None:
        """Go on from what `save` wrote."""
        self.is_stored = True
        if self.engine is None:
            return
        self.stored = {
            kind: [torch.zeros_like(part, device="cpu") for part in parts] for kind, parts in self._present.items()
        }
        self.engine.read(directory, self.stored)
