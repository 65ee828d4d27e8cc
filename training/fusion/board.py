"""A notice board for the ranks of one rollout: small values by name, counters, no collective calls.

Ranks that decode and ranks that score run at their own pace, so they cannot meet in collectives. The board lies in the
key-value store that every process group of torch.distributed has anyway.
"""

import json
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PAUSE = 0.002
"""Seconds between two looks at the board."""
PATIENCE = timedelta(minutes=30)
"""How long a notice may take; a peer that ends sooner ends the run through its launcher."""


class Board:
    """Notices of one rollout; `name` must be new for each, and the same on every rank."""

    def __init__(self, name: str):
        store = dist.distributed_c10d._get_default_store()
        self.store = dist.PrefixStore(f"board/{name}", store)
        self.mine: list[str] = []
        self.counters: set[str] = set()

    def post(self, key: str, notice: Any) -> None:
        """Hang up what JSON can say (numbers come back exactly, tuples as lists); each key once."""
        self.store.set(key, json.dumps(notice))
        self.mine.append(key)

    def has(self, key: str) -> bool:
        return self.store.check([key])

    def read(self, key: str) -> Any:
        """The value under `key`; waits for it. JSON, because whoever reaches the port could hang up a notice."""
        self.store.wait([key], PATIENCE)
        return json.loads(self.store.get(key))

    def count(self, key: str, more: int = 1) -> int:
        """Add to a counter and return its new value; `more` 0 reads it."""
        self.counters.add(key)
        return self.store.add(key, more)

    def pause(self) -> None:
        time.sleep(PAUSE)

    def clear(self, counters: bool) -> None:
        """Take down what this rank hung up, once nobody will read it any more; one rank takes down the counters."""
        for key in [*self.mine, *(self.counters if counters else ())]:
            self.store.delete_key(key)
        self.mine = []
