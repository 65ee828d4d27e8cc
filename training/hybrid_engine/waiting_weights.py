"""Weights of a frozen role that wait in host memory, pinned beside a GPU, and lie on the device in its calls."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WaitingWeights:
    """Those of `module`, its buffers too."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.device = device
        self.waiting: list[tuple[Tensor, Tensor]] = []
        """What the module holds, and its copy on the host."""
        for held in [*module.parameters(), *module.buffers()]:
            host = held.detach().to("cpu", copy=held.device.type != "cpu")
            self.waiting.append((held, host.pin_memory() if device.type == "cuda" else host))
        self._leave()

    @contextmanager
    def present(self) -> Iterator[None]:
        """Inside, the weights are on the device; it must not be entered twice at a time."""
        for held, host in self.waiting:
            held.data = host.to(self.device, non_blocking=True)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        for held, host in self.waiting:
            held.data = host
