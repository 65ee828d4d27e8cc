"""What generation and scoring cost on this machine: a few numbers fitted to measured steps."""

import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist

from inference.generation.engine import StepWork
from training.fusion.board import RankPosition

PROBE_BYTES = 4 * 2**20
"""Sent between two instances, to know what moving a sample costs."""


@dataclass(frozen=True)
class Measured:
    """Says how many seconds a step of generation took, or a forward pass of all roles that score."""

    seconds: float
    work: StepWork | None = None
    scored: int = 0
    """Tokens, for scoring."""


@dataclass(frozen=True)
class Costs:
    """Gives the seconds of one rank (of generation, of one instance).

    A decode step costs a curve over its rows (straight between `rows`, going on at both ends) plus a share of each
    token attended to. Prefill and scoring cost a start and a share of each token. `bandwidth` is bytes a second
    between two instances, `cache_bytes` what keys and values of a token take on a rank.
    """

    rows: tuple[int, ...]
    step: tuple[float, ...]
    per_context: float
    prefill: tuple[float, float]
    score: tuple[float, float]
    bandwidth: float = 1e9
    cache_bytes: int = 0

    def decode_seconds(self, rows: int, context: float) -> float:
        """Return the seconds of one decode step of `rows` samples that attend to `context` tokens in sum."""
        return self.step_seconds(rows) + self.per_context * context

    def step_seconds(self, rows: int) -> float:
        """Return the part of a decode step's that does not depend on its context."""
        if len(self.rows) == 1:
            return self.step[0]
        if rows > self.rows[-1]:
            slope = (self.step[-1] - self.step[-2]) / (self.rows[-1] - self.rows[-2])
            return self.step[-1] + max(0.0, slope) * (rows - self.rows[-1])
        return float(np.interp(rows, self.rows, self.step))

    def prefill_seconds(self, tokens: int) -> float:
        return self.prefill[0] + self.prefill[1] * tokens

    def score_seconds(self, tokens: int) -> float:
        """Return the seconds to score one micro-batch in all roles."""
        return self.score[0] + self.score[1] * tokens

    def work_seconds(self, work: StepWork) -> float:
        if work.prefilled:
            return self.prefill_seconds(work.prefilled)
        return work.steps * self.decode_seconds(round(work.rows / work.steps), work.context / work.steps)

    def move_seconds(self, tokens: int) -> float:
        """Return the seconds to move the keys and values of so many tokens."""
        return tokens * self.cache_bytes / self.bandwidth

    def moves_cache(self, tokens: int) -> bool:
        """Whether keys and values travel faster than they are made again, in a prefill that several samples share."""
        return self.cache_bytes > 0 and self.move_seconds(tokens) < self.prefill[1] * tokens

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**plain)


def fit(measured: Sequence[Measured], bandwidth: float, cache_bytes: int) -> Costs | None:
    """Fit costs to the measurements by least squares, outliers left out; None while a kind of work is unmeasured."""
    decoded = [m for m in measured if m.work is not None and m.work.rows]
    prefilled = [m for m in measured if m.work is not None and m.work.prefilled]
    scored = [m for m in measured if m.scored]
    if not (decoded and prefilled and scored):
        return None
    rows, step, per_context = fit_decode(decoded)
    return Costs(
        rows=rows,
        step=step,
        per_context=per_context,
        prefill=fit_line([m.work.prefilled for m in prefilled if m.work], [m.seconds for m in prefilled]),
        score=fit_line([m.scored for m in scored], [m.seconds for m in scored]),
        bandwidth=bandwidth,
        cache_bytes=cache_bytes,
    )


def fit_decode(measured: Sequence[Measured]) -> tuple[tuple[int, ...], tuple[float, ...], float]:
    """Return the rows at which the curve has its corners (the ends, and what was measured next to each power of two),
    the seconds there, and seconds a token of context."""
    steps = np.array([m.work.steps for m in measured if m.work], float)
    rows = np.array([m.work.rows for m in measured if m.work]) / steps
    context = np.array([m.work.context for m in measured if m.work]) / steps
    seconds = np.array([m.seconds for m in measured]) / steps
    seen = sorted({int(row) for row in rows})
    powers = [2**power for power in range(12) if seen[0] < 2**power < seen[-1]]
    corners = sorted({seen[0], seen[-1]} | {min(seen, key=lambda row: abs(row - power)) for power in powers})
    hats = np.stack([np.interp(rows, corners, np.eye(len(corners))[i]) for i in range(len(corners))], axis=1)
    solution = robust_least_squares(np.column_stack([hats, context]), seconds)
    if solution[-1] < 0:  # too short a range of contexts: noise is steeper than the slope
        solution = np.append(robust_least_squares(hats, seconds), 0.0)
    step = np.maximum.accumulate(np.maximum(solution[:-1], 1e-6))  # more rows never cost less
    return tuple(corners), tuple(step.tolist()), float(solution[-1])


def fit_line(amounts: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Return (start, share of each): through the origin where the amounts are too alike to tell the two apart."""
    x, y = np.array(amounts, float), np.array(seconds)
    if x.max() >= 1.5 * x.min():
        start, slope = robust_least_squares(np.column_stack([np.ones_like(x), x]), y)
        if start >= 0 and slope > 0:
            return float(start), float(slope)
    return 0.0, float(np.median(y / x))


def robust_least_squares(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Solve, then again without what lies more than four typical deviations off (another process ran)."""
    solution = np.linalg.lstsq(features, seconds, rcond=None)[0]
    deviation = np.abs(features @ solution - seconds)
    near = deviation <= 4 * max(float(np.median(deviation)), 1e-9)
    if near.sum() <= features.shape[1] or np.linalg.matrix_rank(features[near]) < np.linalg.matrix_rank(features):
        return solution
    return np.linalg.lstsq(features[near], seconds[near], rcond=None)[0]


def measure_bandwidth(position: RankPosition, device: torch.device) -> float:
    """Return the bytes a second from one instance to the next, infinite for a last one without a neighbour. All ranks
    call it."""
    neighbour = position.instance ^ 1
    if neighbour >= position.layout.data:
        return float("inf")
    buffer = torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=device)
    peer, first = position.peer(neighbour), position.instance < neighbour
    best = float("inf")
    for _ in range(3):  # the first one sets up the connection
        begun = time.perf_counter()
        for sends in (first, not first):
            dist.send(buffer, peer) if sends else dist.recv(buffer, peer)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - begun) / 2)
    return PROBE_BYTES / best


MOST_RECENT = 1024
"""Newest lengths that make the histogram."""


class LengthStatistics:
    """Keeps running statistics of response lengths, the same on every rank."""

    def __init__(self, longest: int):
        """`longest` is the limit of a response."""
        self.longest = longest
        self.recent: list[int] = []
        self.by_prompt: dict[int, int] = {}
        self._sorted: list[int] = []
        self._sums: list[int] = []

    def add(self, lengths: Mapping[int, Sequence[int]]) -> None:
        """Add those of one iteration: index of the prompt in its data set -> lengths of its responses."""
        for prompt, of_responses in lengths.items():
            self.recent += of_responses
            self.by_prompt[prompt] = round(sum(of_responses) / len(of_responses))
        self.recent = self.recent[-MOST_RECENT:]
        self._sort()

    def _sort(self) -> None:
        self._sorted = sorted(self.recent)
        self._sums = [0]
        for length in reversed(self._sorted):
            self._sums.append(self._sums[-1] + length)

    @property
    def mean(self) -> float:
        return self._sums[-1] / len(self._sorted) if self._sorted else self.longest / 2

    def expected(self, prompt: int) -> float:
        """Return the length of the next response to a prompt: as the last ones to it, else as all."""
        return self.by_prompt.get(prompt, self.mean)

    def remaining(self, tokens: int) -> float:
        """Return the tokens still to come of a response that has `tokens` and has not ended: the mean over all longer
        ones."""
        longer = len(self._sorted) - bisect_right(self._sorted, tokens)
        if longer == 0:
            return max(1.0, (self.longest - tokens) / 2)
        return self._sums[longer] / longer - tokens

    def as_dict(self) -> dict[str, Any]:
        return {"recent": self.recent, "by_prompt": sorted(self.by_prompt.items())}

    def restore(self, values: dict[str, Any]) -> None:
        self.recent = list(values["recent"])
        self.by_prompt = dict(values["by_prompt"])
        self._sort()


def deal(expected: Sequence[float], instances: int) -> list[list[int]]:
    """Deal samples 0 .. n-1 to instances: longest first, each to the one with the least work by then (then the fewest
    samples)."""
    shares: list[list[int]] = [[] for _ in range(instances)]
    load = [(0.0, 0)] * instances
    for sample in sorted(range(len(expected)), key=lambda sample: (-expected[sample], sample)):
        instance = min(range(instances), key=lambda i: (load[i], i))
        shares[instance].append(sample)
        load[instance] = (load[instance][0] + expected[sample], load[instance][1] + 1)
    return shares
