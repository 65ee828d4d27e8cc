"""Scoring beside decoding: on CUDA on a stream of its own, elsewhere at once."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Generic, TypeVar

import torch

from inference.generation.sample import Sample

S = TypeVar("S")
Begin = Callable[[list[Sample]], Callable[[], list[S]]]
"""Starts to score samples and returns what waits for the result."""


class Aside(Generic[S]):
    """At most one unit is under way, so that decode steps wait for little."""

    def __init__(self, begin: Begin[S], device: torch.device):
        self.begin = begin
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.done: torch.cuda.Event | None = None
        self.finish: Callable[[], list[S]] | None = None

    def start(self, samples: list[Sample]) -> None:
        if self.stream is None:
            self.finish = self.begin(samples)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.finish = self.begin(samples)
            self.done = self.stream.record_event()

    def is_busy(self) -> bool:
        return self.done is not None and not self.done.query()

    def collect(self) -> list[S]:
        """The results of the unit under way; waits for them. Empty if there is none."""
        finish, self.finish, self.done = self.finish, None, None
        if finish is None:
            return []
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            return finish()
