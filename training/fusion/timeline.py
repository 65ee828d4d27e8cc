"""What each rank did when, in one iteration."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

KINDS = ("generate", "score", "migrate", "idle", "train")
JOINED = 0.002
"""Seconds between two spans of one kind that are shown as one."""


@dataclass
class Span:
    """Seconds on this machine's monotonic clock, which all its processes share."""

    kind: str
    start: float
    end: float


class Timeline:
    """The spans of one rank, in order."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    @contextmanager
    def span(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(kind, start, time.perf_counter())

    def add(self, kind: str, start: float, end: float) -> None:
        last = self.spans[-1] if self.spans else None
        if last is not None and last.kind == kind and start - last.end < JOINED:
            last.end = end
        else:
            self.spans.append(Span(kind, start, end))

    def seconds(self, kind: str) -> float:
        return sum(span.end - span.start for span in self.spans if span.kind == kind)
