"""One model that is served: its decoding, and the jobs in it. Belongs to the worker's thread."""

from collections.abc import Callable

import torch

from inference.chat_model import ChatModel
from inference.generation.engine import GenerationEngine
from inference.generation.own_draw import OwnDraw, OwnSample
from inference.generation.sample import SamplingKey, SamplingSettings
from inference.serving.job import Choice, Event, Failure, Job

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
