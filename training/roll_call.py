"""A rank that waits long says in the log for whom, and in which phase; it does not wait for one that has died."""

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch.distributed as dist

LONG = 60.0
"""Seconds of waiting that are worth a line; the next lines come at twice the time of the last one."""
SILENCE = 1800.0
"""Seconds without a sign of life after which a rank counts as dead. A process that dies is noticed at once, by its
connections or its launcher; a machine that loses power is not."""
EXIT_LOST = 71


@dataclass
class Waiting:
    """What a rank waits for now."""

    missing: Callable[[], list[int]]
    """The ranks that have not come yet."""
    phase: str
    begun: float = field(default_factory=time.monotonic)
    due: float = LONG


class RollCall:
    """Who has come to where all ranks meet, and who is alive: kept in the ranks' store."""

    def __init__(self, rank: int, size: int, store: dist.Store, long: float = LONG, silence: float = SILENCE):
        self.rank, self.size, self.store = rank, size, dist.PrefixStore("roll call", store)
        self.long, self.silence = long, silence
        self.now: Waiting | None = None
        self.heard: dict[int, tuple[int, float]] = {}
        """Signs of life of others: how many, and when the last one was heard."""
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="roll-call", daemon=True)
        self.thread.start()
        atexit.register(self.stop)  # a thread that is in the store when Python ends aborts the process

    def stop(self) -> None:
        self.over.set()
        self.thread.join(timeout=5.0)

    @contextmanager
    def meeting(self, phase: str, mesh: tuple[int, ...] = ()) -> Iterator[None]:
        """Around what returns when all ranks have come, or those of `mesh`; each comes to the same meetings."""
        met = f"met/{mesh}" if mesh else "met"
        number = self.store.add(f"{met}/{self.rank}", 1)

        def missing() -> list[int]:
            return [rank for rank in mesh or range(self.size) if self.store.add(f"{met}/{rank}", 0) < number]

        with self.waiting(missing, phase):
            yield

    @contextmanager
    def waiting(self, missing: Callable[[], list[int]], phase: str) -> Iterator[None]:
        """Around any waiting for other ranks."""
        self.now = Waiting(missing, phase, due=self.long)
        try:
            yield
        finally:
            self.now = None

    def _watch(self) -> None:
        """A thread of its own, as the main one sits in a collective."""
        with suppress(dist.DistError):  # the store has gone with the first rank
            while not self.over.wait(self.long / 20):
                self.store.add(f"alive/{self.rank}", 1)
                if (now := self.now) is not None and time.monotonic() - now.begun >= self.long:
                    self._look(now)

    def _look(self, now: Waiting) -> None:
        missing, waited = now.missing(), time.monotonic() - now.begun
        if self.now is not now or not missing:
            return
        if waited >= now.due:
            now.due = 2 * waited
            self._say(f"has waited {waited:.0f} s for {named(missing)} ({now.phase})")
        if dead := [rank for rank in missing if self._is_silent(rank)]:
            self._say(f"ends: {named(dead)} gave no sign of life; the same command goes on")
            os._exit(EXIT_LOST)

    def _is_silent(self, rank: int) -> bool:
        signs, at = self.store.add(f"alive/{rank}", 0), time.monotonic()
        known, since = self.heard.get(rank, (-1, at))
        if signs != known:
            self.heard[rank] = signs, at
            return False
        return at - since > self.silence

    def _say(self, what: str) -> None:
        """On stderr, which the command and launchers keep as the log."""
        print(f"rank {self.rank} {what}", file=sys.stderr, flush=True)


def named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
