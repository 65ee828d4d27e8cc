"""Which instances keep the long tail of a rollout, and which samples move to them: decided alike on every rank.

An instance is a set of ranks that generates together (a tensor-parallel group, or one rank). The rule is that of
RLHFuse (arXiv 2409.13221, section 4), applied again and again as samples end.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Remaining = Callable[[int], float]
"""Response tokens so far -> tokens that are still to come, on average."""


@dataclass(frozen=True)
class Unfinished:
    """One sample on its way."""

    index: int
    prompt: int
    """Tokens."""
    response: int
    """Tokens so far."""

    @property
    def length(self) -> int:
        return self.prompt + self.response


@dataclass(frozen=True)
class Move:
    index: int
    length: int
    source: int
    target: int


@dataclass(frozen=True)
class Repacking:
    """From now on only `keepers` decode."""

    keepers: tuple[int, ...]
    moves: tuple[Move, ...] = ()


@dataclass(frozen=True)
class Policy:
    """When to gather the tail: once at most `threshold` samples are unfinished, on as few instances as hold them with
    `rows` each. Threshold 0 never moves a sample; instances then are freed as they run empty."""

    threshold: int
    rows: int
    tick: float
    """Seconds of predicted decoding between two looks at what the others have left."""
    unit_tokens: int
    """Tokens of samples that are scored together, at least, while others are still decoding."""
    interleaves: bool = False
    """Whether ranks that decode score too: beside decoding on CUDA, between decode steps elsewhere."""

    def instances_for(self, samples: int, busy: int) -> int:
        """How many of `busy` instances go on with `samples` unfinished ones."""
        return min(busy, math.ceil(samples / self.rows)) if samples <= self.threshold else busy


def decide(left: Mapping[int, Sequence[Unfinished]], policy: Policy, remaining: Remaining) -> Repacking | None:
    """What to do when the instances that decode have `left` these; None: go on."""
    busy = [instance for instance in sorted(left) if left[instance]]
    wanted = policy.instances_for(sum(map(len, left.values())), len(busy))
    if wanted == len(left):
        return None
    work = {instance: sum(remaining(sample.response) for sample in left[instance]) for instance in busy}
    keepers = sorted(sorted(busy, key=lambda instance: (-work[instance], instance))[:wanted])
    return Repacking(tuple(keepers), tuple(place_samples(left, keepers)))


def place_samples(left: Mapping[int, Sequence[Unfinished]], keepers: Sequence[int]) -> list[Move]:
    """The samples of all others: longest first, each to the keeper with the fewest samples (then tokens) by then."""
    load = {keeper: (len(left[keeper]), sum(sample.length for sample in left[keeper])) for keeper in keepers}
    homeless = [(sample, source) for source in sorted(left) if source not in load for sample in left[source]]
    homeless.sort(key=lambda pair: (-pair[0].length, pair[0].index))
    moves = []
    for sample, source in homeless:
        target = min(keepers, key=lambda keeper: (*load[keeper], keeper))
        rows, tokens = load[target]
        load[target] = (rows + 1, tokens + sample.length)
        moves.append(Move(sample.index, sample.length, source, target))
    return moves
