"""A notice board for the ranks of one rollout: values by name, counters, no collective calls.

Ranks that decode and ranks that score run at their own pace, so they cannot meet in collectives. The board lies in the
key-value store that every process group of torch.distributed has anyway.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from inference.generation.sampler import Sample
from training.distributed import RollCall
from training.hybrid_engine.layout import Layout
from training.private_surfaces import default_store

PAUSES = 0.0005, 0.005
"""Seconds between two looks whether a notice is there, at first and after a while. A wait in the store itself would
keep the roll call from the store."""
BITS = 20
"""Bits of one number of a tally, which is three numbers in one counter."""


class Board:
    """Holds the notices of one rollout; its `name` is the same on every rank, and that of no other rollout."""

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
        """Wait for the value under `key`. It is JSON, because whoever reaches the port could hang up a notice.

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
        return [json.loads(notice) for notice in self.store.multi_get(list(keys))]

    def count(self, key: str, more: int = 1) -> int:
        """Add to a counter and return its new value; `more` 0 reads it."""
        self.counters.add(key)
        return self.store.add(key, more)

    def tally(self, key: str, samples: int) -> tuple[int, int, int]:
        """Add an instance that has `samples` left; returns how many came so far, their samples, and how many have
        any."""
        packed = self.count(key, 1 | samples << BITS | (samples > 0) << 2 * BITS)
        mask = (1 << BITS) - 1
        return packed & mask, packed >> BITS & mask, packed >> 2 * BITS

    def clear(self) -> None:
        """Take down what this rank hung up and counted on, once nobody will read it any more."""
        for key in [*self.mine, *self.counters]:
            self.store.delete_key(key)
        self.mine, self.counters = [], set()


S = TypeVar("S")
Begin = Callable[[list[Sample]], Callable[[], list[S]]]
"""Starts to score samples and returns what waits for the result."""


class BackgroundScoring(Generic[S]):
    """Scores at most one unit at a time beside decoding, so that decode steps wait for little."""

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
        """Wait for the results of the unit under way; empty if there is none."""
        finish, self.finish, self.done = self.finish, None, None
        if finish is None:
            return []
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            return finish()


@dataclass(frozen=True)
class RankPosition:
    """Says where this rank stands: it is the `tensor_rank`-th of the ranks of `instance`."""

    rank: int
    layout: Layout

    @property
    def takes_part(self) -> bool:
        """Whether this rank generates; the rest is for those that do."""
        return self.rank in self.layout.mesh

    @property
    def instance(self) -> int:
        return self.layout.data_rank(self.rank)

    @property
    def tensor_rank(self) -> int:
        return self.layout.tensor_rank(self.rank)

    @property
    def speaks(self) -> bool:
        """Whether this rank writes what all ranks of its instance know."""
        return self.takes_part and self.tensor_rank == 0

    def peer(self, instance: int) -> int:
        """Return the rank that holds the same part of the model in another instance."""
        return self.layout.tensor_groups[instance][self.tensor_rank]

    def speaker(self, instance: int) -> int:
        """Return the rank that speaks for an instance."""
        return self.layout.tensor_groups[instance][0]


Remaining = Callable[[int], float]
"""Response tokens so far -> tokens that are still to come, on average."""


@dataclass(frozen=True)
class SampleLengths:
    """Counts the tokens of one sample: all of them, or of an unfinished one those so far."""

    index: int
    prompt: int
    response: int

    @property
    def length(self) -> int:
        return self.prompt + self.response


@dataclass(frozen=True)
class SampleMove:
    index: int
    length: int
    source: int
    target: int


@dataclass(frozen=True)
class Repacking:
    """Says that from now on only `keepers` decode."""

    keepers: tuple[int, ...]
    moves: tuple[SampleMove, ...] = ()


@dataclass(frozen=True)
class FusionPolicy:
    """Says when to gather the tail: once at most `threshold` samples are unfinished, on as few instances as hold them
    with `rows` each. Threshold 0 never moves a sample; instances then are freed as they run empty."""

    threshold: int
    rows: int
    tick: float
    """Seconds of predicted decoding between two looks at what the others have left."""
    unit_tokens: int
    """Tokens of samples that are scored together, at least, while others are still decoding."""
    interleaves: bool = False
    """Whether ranks that decode score too: beside decoding on CUDA, between decode steps elsewhere."""

    def instances_for(self, samples: int, busy: int) -> int:
        """Return how many of `busy` instances go on with `samples` unfinished ones."""
        return min(busy, math.ceil(samples / self.rows)) if samples <= self.threshold else busy


def decide(left: Mapping[int, Sequence[SampleLengths]], policy: FusionPolicy, remaining: Remaining) -> Repacking | None:
    """Return what to do when the instances that decode have `left` these; None: go on."""
    busy = [instance for instance in sorted(left) if left[instance]]
    wanted = policy.instances_for(sum(map(len, left.values())), len(busy))
    if wanted == len(left):
        return None
    work = {instance: sum(remaining(sample.response) for sample in left[instance]) for instance in busy}
    keepers = sorted(sorted(busy, key=lambda instance: (-work[instance], instance))[:wanted])
    return Repacking(tuple(keepers), tuple(moves_to(keepers, left)))


def moves_to(keepers: Sequence[int], left: Mapping[int, Sequence[SampleLengths]]) -> list[SampleMove]:
    """Move the samples of all others, longest first, each to the keeper with the fewest samples (then tokens)."""
    load = {keeper: (len(left[keeper]), sum(sample.length for sample in left[keeper])) for keeper in keepers}
    homeless = [(sample, source) for source in sorted(left) if source not in load for sample in left[source]]
    homeless.sort(key=lambda pair: (-pair[0].length, pair[0].index))
    moves = []
    for sample, source in homeless:
        target = min(keepers, key=lambda keeper: (*load[keeper], keeper))
        rows, tokens = load[target]
        load[target] = (rows + 1, tokens + sample.length)
        moves.append(SampleMove(sample.index, sample.length, source, target))
    return moves


JOINED = 0.002
"""Seconds between two spans of one kind that are shown as one."""


@dataclass
class Span:
    """Says when something ran, in seconds on this machine's monotonic clock, which all its processes share."""

    kind: str
    start: float
    end: float


class Timeline:
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
