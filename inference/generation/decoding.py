"""The samples of one call on their way: which of them run in which slots, step by step, and how they are handed over
between engines in the middle of it.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.generation.graphs import MOST_STEPS, Replay
from inference.generation.kv_cache import KVCache
from inference.generation.passes import Passes
from inference.generation.sampler import Draw, Sample


@dataclass
class GenerationStats:
    """The work of generation so far. A row-step is one row of one decode step."""

    slots: int
    samples: int = 0
    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    """Less than `prompt_tokens` where samples share a prompt."""
    response_tokens: int = 0
    decode_steps: int = 0
    row_steps: int = 0

    @property
    def occupancy(self) -> float:
        """Share of the slots that worked in a decode step, on average."""
        return self.row_steps / (self.decode_steps * self.slots) if self.decode_steps else 0.0


class Scheduler:
    """Rows 0 .. n-1 are the running samples; a row that falls free is filled from the queue, or by the last row."""

    def __init__(self, samples: Iterable[Sample], slots: int, prefill_tokens: int):
        self.waiting = deque(samples)
        self.running: list[Sample] = []
        self.slots, self.prefill_tokens = slots, prefill_tokens

    def admit(self) -> list[Sample]:
        """Samples that start now, in the next free rows: as many as have a slot and fit the budget of prompt tokens
        (one always fits). Samples with the same prompt, one behind the other, count it once."""
        admitted: list[Sample] = []
        tokens = 0
        while self.waiting and len(self.running) < self.slots:
            sample = self.waiting[0]
            if not (admitted and same_prompt(sample, admitted[-1])):
                tokens += len(sample.cached_ids)
            if admitted and tokens > self.prefill_tokens:
                break
            self.waiting.popleft()
            admitted.append(sample)
            self.running.append(sample)
        return admitted

    def retire(self) -> list[tuple[int, int]]:
        """Drop the samples that are over; the last rows move into the gaps. Returns the moves (from row, to row)."""
        return self.drop([sample for sample in self.running if sample.is_over])

    def drop(self, samples: Collection[Sample]) -> list[tuple[int, int]]:
        """Take samples out of rows and queue; returns the moves of rows as `retire` does."""
        gone = {id(sample) for sample in samples}
        self.waiting = deque(sample for sample in self.waiting if id(sample) not in gone)
        moves = []
        row = 0
        while row < len(self.running):
            if id(self.running[row]) not in gone:
                row += 1
                continue
            last = self.running.pop()
            if row < len(self.running):
                self.running[row] = last
                if id(last) not in gone:
                    moves.append((len(self.running), row))
        return moves


def same_prompt(a: Sample, b: Sample) -> bool:
    """Of two samples that have no response yet."""
    if a.response_ids or b.response_ids:
        return False
    return a.prompt_ids is b.prompt_ids or (
        len(a.prompt_ids) == len(b.prompt_ids) and bool((a.prompt_ids == b.prompt_ids).all())
    )


@dataclass(frozen=True)
class StepWork:
    """What one step worked on: either prompts or the next tokens of each running sample."""

    prefilled: int = 0
    """Tokens whose keys and values were made in a prefill."""
    rows: int = 0
    """Samples that were decoded, summed over the decode steps."""
    context: int = 0
    """Tokens that these samples attended to, summed."""
    steps: int = 1
    """Decode steps that `rows` and `context` are sums over."""


class Decoding:
    """A step admits waiting samples (their prompts are prefilled, their first tokens drawn) or decodes one token for
    every running sample; with a `replay` several tokens. Made by `GenerationEngine.start`; the engine's weights and
    cache belong to it until it ends.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        cache: KVCache,
        passes: Passes,
        draw: Draw,
        stats: GenerationStats,
        weights_in_use: Callable[[], AbstractContextManager[None]],
        replay: Replay | None = None,
    ):
        self.scheduler, self.cache, self.passes, self.draw, self.stats = scheduler, cache, passes, draw, stats
        self._weights_in_use, self.replay = weights_in_use, replay
        self.work = StepWork()
        """Of the last step."""

    @property
    def unfinished(self) -> list[Sample]:
        """Running, then waiting."""
        running = [sample for sample in self.scheduler.running if not sample.is_over]
        return running + list(self.scheduler.waiting)

    @property
    def is_over(self) -> bool:
        return not self.scheduler.waiting and all(sample.is_over for sample in self.scheduler.running)

    def step(self, most: int = MOST_STEPS) -> list[Sample]:
        """The samples that got tokens, each at most `most`; those of them that are over leave. Empty if only moved
        samples came in."""
        with torch.inference_mode(), self._weights_in_use():
            self._retire()
            if admitted := self.scheduler.admit():
                grown = self._prefill(admitted)
            elif grown := list(self.scheduler.running):
                self._decode(grown, most)
        return grown

    def enqueue(self, sample: Sample) -> None:
        """A new sample waits for its turn behind the others; the room of the decoding must be enough for it."""
        self.scheduler.waiting.append(sample)

    @torch.inference_mode()
    def take(self, samples: Sequence[Sample], with_cache: bool) -> list[Tensor | None]:
        """Unfinished samples leave; for each the keys and values of all tokens but the newest (`KVCache.read`), or
        None if it has none yet or they are not wanted."""
        self._retire()
        row_of = {id(sample): row for row, sample in enumerate(self.scheduler.running)} if with_cache else {}
        kept = [
            self.cache.read(row_of[id(sample)], sample.length - 1) if id(sample) in row_of else None
            for sample in samples
        ]
        for source, target in self.scheduler.drop(samples):
            self._move(source, target)
        return kept

    @torch.inference_mode()
    def add(self, sample: Sample, kept: Tensor | None) -> None:
        """Go on with a sample that another engine of the same model began; without `kept`, or if no row is free, what
        it has so far is prefilled when its turn comes."""
        self._retire()
        row = len(self.scheduler.running)
        if kept is None or row == self.scheduler.slots:
            self.scheduler.waiting.appendleft(sample)
        else:
            self.cache.write(row, sample.length - 1, kept)
            self.scheduler.running.append(sample)

    def _retire(self) -> None:
        for source, target in self.scheduler.retire():
            self._move(source, target)

    def _move(self, source: int, target: int) -> None:
        self.cache.copy(source, target, self.scheduler.running[target].length - 1)

    def _prefill(self, admitted: list[Sample]) -> list[Sample]:
        """Put samples into the last rows and draw the first token of those that have none; neighbours with the same
        prompt share one pass."""
        first_row = len(self.scheduler.running) - len(admitted)
        leaders = [
            place for place, sample in enumerate(admitted) if place == 0 or not same_prompt(sample, admitted[place - 1])
        ]
        prompts = [admitted[place].cached_ids for place in leaders]
        logits = self.passes.prefill(prompts, [first_row + place for place in leaders])
        leader_of = [sum(leader <= place for leader in leaders) - 1 for place in range(len(admitted))]
        for place, leader in enumerate(leader_of):
            if leaders[leader] != place:
                self.cache.copy(first_row + leaders[leader], first_row + place, len(admitted[place].prompt_ids))
        fresh = [place for place, sample in enumerate(admitted) if not sample.response_ids]
        grown = [admitted[place] for place in fresh]
        self.work = StepWork(prefilled=sum(map(len, prompts)))
        self.stats.samples += len(grown)
        self.stats.response_tokens += len(grown)
        self.stats.prompt_tokens += sum(len(sample.prompt_ids) for sample in grown)
        self.stats.prefilled_tokens += self.work.prefilled
        if grown:
            rows = [leader_of[place] for place in fresh]
            self.draw(logits if rows == list(range(len(logits))) else logits[rows], grown)
        return grown

    def _decode(self, running: list[Sample], most: int) -> None:
        lengths = [sample.length - 1 for sample in running]  # the newest token of each is not in the cache yet
        steps = 1
        if self.replay is None:
            newest = torch.tensor([sample.response_ids[-1] for sample in running], device=self.passes.device)
            self.draw(self.passes.decode(newest, lengths), running)
            self.stats.response_tokens += len(running)
        else:
            steps = min(most, MOST_STEPS, *(sample.limit - len(sample.response_ids) for sample in running))
            self._write(running, *self.replay.run(running, steps, self.draw))
        rows = steps * len(running)
        context = steps * sum(lengths) + len(running) * (steps * (steps - 1) // 2)
        self.work = StepWork(rows=rows, context=context, steps=steps)
        self.stats.decode_steps += steps
        self.stats.row_steps += rows

    def _write(self, running: list[Sample], tokens: list[list[int]], logprobs: list[list[float]]) -> None:
        """Give samples what was drawn for them, (steps, samples) each; what lies behind an end is thrown away."""
        for drawn in zip(tokens, logprobs, strict=True):
            for sample, token, logprob in zip(running, *drawn, strict=True):
                if not sample.is_over:
                    self.draw.write(sample, token, logprob)
                    self.stats.response_tokens += 1
