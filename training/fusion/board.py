"""A notice board for the ranks of one rollout: values by name, counters, no collective calls.

Ranks that decode and ranks that score run at their own pace, so they cannot meet in collectives. The board lies in the
key-value store that every process group of torch.distributed has anyway.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch.distributed as dist

from training.private_surfaces import default_store
from training.roll_call import RollCall

PAUSES = 0.0005, 0.005
"""Seconds between two looks whether a notice is there, at first and after a while. A wait in the store itself would
keep the roll call from the store."""
BITS = 20
"""Of a number in a tally, which is three of them in one counter."""


class Board:
    """Notices of one rollout; `name` must be new for each, and the same on every rank."""

    def __init__(self, name: str, roll_call: RollCall | None = None):
        self.store = dist.PrefixStore(f"board/{name}", default_store())
        self.roll_call = roll_call
        self.mine: list[str] = []
        self.counters: set[str] = set()

    def post(self, key: str, notice: Any) -> None:
        """Hang up what JSON can say (numbers come back exactly, tuples as lists); each key once."""
        self.store.set(key, json.dumps(notice))
        self.mine.append(key)

    def has(self, key: str) -> bool:
        return self.store.check([key])

    def read(self, key: str, awaited: Mapping[int, str], phase: str) -> Any:
        """The value under `key`; waits for it. JSON, because whoever reaches the port could hang up a notice.

        `awaited` names the ranks that it hangs on, each with a key that says that the rank has done its part.
        """

        def missing() -> list[int]:
            return [rank for rank, its_key in awaited.items() if not self.has(its_key)]

        with self.roll_call.waiting(missing, phase) if self.roll_call else nullcontext():
            pause, longest = PAUSES
            while not self.has(key):
                time.sleep(pause)
                pause = min(1.2 * pause, longest)
        return json.loads(self.store.get(key))

    def read_all(self, keys: Sequence[str]) -> list[Any]:
        """The values under keys that are there, in one request."""
        return [json.loads(notice) for notice in self.store.multi_get(list(keys))]

    def count(self, key: str, more: int = 1) -> int:
        """Add to a counter and return its new value; `more` 0 reads it."""
        self.counters.add(key)
        return self.store.add(key, more)

    def tally(self, key: str, samples: int) -> tuple[int, int, int]:
        """Add one that has `samples` left; returns how many came so far, their samples, and how many have any."""
        found = self.count(key, 1 | samples << BITS | (samples > 0) << 2 * BITS)
        mask = (1 << BITS) - 1
        return found & mask, found >> BITS & mask, found >> 2 * BITS

    def clear(self) -> None:
        """Take down what this rank hung up and counted on, once nobody will read it any more."""
        for key in [*self.mine, *self.counters]:
            self.store.delete_key(key)
        self.mine, self.counters = [], set()
