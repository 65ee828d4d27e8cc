"""The thread that does all work of torch: it steps the lanes in turn, and between steps carries out orders."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue

import torch

from inference.chat_model import ChatModel
from inference.generation.engine import GenerationEngine
from inference.generation.sampler import OwnDraw, OwnSample, SamplingKey, SamplingSettings
from inference.serving.answers import Choice, Completion, Delta, Failure

logger = logging.getLogger(__name__)
Events = list[tuple[Completion, Delta | Failure]]
GREEDY = SamplingSettings(max_tokens=0, temperature=0.0)


class Lane:
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

    def __init__(self, lanes: Sequence[Lane], tell: Callable[[Events], None]):
        self._lanes, self._tell = lanes, tell
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

    def submit(self, lane: Lane, completion: Completion) -> None:
        self._orders.put(lambda: lane.admit(completion))

    def drop(self, lane: Lane, wanted: Callable[[Completion], bool], failure: Failure) -> None:
        """Let the completions that are `wanted` fail before the lane's next step."""
        self._orders.put(lambda: lane.drop(wanted, failure))

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                for order in self._next_orders():
                    self._tell(order())
                for lane in self._lanes:
                    if not lane.is_idle:
                        self._tell(lane.step())
            except Exception:  # out of memory, or an error in a model's own code: the server goes on
                logger.exception("drawing failed; all answers that are on their way are given up")
                for lane in self._lanes:
                    self._tell(lane.drop_all(Failure(500, "Drawing this answer failed; the server's log says why.")))

    def _next_orders(self) -> Iterator[Callable[[], Events]]:
        """The orders that have come; without anything else to do the thread waits for one."""
        if all(lane.is_idle for lane in self._lanes):
            yield self._orders.get()
        while True:
            try:
                yield self._orders.get_nowait()
            except Empty:
                return

    def _stop(self) -> Events:
        self._is_stopping = True
        return []
