"""A role that scores in a tensor-parallel layout, while every rank keeps micro-batches of its own."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from inference.tensor_parallel.group import TensorParallel
from training.data.batching import TokenBatch


class GroupScoring:
    """The forward pass of `role`, this rank's part of a model, computed by its group together.

    A group takes the micro-batches of its ranks one after the other, so that a forward pass has no more tokens than
    with whole weights. Its ranks call it equally often.
    """

    def __init__(self, role: nn.Module, tensor_parallel: TensorParallel):
        self.role, self.tensor_parallel = role, tensor_parallel

    def __call__(self, batch: TokenBatch, *arguments: Any) -> Any:
        """What the whole role gives for this rank's `batch`; `arguments` are the same on all ranks."""
        found = [self.role(one, *arguments) for one in self._batches(batch)]
        return found[self.tensor_parallel.rank]

    def _batches(self, batch: TokenBatch) -> list[TokenBatch]:
        """Those of all ranks of the group, in their order."""
        received: list[Any] = [None] * self.tensor_parallel.size
        sent = batch.to(torch.device("cpu"))
        dist.all_gather_object(received, sent, group=self.tensor_parallel.group)
        return [one.to(batch.ids.device) for one in received]
