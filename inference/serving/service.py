"""Between the web layer and the worker, in the event loop: which models there are, who gets a place, who is told."""

import asyncio
import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch

from inference.chat_format import ChatFormat, Prompt
from inference.chat_model import ChatModel, longest_answer
from inference.chat_target import chat_steps, command_of, find_chat_models, find_newest_model, is_finished
from inference.errors import UserError
from inference.generation.sampler import OwnSample, SamplingKey
from inference.serving.answers import Completion, Failure, Logprobs
from inference.serving.request import ApiError, ChatRequest
from inference.serving.worker import Events, Lane, Worker

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
    def places(self) -> int:
        return self.slots + self.queue


class Desk:
    """What the event loop knows of one model."""

    def __init__(self, model: ChatModel, limits: Limits):
        context = min(limits.context, model.context_length or limits.context)
        self.lane = Lane(model, limits.slots, context)
        self.format: ChatFormat = deepcopy(model.format)  # a tokenizer must not be used in two threads
        self.logprobs = Logprobs(model.format.tokenizer)  # for the worker's thread
        self.taken = 0
        """Places of answers that are drawn or wait."""
        self.seconds: deque[float] = deque(maxlen=32)
        """What the last answers took, waiting included."""
        self.created = int(time.time())

    def retry_after(self, limits: Limits) -> int:
        """Seconds in which a place should fall free, from the last answers."""
        mean = sum(self.seconds) / len(self.seconds) if self.seconds else 1.0
        return min(LONGEST_WAIT, max(1, math.ceil(mean / limits.places)))


def tokenize(desk: Desk, request: ChatRequest, wanted: int | None) -> tuple[Prompt, list[int]]:
    """The prompt, and the tokens of the answer's beginning that the messages end with.

    Raises UserError where the chat template refuses the messages.
    """
    begun = desk.format.begun_ids(request.beginning)
    limit = desk.lane.context - (wanted or 0) - len(begun) if request.truncates else 0
    return desk.format.prompt(request.conversation, limit), begun


class Service:
    """Made before the event loop runs; `start` and everything after it belong to the loop."""

    def __init__(self, models: Mapping[str, ChatModel], limits: Limits):
        self.limits = limits
        self.desks = {name: Desk(model, limits) for name, model in models.items()}
        self.is_closing = False
        self._started: dict[Completion, tuple[Desk, float]] = {}  # those that have places, and when they came
        self._worker = Worker([desk.lane for desk in self.desks.values()], self._pass_to_loop)
        self._tokenizing = ThreadPoolExecutor(1, "tokenizing")

    def warm_up(self) -> int:
        """Make all memory of generation; returns the bytes of keys and values."""
        return sum(desk.lane.warm_up() for desk in self.desks.values())

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

    def desk(self, name: str) -> Desk:
        if name not in self.desks:
            there = " and ".join(self.desks)
            raise ApiError(404, f"There is no model '{name[:80]}' here; there is {there}.", "model", "model_not_found")
        return self.desks[name]

    async def begin(self, request: ChatRequest) -> Completion:
        """Start to answer a request; the completion's `events` come in. Must be followed by `end`.

        Raises ApiError where it is not possible, or not now.
        """
        desk = self.desk(request.model)
        if request.n > self.limits.slots:
            raise ApiError(400, f"n can be at most {self.limits.slots} here, not {request.n}.", "n", "invalid_value")
        if (request.wanted_tokens or 0) > self.limits.max_tokens:
            name = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
            message = f"{name} can be at most {self.limits.max_tokens} here, not {request.wanted_tokens}."
            raise ApiError(400, message, name, "invalid_value")
        if self.is_closing:
            raise ApiError(503, CLOSING)
        if desk.taken + request.n > self.limits.places:
            wait = desk.retry_after(self.limits)
            message = f"The server is busy: {desk.taken} answers are on their way; try again in {wait} s."
            raise ApiError(429, message, code="busy", headers={"retry-after": str(wait)})
        desk.taken += request.n
        try:
            completion = await self._completion(desk, request)
            if self.is_closing:
                raise ApiError(503, CLOSING)
        except BaseException:
            desk.taken -= request.n
            raise
        self._started[completion] = desk, time.monotonic()
        self._worker.submit(desk.lane, completion)
        return completion

    def end(self, completion: Completion) -> None:
        """Nobody waits for the completion any more: if it is not over it gives up its slots."""
        if completion in self._started:
            desk = self._leave(completion)
            self._worker.drop(desk.lane, lambda other: other is completion, Failure(499, "The client is gone."))

    async def _completion(self, desk: Desk, request: ChatRequest) -> Completion:
        wanted = request.wanted_tokens
        if request.truncates:
            wanted = longest_answer(wanted or self.limits.max_tokens, desk.lane.context)
        try:
            prompt, begun = await self._loop.run_in_executor(self._tokenizing, tokenize, desk, request, wanted)
        except UserError as error:  # the chat template refuses the conversation
            raise ApiError(400, str(error), "messages", "invalid_value") from None
        length = len(prompt.ids) + len(begun)
        room = desk.lane.context - length
        if room < (wanted or 1):
            answer = f" and the answer up to {wanted}" if wanted else ""
            message = (
                f"The messages have {length} tokens{answer}, but prompt and answer together have room for "
                f"{desk.lane.context}; shorten the conversation{' or ask for fewer tokens' if wanted else ''}."
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
        decode, logprobs = desk.lane.model.format.decode, desk.logprobs if request.logprobs else None
        return Completion(samples, decode, request.stop, request.stream, begun, logprobs, prompt.note)

    def _drop_everywhere(self, waiting_only: bool) -> None:
        for desk in self.desks.values():
            self._worker.drop(
                desk.lane,
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
                desk = self._leave(completion)
                if completion.is_over:
                    desk.seconds.append(time.monotonic() - started)

    def _leave(self, completion: Completion) -> Desk:
        desk, _ = self._started.pop(completion)
        desk.taken -= len(completion.choices)
        return desk


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
