"""A cut: which part of a whole tensor a rank keeps."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """Keeps `ranges` (start, length) of dimension `dim`, one behind the other, then `padding` zeros."""

    dim: int
    ranges: tuple[tuple[int, int], ...]
    padding: int = 0

    @property
    def length(self) -> int:
        return sum(length for _, length in self.ranges) + self.padding

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        return (*whole[: self.dim], self.length, *whole[self.dim + 1 :])

    def __call__(self, whole: Tensor) -> Tensor:
        """The part of `whole`: a view where it lies in one piece."""
        parts = [whole.narrow(self.dim, start, length) for start, length in self.ranges]
        if self.padding:
            shape = (*whole.shape[: self.dim], self.padding, *whole.shape[self.dim + 1 :])
            parts.append(whole.new_zeros(shape))
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


def even(total: int, rank: int, size: int, blocks: int = 1) -> tuple[tuple[int, int], ...]:
    """The ranges of rank `rank` of `size` where each of `blocks` equal blocks of `total` is cut evenly."""
    block = total // blocks
    part = block // size
    return tuple((start * block + rank * part, part) for start in range(blocks))


def rows_of(total: int, rank: int, size: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """Ranges and padding of rank `rank`'s part of a vocabulary of `total`, padded up to a multiple of `size`."""
    part = -(-total // size)
    start = min(rank * part, total)
    length = min(part, total - start)
    return ((start, length),), part - length
