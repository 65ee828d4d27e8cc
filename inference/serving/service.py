"""Between the web layer and torch: which models there are, who gets a turn; the thread that does all work of torch."""

import asyncio
import logging
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

import torch

from inference.chat_format import ChatFormat, Prompt
from inference.chat_model import ChatModel, longest_answer
from inference.chat_target import chat_steps, command_of, find_chat_models, find_newest_model, is_finished
from inference.errors import UserError
from inference.generation.engine import GenerationEngine
from inference.generation.sampler import OwnDraw, OwnSample, SamplingKey, SamplingSettings
from inference.serving.answers import Choice, Completion, Delta, Failure, Logprobs
from inference.serving.request import ApiError, ChatRequest

logger = logging.getLogger(__name__)
Events = list[tuple[Completion, Delta | Failure]]
GREEDY = SamplingSettings(max_tokens=0, temperature=0.0)


class ContinuousBatch:
    """Draws `slots` answers of a model at the same time, each with room for `context` tokens with its prompt."""

    def __init__(self, model: ChatModel, slots: int, context: int):
        self.model, self.slots, self.context = model, slots, context
        # samples have settings of their own, which a captured step has not
        self._engine = GenerationEngine(model.model, model.format.end_ids, model.pad_id, slots, graphs=False)
        self._unfinished: dict[int, tuple[Completion, Choice]] = {}  # by the id of the sample
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
        return not self._unfinished

    def admit(self, completion: Completion) -> Events:
        for choice in completion.choices:
            self._unfinished[id(choice.sample)] = completion, choice
            self.decoding.enqueue(choice.sample)
        self._count()
        return []

    def step(self) -> Events:
        """Draw one token for each running answer, or the first for those whose turn has come."""
        events: Events = []
        for sample in self.decoding.step(1):
            completion, choice = self._unfinished[id(sample)]
            delta = completion.grow(choice)
            if choice.finish is not None:
                del self._unfinished[id(sample)]
            if delta is not None:
                events.append((completion, delta))
        self._count()
        return events

    def drop(self, wanted: Callable[[Completion], bool], failure: Failure) -> Events:
        """Remove the completions that are `wanted`, which frees their slots."""
        samples = [choice.sample for completion, choice in self._unfinished.values() if wanted(completion)]
        self.decoding.take(samples, with_cache=False)
        completions = dict.fromkeys(self._unfinished.pop(id(sample))[0] for sample in samples)
        self._count()
        return [(completion, failure) for completion in completions]

    def drop_all(self, failure: Failure) -> Events:
        """After an error in a step, when nothing is known of the decoding: start again with an empty one."""
        completions = dict.fromkeys(completion for completion, _ in self._unfinished.values())
        self._unfinished.clear()
        self._begin()
        self._count()
        return [(completion, failure) for completion in completions]

    def _begin(self) -> None:
        self.decoding = self._engine.start_with(OwnDraw(self._engine.end_ids), [], (self.slots, self.context))

    def _count(self) -> None:
        self.running = sum(bool(choice.sample.response_ids) for _, choice in self._unfinished.values())
        self.waiting = len(self._unfinished) - self.running


class Worker:
    """`tell` is called in the worker's thread, after each step and each order."""

    def __init__(self, batches: Sequence[ContinuousBatch], tell: Callable[[Events], None]):
        self._batches, self._tell = batches, tell
        self._orders: SimpleQueue[Callable[[], Events]] = SimpleQueue()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Wait for the end of the present step; completions that are not over get no more events."""
        self._orders.put(self._stop)
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, batch: ContinuousBatch, completion: Completion) -> None:
        self._orders.put(lambda: batch.admit(completion))

    def drop(self, batch: ContinuousBatch, wanted: Callable[[Completion], bool], failure: Failure) -> None:
        """Let the completions that are `wanted` fail before the batch's next step."""
        self._orders.put(lambda: batch.drop(wanted, failure))

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                for order in self._next_orders():
                    self._tell(order())
                for batch in self._batches:
                    if not batch.is_idle:
                        self._tell(batch.step())
            except Exception:  # out of memory, or an error in a model's own code: the server goes on
                logger.exception("drawing failed; all answers that are on their way are given up")
                for batch in self._batches:
                    self._tell(batch.drop_all(Failure(500, "Drawing this answer failed; the server's log says why.")))

    def _next_orders(self) -> Iterator[Callable[[], Events]]:
        """The orders that have come; without anything else to do the thread waits for one."""
        if all(batch.is_idle for batch in self._batches):
            yield self._orders.get()
        while True:
            try:
                yield self._orders.get_nowait()
            except Empty:
                return

    def _stop(self) -> Events:
        self._is_stopping = True
        return []


CLOSING = "The server is shutting down."
LONGEST_WAIT = 60
"""Seconds that a busy server asks clients to wait, at most."""


@dataclass(frozen=True)
class Limits:
    """What one model may take."""

    slots: int
    """Answers drawn at the same time."""
    queue: int
    """Answers that wait for a slot."""
    context: int
    """Tokens of a prompt and its answer."""
    max_tokens: int
    """Tokens of an answer."""

    @property
    def capacity(self) -> int:
        return self.slots + self.queue


class ModelState:
    """What the event loop knows of one model."""

    def __init__(self, model: ChatModel, limits: Limits):
        context = min(limits.context, model.context_length or limits.context)
        self.batch = ContinuousBatch(model, limits.slots, context)
        self.format: ChatFormat = deepcopy(model.format)  # a tokenizer must not be used in two threads
        self.logprobs = Logprobs(model.format.tokenizer)  # for the worker's thread
        self.taken = 0
        """Answers that are drawn or wait."""
        self.seconds: deque[float] = deque(maxlen=32)
        """What the last answers took, waiting included."""
        self.created = int(time.time())

    def retry_after(self, limits: Limits) -> int:
        """Seconds until there should be room for an answer, from the last ones."""
        mean = sum(self.seconds) / len(self.seconds) if self.seconds else 1.0
        return min(LONGEST_WAIT, max(1, math.ceil(mean / limits.capacity)))


def tokenize(served: ModelState, request: ChatRequest, wanted: int | None) -> tuple[Prompt, list[int]]:
    """The prompt, and the tokens of the answer's beginning that the messages end with.

    Raises UserError where the chat template refuses the messages.
    """
    begun = served.format.begun_ids(request.beginning)
    limit = served.batch.context - (wanted or 0) - len(begun) if request.truncates else 0
    return served.format.prompt(request.conversation, limit), begun


class Service:
    """Made before the event loop runs; `start` and everything after it belong to the loop."""

    def __init__(self, models: Mapping[str, ChatModel], limits: Limits):
        self.limits = limits
        self.served = {name: ModelState(model, limits) for name, model in models.items()}
        self.is_closing = False
        self._started: dict[Completion, tuple[ModelState, float]] = {}
        """Those that are drawn or wait, and when they came."""
        self._worker = Worker([served.batch for served in self.served.values()], self._pass_to_loop)
        self._tokenizing = ThreadPoolExecutor(1, "tokenizing")

    def warm_up(self) -> int:
        """Make all memory of generation; returns the bytes of keys and values."""
        return sum(served.batch.warm_up() for served in self.served.values())

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._worker.start()

    def stop(self) -> None:
        self._worker.stop()
        self._tokenizing.shutdown(cancel_futures=True)

    async def close(self, grace: float, is_hurried: Callable[[], bool]) -> None:
        """Take no more requests and turn away what waits; what is being drawn has `grace` seconds to end, or until
        `is_hurried()`."""
        self.is_closing = True
        self._drop_everywhere(waiting_only=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while self._started and not is_hurried():
                    await asyncio.sleep(0.02)
        self._drop_everywhere(waiting_only=False)

    def find(self, name: str) -> ModelState:
        if name not in self.served:
            there = " and ".join(self.served)
            raise ApiError(404, f"There is no model '{name[:80]}' here; there is {there}.", "model", "model_not_found")
        return self.served[name]

    async def begin(self, request: ChatRequest) -> Completion:
        """Start to answer a request; the completion's `events` come in. Must be followed by `end`.

        Raises ApiError where it is not possible, or not now.
        """
        served = self.find(request.model)
        if request.n > self.limits.slots:
            raise ApiError(400, f"n can be at most {self.limits.slots} here, not {request.n}.", "n", "invalid_value")
        if (request.wanted_tokens or 0) > self.limits.max_tokens:
            name = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
            message = f"{name} can be at most {self.limits.max_tokens} here, not {request.wanted_tokens}."
            raise ApiError(400, message, name, "invalid_value")
        if self.is_closing:
            raise ApiError(503, CLOSING)
        if served.taken + request.n > self.limits.capacity:
            wait = served.retry_after(self.limits)
            message = f"The server is busy: {served.taken} answers are on their way; try again in {wait} s."
            raise ApiError(429, message, code="busy", headers={"retry-after": str(wait)})
        served.taken += request.n
        try:
            completion = await self._completion(served, request)
            if self.is_closing:
                raise ApiError(503, CLOSING)
        except BaseException:
            served.taken -= request.n
            raise
        self._started[completion] = served, time.monotonic()
        self._worker.submit(served.batch, completion)
        return completion

    def end(self, completion: Completion) -> None:
        """Nobody waits for the completion any more: if it is not over it gives up its slots."""
        if completion in self._started:
            served = self._leave(completion)
            self._worker.drop(served.batch, lambda other: other is completion, Failure(499, "The client is gone."))

    async def _completion(self, served: ModelState, request: ChatRequest) -> Completion:
        wanted = request.wanted_tokens
        if request.truncates:
            wanted = longest_answer(wanted or self.limits.max_tokens, served.batch.context)
        try:
            prompt, begun = await self._loop.run_in_executor(self._tokenizing, tokenize, served, request, wanted)
        except UserError as error:  # the chat template refuses the conversation
            raise ApiError(400, str(error), "messages", "invalid_value") from None
        length = len(prompt.ids) + len(begun)
        room = served.batch.context - length
        if room < (wanted or 1):
            answer = f" and the answer up to {wanted}" if wanted else ""
            message = (
                f"The messages have {length} tokens{answer}, but prompt and answer together have room for "
                f"{served.batch.context}; shorten the conversation{' or ask for fewer tokens' if wanted else ''}."
            )
            raise ApiError(400, message, "messages", "context_length_exceeded")
        key = SamplingKey(secrets.randbits(62) if request.seed is None else request.seed)
        samples = [
            OwnSample(
                index,
                torch.tensor([*prompt.ids, *begun], dtype=torch.int64),
                limit=wanted or min(room, self.limits.max_tokens),
                settings=request.settings,
                key=key,
                alternatives=request.top_logprobs,
            )
            for index in range(request.n)
        ]
        decode, logprobs = served.batch.model.format.decode, served.logprobs if request.logprobs else None
        return Completion(samples, decode, request.stop, request.stream, begun, logprobs, prompt.note)

    def _drop_everywhere(self, waiting_only: bool) -> None:
        for served in self.served.values():
            self._worker.drop(
                served.batch,
                lambda completion: not (waiting_only and completion.response_tokens),
                Failure(503, CLOSING),
            )

    def _pass_to_loop(self, events: Events) -> None:
        """Called in the worker's thread."""
        if events:
            with suppress(RuntimeError):  # the loop has been closed: nobody listens
                self._loop.call_soon_threadsafe(self._receive, events)

    def _receive(self, events: Events) -> None:
        for completion, event in events:
            completion.events.put_nowait(event)
            if completion in self._started and (isinstance(event, Failure) or completion.is_over):
                started = self._started[completion][1]
                served = self._leave(completion)
                if completion.is_over:
                    served.seconds.append(time.monotonic() - started)

    def _leave(self, completion: Completion) -> ModelState:
        served, _ = self._started.pop(completion)
        served.taken -= len(completion.choices)
        return served


def find_served_models(target: Path) -> dict[str, Path]:
    """`sft` and `rlhf` of a run as far as they are finished; of a step's directory its model; or a model's directory
    under its name. Raises UserError where there is nothing to serve."""
    if (target / "config.yaml").is_file():
        folders = [target / folder for folder in chat_steps(target).values()]
        models = {command_of(folder.name): folder / "model" for folder in folders if is_finished(folder)}
        if "rlhf" not in models:
            find_newest_model(target)  # says so, or raises
        return models
    directory = target.resolve()
    step = directory.parent if directory.name == "model" else directory
    is_of_run = step.name in chat_steps(step.parent).values()
    if is_of_run and step == directory and (target / "model").is_dir():
        target = target / "model"
    ((_, directory),) = find_chat_models(target, compare=False)
    return {command_of(step.name) if is_of_run else step.name: directory}
