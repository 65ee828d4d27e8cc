"""The thread that all work of torch is done in: it steps the lanes in turn, and between steps does what it is told."""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from inference.chat_model import ChatModel, TextPieces
from inference.generation.engine import GenerationEngine
from inference.generation.own_draw import OwnDraw, OwnSample
from inference.generation.sample import SamplingKey, SamplingSettings
from inference.serving.request import Logprobs, StopStrings


@dataclass(frozen=True)
class Piece:
    """New text of one choice."""

    choice: int
    text: str
    finish: str | None = None
    """With the last piece: `stop` or `length`."""
    logprobs: list[dict[str, Any]] | None = None
    """Of the tokens of the text, where they are asked for."""


@dataclass(frozen=True)
class Failure:
    """The rest will not come."""

    status: int
    message: str


Event = Piece | Failure


class Choice:
    """One answer of a request as it is drawn."""

    def __init__(
        self, sample: OwnSample, decode: Callable[[list[int]], str], stops: Sequence[str], begun: Sequence[int] = ()
    ):
        """The answer goes on behind the tokens `begun`, the end of its prompt."""
        self.sample = sample
        self.finish: str | None = None
        self.text = ""
        self._pieces, self._stops, self._begun = TextPieces(decode), StopStrings(stops), begun
        self._starts: list[int] = []  # of each token: the characters before it
        self._decoded = self._shown_tokens = 0

    def grow(self) -> str:
        """After a token: the text that can be shown now and was not before. A stop string ends the sample."""
        if self._begun and not self._starts:
            self._pieces.take(self._begun)
        self._starts.append(self._decoded)
        piece = self._pieces.take([*self._begun, *self.sample.response_ids], is_whole=self.sample.is_over)
        self._decoded += len(piece)
        shown = self._stops.let_pass(piece, is_last=self.sample.is_over)
        if self._stops.was_found:
            self.sample.ended = True
        if self.sample.is_over:
            self.finish = "stop" if self.sample.ended else "length"
        self.text += shown
        return shown

    def new_tokens(self) -> range:
        """Places of the tokens of which something is shown now, and was not before."""
        shown = sum(start < len(self.text) for start in self._starts)
        if self.finish is not None and not self._stops.was_found:  # also those that say nothing, but for the end
            shown = len(self._starts) - self.sample.ended
        first, self._shown_tokens = self._shown_tokens, max(shown, self._shown_tokens)
        return range(first, self._shown_tokens)


class Job:
    """The choices of one request. The worker draws them; `events` is for the event loop alone."""

    def __init__(
        self,
        prompt_ids: list[int],
        settings: SamplingSettings,
        key: SamplingKey,
        choices: int,
        limit: int,
        stops: Sequence[str],
        decode: Callable[[list[int]], str],
        streams: bool,
        begun: Sequence[int] = (),
        logprobs: Logprobs | None = None,
        alternatives: int = 0,
        note: str = "",
    ):
        """`limit` is the most tokens of an answer. A job that `streams` tells each piece, others whole answers.

        `begun` tokens of an answer follow the prompt. With `logprobs` each token's is told, with those of so many
        `alternatives`. The `note` is for the client.
        """
        prompt: Tensor = torch.tensor([*prompt_ids, *begun], dtype=torch.int64)
        samples = [
            OwnSample(index, prompt, limit, settings=settings, key=key, alternatives=alternatives)
            for index in range(choices)
        ]
        self.choices = [Choice(sample, decode, stops, begun) for sample in samples]
        self.streams, self.note, self._logprobs = streams, note, logprobs
        self.events: asyncio.Queue[Event] = asyncio.Queue()

    def grow(self, choice: Choice) -> Piece | None:
        """After a token of a choice: what there is to tell."""
        text = choice.grow()
        if not self.streams:
            text = choice.text if choice.finish is not None else ""
        if not text and choice.finish is None:
            return None
        logprobs = self._logprobs.of(choice.sample, choice.new_tokens()) if self._logprobs else None
        return Piece(choice.sample.index, text, choice.finish, logprobs)

    @property
    def prompt_tokens(self) -> int:
        return len(self.choices[0].sample.prompt_ids)

    @property
    def response_tokens(self) -> int:
        return sum(len(choice.sample.response_ids) for choice in self.choices)

    @property
    def has_begun(self) -> bool:
        return self.response_tokens > 0

    @property
    def is_over(self) -> bool:
        return all(choice.finish is not None for choice in self.choices)


Told = list[tuple[Job, Event]]
GREEDY = SamplingSettings(max_tokens=0, temperature=0.0)


class Lane:
    """`slots` answers are drawn at the same time, each with room for `context` tokens with its prompt; others wait."""

    def __init__(self, model: ChatModel, slots: int, context: int):
        self.model, self.slots, self.context = model, slots, context
        form = model.format
        # samples have settings of their own, which a captured step has not
        self._engine = GenerationEngine(model.model, form.end_ids, model.pad_id, slots, graphs=False)
        self._drawn: dict[int, tuple[Job, Choice]] = {}  # by the id of the sample
        self.running = self.waiting = 0
        """Answers; any thread may read them."""
        self._begin()

    def warm_up(self) -> int:
        """Draw two tokens at most, so that all memory is there; returns the bytes of keys and values."""
        sample = OwnSample(0, torch.tensor(self._engine.end_ids[:1]), 2, settings=GREEDY, key=SamplingKey(0))
        self.decoding.enqueue(sample)
        while not sample.is_over:
            self.decoding.step(1)
        return self._engine.cache.bytes

    @property
    def is_idle(self) -> bool:
        return not self._drawn

    def admit(self, job: Job) -> Told:
        for choice in job.choices:
            self._drawn[id(choice.sample)] = job, choice
            self.decoding.enqueue(choice.sample)
        self._count()
        return []

    def step(self) -> Told:
        """One token for each running answer, or the first for those whose turn has come; what there is to tell."""
        told: Told = []
        for sample in self.decoding.step(1):
            job, choice = self._drawn[id(sample)]
            piece = job.grow(choice)
            if choice.finish is not None:
                del self._drawn[id(sample)]
            if piece is not None:
                told.append((job, piece))
        self._count()
        return told

    def drop(self, wanted: Callable[[Job], bool], failure: Failure) -> Told:
        """The jobs that are `wanted` leave, and their slots are free."""
        jobs = {id(job): job for job, _ in self._drawn.values() if wanted(job)}
        gone = [choice.sample for job, choice in self._drawn.values() if id(job) in jobs]
        self.decoding.take(gone, with_cache=False)
        for sample in gone:
            del self._drawn[id(sample)]
        self._count()
        return [(job, failure) for job in jobs.values()]

    def drop_all(self, failure: Failure) -> Told:
        """After an error in a step, when nothing is known of the decoding: begin anew."""
        jobs = {id(job): job for job, _ in self._drawn.values()}
        self._drawn.clear()
        self._begin()
        self._count()
        return [(job, failure) for job in jobs.values()]

    def _begin(self) -> None:
        self.decoding = self._engine.start_with(OwnDraw(self._engine.end_ids), [], (self.slots, self.context))

    def _count(self) -> None:
        self.running = sum(bool(choice.sample.response_ids) for _, choice in self._drawn.values())
        self.waiting = len(self._drawn) - self.running


logger = logging.getLogger(__name__)
BROKE = Failure(500, "Drawing this answer failed; the server's log says why.")


class Worker:
    """`tell` is called in the worker's thread, after each step and each order."""

    def __init__(self, lanes: Sequence[Lane], tell: Callable[[Told], None]):
        self._lanes, self._tell = lanes, tell
        self._orders: SimpleQueue[Callable[[], Told]] = SimpleQueue()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Wait for the end of the step that is being done; jobs that are not over hear nothing more."""
        self._orders.put(self._stop)
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, lane: Lane, job: Job) -> None:
        self._orders.put(lambda: lane.admit(job))

    def drop(self, lane: Lane, wanted: Callable[[Job], bool], failure: Failure) -> None:
        """The jobs that are `wanted` leave the lane before its next step and hear of the failure."""
        self._orders.put(lambda: lane.drop(wanted, failure))

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                self._round()
            except Exception:  # out of memory, or an error in a model's own code: ends the jobs, and not the server
                logger.exception("drawing failed; all answers that are on their way are given up")
                for lane in self._lanes:
                    self._tell(lane.drop_all(BROKE))

    def _round(self) -> None:
        """The orders that there are, then one step for each lane that has work."""
        for order in self._next_orders():
            self._tell(order())
        for lane in self._lanes:
            if not lane.is_idle:
                self._tell(lane.step())

    def _next_orders(self) -> Iterator[Callable[[], Told]]:
        """Those that there are; without anything else to do the thread waits for one."""
        if all(lane.is_idle for lane in self._lanes):
            yield self._orders.get()
        while True:
            try:
                yield self._orders.get_nowait()
            except Empty:
                return

    def _stop(self) -> Told:
        self._is_stopping = True
        return []
