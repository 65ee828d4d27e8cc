"""Which rows are next: epochs over all of them, each shuffled anew."""

import random
from array import array

from training.config import StepSettings


class Epochs:
    """The order of an epoch is a function of (salt, epoch) alone, so that resuming needs no cursor. The last one asked
    for is kept: a million rows take half a second to shuffle."""

    def __init__(self, size: int, salt: str):
        self.size, self.salt = size, salt
        self._kept = -1, array("q")

    def order(self, epoch: int) -> "array[int]":
        """Rows 0 .. size - 1, as `epoch` takes them."""
        if self._kept[0] != epoch:
            order = array("q", range(self.size))
            random.Random(f"{self.salt}/{epoch}").shuffle(order)
            self._kept = epoch, order
        return self._kept[1]

    def rows(self, start: int, count: int) -> list[int]:
        """The rows at places `start` .. `start + count - 1`, counted from 0 through all epochs."""
        chosen: list[int] = []
        while len(chosen) < count:
            epoch, seat = divmod(start + len(chosen), self.size)
            chosen += self.order(epoch)[seat : seat + count - len(chosen)]
        return chosen


def updates_per_epoch(rows: int, settings: StepSettings) -> int:
    return max(1, rows // settings.batch_size)


def count_updates(rows: int, settings: StepSettings) -> int:
    """Optimiser steps of the whole step."""
    total = updates_per_epoch(rows, settings) * settings.epochs
    return min(total, settings.max_steps) if settings.max_steps else total
