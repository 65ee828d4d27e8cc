"""Decode steps of fixed sizes that feed themselves, so that several follow each other without the host.

On CUDA each size is captured once as a graph and replayed: a step then costs one launch instead of hundreds. Elsewhere,
and where a model does not let itself be captured, the same step runs eagerly. Sizes come from buckets. Rows beyond the
running ones are decoded too; they write into their own rows of the cache, which nobody uses, and are not read.
"""

import logging
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch

from inference.generation.kv_cache import Places
from inference.generation.passes import PackedPasses
from inference.generation.sampler import Draw, RowKeys, Sample, SamplingSettings

MOST_STEPS = 8
"""Steps between two looks of the host at what was drawn. More cost more tokens behind an end, that nobody wants."""
CONTEXT = 128
"""Tokens that buckets of the context are multiples of."""
WARM_UP_STEPS = 2
"""Before a capture, so that libraries set themselves up outside of it."""

logger = logging.getLogger(__name__)


class GraphKey(NamedTuple):
    """All that a captured step has fixed, beside addresses."""

    rows: int
    context: int
    settings: SamplingSettings
    end_ids: tuple[int, ...]
    may_end: bool


class Replay:
    """The static step over one cache and one set of weights; the engine keeps it from call to call."""

    def __init__(self, passes: PackedPasses):
        self.passes, self.cache, self.device = passes, passes.cache, passes.device
        self.addresses = addresses(passes)
        self.captures = can_capture(self.device)
        self.graphs: dict[GraphKey, torch.cuda.CUDAGraph] = {}
        # of each row: newest token, its place; tokens of the response, of this run; sample, seed, iteration
        self.state = torch.zeros(7, self.cache.slots, dtype=torch.int64, device=self.device)
        # tokens and log-probabilities of a run; tokens are exact in float64, and one tensor is read at once
        self.drawn = torch.zeros(2, MOST_STEPS, self.cache.slots, dtype=torch.float64, device=self.device)

    def holds_for(self, passes: PackedPasses) -> bool:
        """Whether cache, weights and buffers lie where they lay: a graph reads these addresses."""
        return passes.cache is self.cache and addresses(passes) == self.addresses

    def run(self, samples: list[Sample], steps: int, draw: Draw) -> tuple[list[list[int]], list[list[float]]]:
        """Up to `MOST_STEPS` tokens for each of the samples, which are rows 0, 1, ... of the cache, and their
        log-probabilities: (steps, samples) each. They are not written into the samples."""
        rows = row_bucket(len(samples), self.cache.slots)
        context = context_bucket(max(sample.length for sample in samples) - 1 + steps, self.cache.capacity)
        self._load(samples, rows, draw)
        step = self._prepared(rows, context, draw)
        for _ in range(steps):
            step()
        tokens, logprobs = self.drawn[:, :steps, : len(samples)].tolist()  # the host waits here
        return [[int(token) for token in drawn] for drawn in tokens], logprobs

    def step(self, rows: int, context: int, draw: Draw) -> None:
        """One token for rows 0 .. rows-1, none longer than `context` with it; made from `state` and left there for
        the next step. Nothing in it may depend on what only the device knows."""
        state = self.state[:, :rows]
        token, place, position, number, sample, seed, iteration = state
        logits = self.passes.decode_at(token, Places(place, context, is_level=False))
        tokens, logprobs = draw.tokens(logits, RowKeys(seed, iteration), sample, position)
        drawn = torch.stack((tokens.double(), logprobs.double()))[:, None]  # (2, 1, rows)
        self.drawn[:, :, :rows].scatter_(1, number.expand_as(drawn), drawn)
        token.copy_(tokens)
        state[1:4].add_(1)

    def _load(self, samples: list[Sample], rows: int, draw: Draw) -> None:
        """Bring the rows to the device in one copy."""
        seed, iteration = draw.key.seed, draw.key.iteration
        numbers: list[tuple[int, ...]] = [
            (sample.response_ids[-1], sample.length - 1, len(sample.response_ids), 0, sample.index, seed, iteration)
            for sample in samples
        ]
        numbers += [(0,) * len(self.state)] * (rows - len(samples))
        self.state[:, :rows] = torch.tensor(numbers).T

    def _prepared(self, rows: int, context: int, draw: Draw) -> Callable[[], None]:
        """The step as a graph, captured now if it is new; eager where that cannot be. The rows must be loaded."""
        step = partial(self.step, rows, context, draw)
        key = GraphKey(rows, context, draw.settings, draw.end_ids, draw.may_end)
        if key not in self.graphs:
            if not self.captures:
                return step
            try:
                self.graphs[key] = self._capture(step)
            except RuntimeError as error:  # torch's and CUDA's errors are such
                self.captures = False
                reason = str(error).partition("\n")[0]
                logger.warning("decoding goes on without new CUDA graphs, slower; a capture failed: %s", reason)
                return step
        return self.graphs[key].replay

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """As torch's notes on CUDA graphs say: warmed up on a side stream, and captured there."""
        graph = torch.cuda.CUDAGraph()
        loaded, current = self.state.clone(), torch.cuda.current_stream(self.device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):  # leads back out when the capture fails; torch.cuda.graph alone does not
            for _ in range(WARM_UP_STEPS):
                step()
                self.state.copy_(loaded)
            # other threads, such as NCCL's, may call CUDA meanwhile
            with torch.cuda.graph(graph, self._pool, self._side, capture_error_mode="thread_local"):
                step()
        current.wait_stream(self._side)
        return graph

    @cached_property
    def _side(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    @cached_property
    def _pool(self) -> Any:
        """All graphs share their memory: one runs at a time, and what is to stay lies outside."""
        return torch.cuda.graph_pool_handle()


def can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


def addresses(passes: PackedPasses) -> tuple[int, ...]:
    """Of the model's parameters and buffers."""
    return tuple(tensor.data_ptr() for part in (passes.model.parameters(), passes.model.buffers()) for tensor in part)


def row_bucket(rows: int, slots: int) -> int:
    """The next power of two, or all slots."""
    return min(slots, 1 << (rows - 1).bit_length())


def context_bucket(tokens: int, capacity: int) -> int:
    """The next multiple of `CONTEXT`, beyond 1024 of a power of two that keeps the excess below a quarter."""
    multiple = max(CONTEXT, 1 << (tokens - 1).bit_length() >> 3)
    return min(capacity, -(-tokens // multiple) * multiple)
