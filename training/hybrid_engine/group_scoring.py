"""A role that scores in a tensor-parallel layout, while every rank keeps micro-batches of its own."""

from typing import Any

import torch
from torch import Tensor, nn

from inference.tensor_parallel.group import TensorParallel
from training.data.batching import TokenBatch
from training.distributed import gather_flat


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
        lengths = batch.ids.new_tensor([len(batch.lengths), *batch.lengths])
        sent = torch.cat([lengths, batch.ids, batch.response.long()])
        return [unpacked(words) for words in gather_flat(sent, self.tensor_parallel.size, self.tensor_parallel.group)]


def unpacked(words: Tensor) -> TokenBatch:
    rows = int(words[0])
    ids, response = words[1 + rows :].view(2, -1)
    return TokenBatch(ids, response.bool(), words[1 : 1 + rows].tolist())
