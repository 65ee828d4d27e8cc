"""One role's present weights in another layout: from ZeRO 0-3 to whole weights or tensor-parallel shards.

Any role will do: a training engine's model, a frozen module, a frozen module under ZeRO 3. Where the layouts agree
nothing is copied. Where they do not, the weights move layer by layer: the layer is gathered if ZeRO 3 has divided it,
this rank's part is cut out, the rest is released. So the peak extra memory is the shard and one layer.
"""

import re
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from inference.private_surfaces import is_divided
from inference.tensor_parallel.group import TensorParallel, join_groups
from inference.tensor_parallel.shard import Piece, empty_shard
from training.hybrid_engine.deepspeed_setup import deepspeed
from training.hybrid_engine.layout import Layout


@dataclass(frozen=True)
class Moved:
    """What one reallocation did on this rank."""

    written_bytes: int
    """Copied into the shard."""
    gathered_bytes: int
    """Made whole from ZeRO-3 partitions on the way, most of it received from other ranks."""
    largest_layer_bytes: int
    """The most that was gathered at one time: extra memory on top of the shard."""
    seconds: float


class Reallocation:
    """Keeps a tensor-parallel part of `source`, a model of transformers that may be partitioned by ZeRO 3."""

    def __init__(self, source: nn.Module, tensor_parallel: TensorParallel, device: torch.device):
        self.source = source
        self.tensor_parallel = tensor_parallel
        self.device = device
        self.is_partitioned = any(is_divided(parameter) for parameter in source.parameters())
        self.layouts_agree = tensor_parallel.size == 1 and not self.is_partitioned
        self.moved = Moved(0, 0, 0, 0.0)
        self._shard: nn.Module | None = None
        self.pieces: list[Piece] = []

    def run(self) -> nn.Module:
        """The source's present weights in the new layout; the same module each time. All ranks call it.

        Frozen parameters move the first time only.
        """
        if self.layouts_agree:
            return self.source
        start = time.perf_counter()
        first = self._shard is None
        if self._shard is None:
            self._shard, self.pieces = empty_shard(self.source, self.tensor_parallel, self.device)
        parameters = dict(self.source.named_parameters())
        moving = [piece for piece in self.pieces if first or parameters[piece.name].requires_grad]
        written = gathered = largest = 0
        for layer in by_layer(moving):
            wholes = [parameters[piece.name] for piece in layer]
            with torch.no_grad(), self._whole(wholes):
                size = sum(whole.numel() * whole.element_size() for whole in wholes) if self.is_partitioned else 0
                for piece, whole in zip(layer, wholes, strict=True):
                    piece.local.copy_(whole if piece.cut is None else piece.cut(whole))
                    written += piece.local.numel() * piece.local.element_size()
            gathered, largest = gathered + size, max(largest, size)
        self.moved = Moved(written, gathered, largest, time.perf_counter() - start)
        return self._shard

    def _whole(self, parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
        return deepspeed.zero.GatheredParameters(parameters) if self.is_partitioned else nullcontext()


def by_layer(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Pieces of one decoder layer together; each parameter outside of the layers alone."""
    layers: dict[str, list[Piece]] = {}
    for piece in pieces:
        found = re.match(r".*?\.\d+\.", piece.name)
        layers.setdefault(found.group() if found else piece.name, []).append(piece)
    return list(layers.values())


def tensor_parallel_of(layout: Layout) -> TensorParallel | None:
    """This process's part in a layout, None outside of its mesh; makes the process groups, so all ranks call it."""
    return join_groups(layout.tensor_groups)
