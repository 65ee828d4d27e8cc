"""How long generation and scoring will take, with fusion and without: an event simulation of `rollout`.

Fed with lengths and costs; decode steps between two ends of samples are summed in closed form, so a rollout costs some
hundred operations whatever its lengths.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import itemgetter

from inference.generation.engine import PREFILL_TOKENS
from training.data.batching import plan_micro_batches
from training.fusion.board import FusionPolicy, Remaining, SampleLengths, Span, decide
from training.fusion.costs import Costs


@dataclass(frozen=True)
class SimulatorConfig:
    """Says what a simulated rollout runs on, and what work costs there."""

    costs: Costs
    slots: int
    """The slots of an instance."""
    tensor: int = 1
    """The ranks of an instance."""
    micro_batch_tokens: int = 4096
    """Tokens of a micro-batch that is scored without fusion."""

    @cached_property
    def step_seconds(self) -> list[float]:
        """Seconds of a decode step, without its context, by its rows."""
        return [self.costs.step_seconds(rows) for rows in range(self.slots + 1)]


@dataclass
class SimulatedRollout:
    """Says how a simulated rollout went."""

    seconds: float
    """From the start of generation to the end of scoring."""
    generated: float
    """When the last sample ended."""
    repackings: int = 0
    moved: int = 0
    spans: list[list[Span]] = field(default_factory=list)
    """What each rank does, by rank."""


class DecodingInstance:
    """Simulates one instance that decodes: a clock, rows and a queue."""

    def __init__(self, samples: Sequence[SampleLengths], config: SimulatorConfig):
        self.config = config
        self.clock = 0.0
        self.waiting = deque((sample, 0) for sample in samples)
        """Samples, each with its tokens so far."""
        self.running: list[tuple[int, SampleLengths]] = []
        """Each sample with the number of the decode step that ends it; the first to end stands last."""
        self.steps = 0
        self.context = 0
        """Tokens that the next step attends to."""
        self.ended: list[tuple[float, SampleLengths]] = []
        self.begun = 0.0
        """When the last step began."""
        self.ending_steps: list[float] = []
        """When the step began that ended each sample."""
        self._course: DecodingInstance | None = None

    def copy(self) -> "DecodingInstance":
        other = DecodingInstance([], self.config)
        other.__dict__.update(self.__dict__)
        other.waiting, other.running = self.waiting.copy(), self.running.copy()
        other.ended, other.ending_steps = self.ended.copy(), self.ending_steps.copy()
        return other

    @property
    def course(self) -> "DecodingInstance":
        """Return the instance as it ends if no sample comes or goes."""
        if self._course is None:
            course = self.copy()
            course.advance()
            self._course = course
        return self._course

    @property
    def left(self) -> list[SampleLengths]:
        running = [(sample, sample.response - (end - self.steps)) for end, sample in self.running]
        return [SampleLengths(sample.index, sample.prompt, done) for sample, done in (*running, *self.waiting)]

    def left_at(self, time: float) -> int:
        """Count the samples that steps begun before `time` leave unfinished, if none comes or goes."""
        ending = self.course.ending_steps
        return len(ending) - bisect_left(ending, time)

    def advance(self, until: float = math.inf) -> None:
        """Make every step that begins before `until`."""
        while (self.running or self.waiting) and self.clock < until:
            if self.waiting and len(self.running) < self.config.slots:
                self._prefill()
            else:
                self._decode(until)
            while self.running and self.running[-1][0] <= self.steps:
                _, sample = self.running.pop()
                self.context -= sample.length - 1
                self.ended.append((self.clock, sample))
                self.ending_steps.append(self.begun)

    def _prefill(self) -> None:
        tokens = 0
        admitted: list[tuple[SampleLengths, int]] = []
        while self.waiting and len(self.running) + len(admitted) < self.config.slots:
            sample, done = self.waiting[0]
            more = sample.prompt + max(0, done - 1)
            if admitted and tokens + more > PREFILL_TOKENS:
                break
            tokens += more
            admitted.append(self.waiting.popleft())
        for sample, done in admitted:
            self._admit(sample, max(done, 1))
        self.begun = self.clock
        self.clock += self.config.costs.prefill_seconds(tokens)

    def _admit(self, sample: SampleLengths, done: int) -> None:
        insort(self.running, (self.steps + sample.response - done, sample), key=lambda pair: -pair[0])
        self.context += sample.prompt + done - 1

    def _decode(self, until: float) -> None:
        """Make the steps up to the next end of a sample, or up to `until`."""
        rows, context, count = len(self.running), self.context, self.running[-1][0] - self.steps
        step, share = self.config.step_seconds[rows], self.config.costs.per_context

        def seconds(steps: int) -> float:
            return steps * step + share * (steps * context + rows * steps * (steps - 1) / 2)

        if self.clock + seconds(count - 1) >= until:  # the last of them would begin too late
            low, high = 1, count
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if self.clock + seconds(middle) >= until else (middle + 1, high)
            count = low
        self.begun = self.clock + seconds(count - 1)
        self.clock += seconds(count)
        self.steps += count
        self.context += rows * count

    def drop(self, index: int) -> tuple[SampleLengths, int] | None:
        """Remove a sample and return it with its tokens so far; None if it has ended."""
        self._course = None
        for end, sample in self.running:
            if sample.index == index:
                self.running.remove((end, sample))
                done = sample.response - (end - self.steps)
                self.context -= sample.prompt + done - 1
                return sample, done
        for sample, done in self.waiting:
            if sample.index == index:
                self.waiting.remove((sample, done))
                return sample, done
        return None

    def take(self, sample: SampleLengths, done: int) -> None:
        """Add a sample with its keys and values or, where these are computed again faster, to be prefilled."""
        self._course = None
        tokens, costs = sample.prompt + max(0, done - 1), self.config.costs
        if done and costs.moves_cache(tokens) and len(self.running) < self.config.slots:
            self.clock += costs.move_seconds(tokens)
            self._admit(sample, done)
        else:
            self.waiting.appendleft((sample, done))


def serial(shares: Sequence[Sequence[SampleLengths]], config: SimulatorConfig) -> SimulatedRollout:
    """Simulate generation, and when all samples have ended scoring on all ranks."""
    costs = config.costs
    instances = [DecodingInstance(samples, config) for samples in shares]
    for instance in instances:
        instance.advance()
    generated = max(instance.clock for instance in instances)
    lengths = [sample.length for samples in shares for sample in samples]
    plans = plan_micro_batches(lengths, config.micro_batch_tokens, len(shares) * config.tensor)
    scoring = [sum(costs.score_seconds(sum(lengths[row] for row in batch.rows)) for batch in plan) for plan in plans]

    spans = [
        [Span("generate", 0.0, instances[rank // config.tensor].clock), Span("score", generated, generated + seconds)]
        for rank, seconds in enumerate(scoring)
    ]
    return SimulatedRollout(generated + max(scoring), generated, spans=spans)


def fused(
    shares: Sequence[Sequence[SampleLengths]], config: SimulatorConfig, policy: FusionPolicy, remaining: Remaining
) -> SimulatedRollout:
    """Simulate what `FusedRollout` does under a policy; ranks that decode do not score."""
    return fused_from([DecodingInstance(samples, config) for samples in shares], policy, remaining)


def fused_from(begun: Sequence[DecodingInstance], policy: FusionPolicy, remaining: Remaining) -> SimulatedRollout:
    """Do as `fused`, from instances that stay unchanged: policies share what comes before samples move."""
    config = begun[0].config
    instances = dict(enumerate(begun))
    active = dict(instances)
    ends = endings(active)
    opened = math.inf
    tick, repackings, moved = 1, 0, 0
    while len(active) > 1:
        tick = max(tick, first_tick(active, ends, policy))
        time, later = tick * policy.tick, (tick + 1) * policy.tick
        tick += 1
        left = {name: instance.left_at(time) for name, instance in active.items()}
        total, busy = sum(left.values()), sum(map(bool, left.values()))
        wanted = policy.instances_for(total, busy)
        if wanted == len(active):
            continue
        if wanted == busy:  # nobody has to move
            opened = min(opened, later)
            active = {name: instance for name, instance in active.items() if left[name]}
            continue
        active = {name: instance.copy() for name, instance in active.items()}
        instances |= active
        for instance in active.values():
            instance.advance(time)
        repacking = decide({name: instance.left for name, instance in active.items()}, policy, remaining)
        if repacking is None:  # a sample that ends at the tick, to the rounding
            continue
        opened = min(opened, later)
        repackings += 1
        for move in repacking.moves:
            source, target = active[move.source], instances[move.target]
            source.advance(later)
            given = source.drop(move.index)
            if given is None:
                continue
            moved += 1
            target.advance((tick + 1) * policy.tick)
            target.clock = max(target.clock, later)  # an empty one waits for the sample
            target.take(*given)
        active = {name: instances[name] for name in repacking.keepers}
        ends = endings(active)
    courses = [instance.course for instance in instances.values()]
    generated = max(course.clock for course in courses)
    units = [unit for course in courses for unit in handed_out(course, opened, policy)]
    free = [(courses[rank // config.tensor].clock, rank) for rank in range(len(courses) * config.tensor)]
    spans = [[Span("generate", 0.0, start)] for start, _ in free]
    end = score_units(units, free, config.costs, spans)
    return SimulatedRollout(max(end, generated), generated, repackings, moved, spans)


def endings(active: dict[int, DecodingInstance]) -> list[float]:
    """Return when the steps begin that end the samples of these instances, in order."""
    return sorted(time for instance in active.values() for time in instance.course.ending_steps)


def first_tick(active: dict[int, DecodingInstance], ends: list[float], policy: FusionPolicy) -> int:
    """Return the first tick at which the counts of unfinished samples can lead to a repacking.

    Before tick n an instance makes every step that begins before then, so an end counts from when its step began.
    """
    times = [instance.course.begun for instance in active.values()]  # one is empty
    count = min(policy.threshold, len(ends), policy.rows * (len(active) - 1))
    if count:
        times.append(ends[-count - 1] if count < len(ends) else 0.0)
    return math.floor(min(times) / policy.tick) + 1


def handed_out(instance: DecodingInstance, opened: float, policy: FusionPolicy) -> list[tuple[float, int, int]]:
    """Return the units of an instance that has ended: (when, a number that tells them apart, tokens)."""
    units: list[tuple[float, int, int]] = []
    waiting: list[int] = []  # lengths of ended samples

    def hand_out(time: float, all_of_it: bool) -> None:
        waiting.sort(reverse=True)
        first, tokens = 0, 0
        for index, length in enumerate(waiting):
            if index > first and tokens + length > policy.unit_tokens:
                units.append((time, len(units), tokens))
                first, tokens = index, 0
            tokens += length
        if tokens and (all_of_it or tokens >= policy.unit_tokens / 2):
            units.append((time, len(units), tokens))
            first = len(waiting)
        del waiting[:first]

    tick = policy.tick
    ready = [(max(opened, math.ceil(time / tick) * tick), sample.length) for time, sample in instance.ended]
    for time, together in groupby(ready, key=itemgetter(0)):
        waiting += [length for _, length in together]
        if time < instance.clock:
            hand_out(time, all_of_it=False)
    hand_out(instance.clock, all_of_it=True)
    return units


def score_units(
    units: list[tuple[float, int, int]], free: list[tuple[float, int]], costs: Costs, spans: list[list[Span]]
) -> float:
    """Let the rank that is free first take the next unit; returns the end, adds spans."""
    heapq.heapify(free)
    end = 0.0
    for time, _, tokens in sorted(units):
        now, rank = free[0]
        begin = max(now, time)
        over = begin + costs.score_seconds(tokens)
        heapq.heapreplace(free, (over, rank))
        spans[rank].append(Span("score", begin, over))
        end = max(end, over)
    return end
