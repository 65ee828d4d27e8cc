"""Where the time of an iteration goes."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from training.fusion.board import Timeline


class Clock:
    """Runs from when it is made; `seconds` are by phase, under the names of the metrics."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.timeline = Timeline()
        self.calls = Timeline()
        """The model function calls, by their names."""

    @contextmanager
    def phase(self, metric: str) -> Iterator[None]:
        """Count the seconds inside; a phase that comes again adds to them."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[metric] = self.seconds.get(metric, 0.0) + time.perf_counter() - begun

    def elapsed(self) -> float:
        """Seconds since it was made."""
        return time.perf_counter() - self.begun

    def metrics(self, tokens: int, device: torch.device) -> dict[str, float]:
        """Seconds by phase, `tokens` generated a second, and this process's peak memory."""
        seconds = self.elapsed()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        return {
            **self.seconds,
            "time/other": seconds - sum(self.seconds.values()),
            "tokens_per_second": tokens / seconds,
            "memory/peak_gb": peak / 1e9,
        }
