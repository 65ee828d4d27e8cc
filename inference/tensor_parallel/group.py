"""The ranks that share one model, and what they say to each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch.distributed as dist
from torch import Tensor


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
    rank, mine = dist.get_rank(), None
    for ranks in groups:
        group = cast(dist.ProcessGroup, dist.new_group(list(ranks))) if len(ranks) > 1 else None
        if rank in ranks:
            mine = TensorParallel(list(ranks).index(rank), len(ranks), group)
    return mine
