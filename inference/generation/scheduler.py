"""Which samples run in which slots: a queue, the running rows, and what the work was."""

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from inference.generation.sampler import Sample


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
