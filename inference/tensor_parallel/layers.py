"""The ranks that share one model, and the layers that talk to the other ranks: inference only.

Layers cut over their outputs need none: they are the family's own, with fewer features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class TensorParallel:
    """Which part of the model this rank holds: the `rank`-th of `size`. Without a group it is alone with all of it."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over the ranks, the same bits on each; `partial` is overwritten."""
        if self.group is not None:
            dist.all_reduce(partial, group=self.group)
        return partial

    def join_last(self, part: Tensor) -> Tensor:
        """(..., n) on each rank -> (..., size * n), in rank order, the same bits on each."""
        if self.group is None:
            return part
        parts = part.new_empty(self.size, *part.shape)
        dist.all_gather(list(parts.unbind(0)), part.contiguous(), group=self.group)
        return parts.movedim(0, -2).flatten(-2)


def join_groups(groups: Sequence[Sequence[int]]) -> TensorParallel | None:
    """The part of this process in one of `groups` (global ranks), or None if it is in none.

    Every process of the world calls it with the same groups.
    """
    rank, own = dist.get_rank(), None
    for ranks in groups:
        group = cast(dist.ProcessGroup, dist.new_group(list(ranks))) if len(ranks) > 1 else None
        if rank in ranks:
            own = TensorParallel(list(ranks).index(rank), len(ranks), group)
    return own


class RowParallel(nn.Module):
    """A linear layer cut over its inputs: partial sums are added up over the ranks, then the bias is added once.

    `partial` may be a peft LoRA layer: base and adapter are summed before they travel.
    """

    def __init__(self, partial: nn.Module, bias: nn.Parameter | None, tensor_parallel: TensorParallel):
        super().__init__()
        self.partial, self.bias, self.tensor_parallel = partial, bias, tensor_parallel

    def forward(self, inputs: Tensor) -> Tensor:  # (..., inputs / size) -> (..., outputs)
        outputs = self.tensor_parallel.sum(self.partial(inputs))
        return outputs if self.bias is None else outputs + self.bias


class PartialConv1D(nn.Module):
    """GPT-2's linear layer, whose weight is (inputs, outputs), without its bias."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight


class VocabularyEmbedding(nn.Module):
    """An embedding cut over the vocabulary: a rank answers for its tokens, the others for theirs."""

    def __init__(self, part: nn.Module, vocabulary: int, tensor_parallel: TensorParallel):
        super().__init__()
        self.part, self.num_embeddings, self.tensor_parallel = part, vocabulary, tensor_parallel
        self.rows = -(-vocabulary // tensor_parallel.size)
        self.first = tensor_parallel.rank * self.rows

    @property
    def weight(self) -> Any:
        return self.part.weight

    def forward(self, ids: Tensor) -> Tensor:
        local = ids - self.first
        elsewhere = (local < 0) | (local >= self.rows)
        rows = self.part(local.masked_fill(elsewhere, 0))
        return self.tensor_parallel.sum(rows.masked_fill(elsewhere[..., None], 0.0))


class VocabularyHead(nn.Module):
    """An output head cut over the vocabulary; every rank gets all logits, without the padding."""

    def __init__(self, part: nn.Module, vocabulary: int, tensor_parallel: TensorParallel):
        super().__init__()
        self.part, self.out_features, self.tensor_parallel = part, vocabulary, tensor_parallel

    @property
    def weight(self) -> Any:
        return self.part.weight

    def forward(self, hidden: Tensor) -> Tensor:  # (..., hidden) -> (..., vocabulary)
        return self.tensor_parallel.join_last(self.part(hidden))[..., : self.out_features]


class LocalAlibi:
    """A forward pre-hook for BLOOM's attention: of the slopes of all heads it passes on those of the local heads."""

    def __init__(self, heads: int, tensor_parallel: TensorParallel):
        self.heads = heads
        self.first = tensor_parallel.rank * heads // tensor_parallel.size
        self.count = heads // tensor_parallel.size

    def __call__(self, module: nn.Module, inputs: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        whole = keywords["alibi"].unflatten(0, (-1, self.heads))  # (rows, heads, 1, keys)
        return inputs, {**keywords, "alibi": whole.narrow(1, self.first, self.count).flatten(0, 1)}
