"""Continuous batching over token ids: samples start as slots fall free and are handed over one by one as they end.

Nothing here depends on when a sample runs or beside which others: its random numbers are a function of (seed,
iteration, sample, position).
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inference.generation.cpu import BlockedWeights, Exactness
from inference.generation.kv_cache import KVCache
from inference.generation.passes import MOST_STEPS, PackedPasses, Passes, Replay, make_passes, preferred_cache_dtype
from inference.generation.sampler import Draw, Sample, SamplingKey, SamplingSettings


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
        """Remove the finished samples; the last rows move into the gaps. Returns the moves (from row, to row)."""
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
    """Whether two samples have the same prompt, and no response yet."""
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
        """What the last step worked on."""

    @property
    def unfinished(self) -> list[Sample]:
        """Running, then waiting."""
        running = [sample for sample in self.scheduler.running if not sample.is_over]
        return running + list(self.scheduler.waiting)

    @property
    def is_over(self) -> bool:
        return not self.scheduler.waiting and all(sample.is_over for sample in self.scheduler.running)

    def step(self, most: int = MOST_STEPS) -> list[Sample]:
        """The samples that got tokens, each at most `most`; finished ones are removed. Empty if only moved
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
        caches = [
            self.cache.read(row_of[id(sample)], sample.length - 1) if id(sample) in row_of else None
            for sample in samples
        ]
        for source, target in self.scheduler.drop(samples):
            self._move(source, target)
        return caches

    @torch.inference_mode()
    def add(self, sample: Sample, cache: Tensor | None) -> None:
        """Go on with a sample that another engine of the same model began. Without its `cache`, or if no row is free,
        what it has so far is prefilled when its turn comes."""
        self._retire()
        row = len(self.scheduler.running)
        if cache is None or row == self.scheduler.slots:
            self.scheduler.waiting.appendleft(sample)
        else:
            self.cache.write(row, sample.length - 1, cache)
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
            index for index, sample in enumerate(admitted) if index == 0 or not same_prompt(sample, admitted[index - 1])
        ]
        prompts = [admitted[index].cached_ids for index in leaders]
        logits = self.passes.prefill(prompts, [first_row + index for index in leaders])
        leader_of = [sum(leader <= index for leader in leaders) - 1 for index in range(len(admitted))]
        for index, leader in enumerate(leader_of):
            if leaders[leader] != index:
                self.cache.copy(first_row + leaders[leader], first_row + index, len(admitted[index].prompt_ids))
        fresh = [index for index, sample in enumerate(admitted) if not sample.response_ids]
        grown = [admitted[index] for index in fresh]
        self.work = StepWork(prefilled=sum(map(len, prompts)))
        self.stats.samples += len(grown)
        self.stats.response_tokens += len(grown)
        self.stats.prompt_tokens += sum(len(sample.prompt_ids) for sample in grown)
        self.stats.prefilled_tokens += self.work.prefilled
        if grown:
            rows = [leader_of[index] for index in fresh]
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


PREFILL_TOKENS = 4096
"""Prompt tokens in one prefill pass, at most (one prompt always goes)."""


class GenerationEngine:
    """Generates with a causal language model of `transformers` that the caller keeps in evaluation mode.

    The memory for keys and values stays from one call to the next, as long as it is large enough.
    """

    def __init__(
        self,
        model: nn.Module,
        end_ids: int | Sequence[int],
        pad_id: int,
        slots: int = 32,
        prefill_tokens: int = PREFILL_TOKENS,
        graphs: bool | None = None,
        exact: Exactness | None = None,
        room: tuple[int, int] = (0, 0),
    ):
        """Any of `end_ids` ends a sample. `slots` is how many samples are decoded at the same time.

        `graphs` lets decode steps follow each other without the host, on CUDA as graphs (`Replay`). None: on CUDA.
        It is for packed models; others decode as without it. `exact` makes the bits of a token's log-probabilities
        those of any other pass, on a CPU. `room` is (samples, tokens of a sample) of the largest call to come: cache
        and graphs are made for it, and so stay from call to call.
        """
        self.model = model
        self.end_ids = (end_ids,) if isinstance(end_ids, int) else tuple(end_ids)
        self.pad_id = pad_id
        self.slots, self.prefill_tokens, self.graphs, self.exact = slots, prefill_tokens, graphs, exact
        self.room = min(slots, room[0]), room[1]
        self.cache = KVCache(0, 0)
        self._blocked: Future[BlockedWeights] | None = None
        self._replay: Replay | None = None
        self.stats = GenerationStats(slots)

    def generate(
        self,
        prompts: Sequence[Tensor],  # each (length) int64, length >= 1
        settings: SamplingSettings,
        key: SamplingKey,
        indices: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Iterator[Sample]:
        """Yield each sample when it ends. `indices` name the samples (0, 1, ... by default) and seed their draws.

        `lengths` forces the length of each response: no sample ends before it, and each ends there. For measuring.
        """
        indices = range(len(prompts)) if indices is None else indices
        limits = [settings.max_tokens] * len(prompts) if lengths is None else lengths
        samples = [Sample(index, prompt, limit) for index, prompt, limit in zip(indices, prompts, limits, strict=True)]
        decoding = self.start(samples, settings, key, may_end=lengths is None)
        while not decoding.is_over:
            yield from (sample for sample in decoding.step() if sample.is_over)

    def stream(self, prompt: Tensor, settings: SamplingSettings, key: SamplingKey) -> Iterator[Sample]:
        """Yield the sample of one prompt, growing, after each of its tokens; they are those that `generate` draws."""
        decoding = self.start([Sample(0, prompt, settings.max_tokens)], settings, key)
        while not decoding.is_over:
            yield from decoding.step(1)

    def start(
        self,
        samples: list[Sample],
        settings: SamplingSettings,
        key: SamplingKey,
        may_end: bool = True,
        room: tuple[int, int] = (0, 0),
    ) -> Decoding:
        """The samples on their way, for callers that step the decoding themselves; one at a time.

        `may_end=False` forbids the end tokens: each sample goes to its limit. `room` is (samples, tokens of a sample)
        to keep free at least, for samples that come from elsewhere.
        """
        return self.start_with(Draw(settings, key, self.end_ids, may_end), samples, room)

    def start_with(self, draw: Draw, samples: list[Sample], room: tuple[int, int] = (0, 0)) -> Decoding:
        """`start` with a draw of the caller's; one that is not the same for all samples needs an engine without
        graphs."""
        slots = min(self.slots, max(len(samples), room[0]))
        capacity = max([room[1], *(len(sample.prompt_ids) + sample.limit for sample in samples)])
        capacity = capacity if self.exact is None else self.exact.seen(capacity)
        if not self.cache.fits(slots, capacity):
            most, longest = max(slots, self.room[0]), max(capacity, self.room[1])
            self.cache = KVCache(most, longest, preferred_cache_dtype(self.model, self.exact), self.exact)
        self.stats = GenerationStats(slots)
        if self.exact is None or self.exact.blocked:
            self.prepare()
        passes = make_passes(self.model, self.cache, self.pad_id, self.exact)
        self._replay = self._replay_of(passes)
        return Decoding(
            Scheduler(samples, slots, self.prefill_tokens),
            self.cache,
            passes,
            draw,
            self.stats,
            self._weights_in_use,
            self._replay,
        )

    def prepare(self) -> Future[BlockedWeights]:
        """Have the blocked copy of the weights made, in a thread, unless there is one: the first token waits for it."""
        if self._blocked is None:
            beside = ThreadPoolExecutor(1)
            self._blocked = beside.submit(BlockedWeights, self.model)
            beside.shutdown(wait=False)
        return self._blocked

    def weights_changed(self) -> None:
        """Must be called after the model's weights have changed: their blocked copy is made again."""
        self._blocked = None

    def release(self) -> None:
        """Give back the memory for keys and values, the blocked weights and the graphs; the next call makes them again.

        No samples may be on their way.
        """
        self.cache.release()
        self._blocked = self._replay = None

    def _weights_in_use(self) -> AbstractContextManager[None]:
        """Inside, the model computes with its blocked weights."""
        if self.exact is not None and not self.exact.blocked:
            return nullcontext()
        return self.prepare().result().in_use()

    def _replay_of(self, passes: Passes) -> Replay | None:
        """The one there is, as long as its graphs hold."""
        wanted = passes.device.type == "cuda" if self.graphs is None else self.graphs
        if not wanted or not isinstance(passes, PackedPasses):
            return None
        if self._replay is not None and self._replay.holds_for(passes):
            return self._replay
        return Replay(passes)
