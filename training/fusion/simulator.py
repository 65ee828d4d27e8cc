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
from training.fusion.board import FusionPolicy, Remaining, Span, Unfinished, decide
from training.fusion.costs import Costs


@dataclass(frozen=True)
class Job:
    """A sample whose length is known."""

    index: int
    prompt: int
    response: int

    @property
    def length(self) -> int:
        return self.prompt + self.response


@dataclass(frozen=True)
class Machine:
    """What a rollout runs on."""

    costs: Costs
    slots: int
    """Of an instance."""
    tensor: int = 1
    """Ranks of an instance."""
    micro_batch_tokens: int = 4096
    """Of scoring without fusion."""

    @cached_property
    def step_seconds(self) -> list[float]:
        """Of a decode step, without its context, by its rows."""
        return [self.costs.step_seconds(rows) for rows in range(self.slots + 1)]


@dataclass
class SimulatedRollout:
    seconds: float
    """From the start of generation to the end of scoring."""
    generated: float
    """When the last sample ended."""
    busy: float
    """Seconds of work, summed over ranks."""
    ranks: int
    repackings: int = 0
    moved: int = 0
    spans: list[list[Span]] = field(default_factory=list)
    """By rank."""

    @property
    def idle(self) -> float:
        return self.ranks * self.seconds - self.busy


class DecodingInstance:
    """One instance that decodes: a clock, rows and a queue."""

    def __init__(self, jobs: Sequence[Job], machine: Machine):
        self.machine = machine
        self.clock = 0.0
        self.waiting = deque((job, 0) for job in jobs)
        """Each with its tokens so far."""
        self.running: list[tuple[int, Job]] = []
        """Each with the number of the decode step that ends it; the first to end stands last."""
        self.steps = 0
        self.context = 0
        """Tokens that the next step attends to."""
        self.ended: list[tuple[float, Job]] = []
        self.begun = 0.0
        """When the last step began."""
        self.ending_steps: list[float] = []
        """When the step began that ended each sample."""
        self._course: DecodingInstance | None = None

    def copy(self) -> "DecodingInstance":
        other = DecodingInstance([], self.machine)
        other.__dict__.update(self.__dict__)
        other.waiting, other.running = self.waiting.copy(), self.running.copy()
        other.ended, other.ending_steps = self.ended.copy(), self.ending_steps.copy()
        return other

    @property
    def course(self) -> "DecodingInstance":
        """The instance as it ends if no sample comes or goes."""
        if self._course is None:
            course = self.copy()
            course.advance()
            self._course = course
        return self._course

    @property
    def left(self) -> list[Unfinished]:
        running = [(job, job.response - (end - self.steps)) for end, job in self.running]
        return [Unfinished(job.index, job.prompt, done) for job, done in (*running, *self.waiting)]

    def left_at(self, time: float) -> int:
        """Samples that steps begun before `time` leave unfinished, if none comes or goes."""
        ending = self.course.ending_steps
        return len(ending) - bisect_left(ending, time)

    def advance(self, until: float = math.inf) -> None:
        """Make every step that begins before `until`."""
        while (self.running or self.waiting) and self.clock < until:
            if self.waiting and len(self.running) < self.machine.slots:
                self._prefill()
            else:
                self._decode(until)
            while self.running and self.running[-1][0] <= self.steps:
                _, job = self.running.pop()
                self.context -= job.length - 1
                self.ended.append((self.clock, job))
                self.ending_steps.append(self.begun)

    def _prefill(self) -> None:
        tokens = 0
        admitted: list[tuple[Job, int]] = []
        while self.waiting and len(self.running) + len(admitted) < self.machine.slots:
            job, done = self.waiting[0]
            more = job.prompt + max(0, done - 1)
            if admitted and tokens + more > PREFILL_TOKENS:
                break
            tokens += more
            admitted.append(self.waiting.popleft())
        for job, done in admitted:
            self._admit(job, max(done, 1))
        self.begun = self.clock
        self.clock += self.machine.costs.prefill_seconds(tokens)

    def _admit(self, job: Job, done: int) -> None:
        insort(self.running, (self.steps + job.response - done, job), key=lambda pair: -pair[0])
        self.context += job.prompt + done - 1

    def _decode(self, until: float) -> None:
        """Steps up to the next end of a sample, or up to `until`."""
        rows, context, count = len(self.running), self.context, self.running[-1][0] - self.steps
        step, share = self.machine.step_seconds[rows], self.machine.costs.per_context

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

    def drop(self, index: int) -> tuple[Job, int] | None:
        """A sample that leaves, with its tokens so far; None if it has ended."""
        self._course = None
        for end, job in self.running:
            if job.index == index:
                self.running.remove((end, job))
                done = job.response - (end - self.steps)
                self.context -= job.prompt + done - 1
                return job, done
        for job, done in self.waiting:
            if job.index == index:
                self.waiting.remove((job, done))
                return job, done
        return None

    def take(self, job: Job, done: int) -> None:
        """A sample that comes, with its keys and values or, where these are made anew faster, to be prefilled."""
        self._course = None
        tokens, costs = job.prompt + max(0, done - 1), self.machine.costs
        if done and costs.moves_cache(tokens) and len(self.running) < self.machine.slots:
            self.clock += costs.move_seconds(tokens)
            self._admit(job, done)
        else:
            self.waiting.appendleft((job, done))


def serial(shares: Sequence[Sequence[Job]], machine: Machine) -> SimulatedRollout:
    """Generation, and when all have ended scoring on all ranks."""
    costs, ranks = machine.costs, len(shares) * machine.tensor
    instances = [DecodingInstance(jobs, machine) for jobs in shares]
    for instance in instances:
        instance.advance()
    generated = max(instance.clock for instance in instances)
    lengths = [job.length for jobs in shares for job in jobs]
    plans = plan_micro_batches(lengths, machine.micro_batch_tokens, ranks)
    scoring = [sum(costs.score_seconds(sum(lengths[row] for row in batch.rows)) for batch in plan) for plan in plans]
    busy = machine.tensor * sum(instance.clock for instance in instances) + sum(scoring)
    spans = [
        [Span("generate", 0.0, instances[rank // machine.tensor].clock), Span("score", generated, generated + seconds)]
        for rank, seconds in enumerate(scoring)
    ]
    return SimulatedRollout(generated + max(scoring), generated, busy, ranks, spans=spans)


def fused(
    shares: Sequence[Sequence[Job]], machine: Machine, policy: FusionPolicy, remaining: Remaining
) -> SimulatedRollout:
    """What `FusedRollout` does under a policy; ranks that decode do not score."""
    return fused_from([DecodingInstance(jobs, machine) for jobs in shares], policy, remaining)


def fused_from(begun: Sequence[DecodingInstance], policy: FusionPolicy, remaining: Remaining) -> SimulatedRollout:
    """`fused`, from instances that are left as they are: policies share what comes before samples move."""
    machine = begun[0].machine
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
    free = [(courses[rank // machine.tensor].clock, rank) for rank in range(len(courses) * machine.tensor)]
    spans = [[Span("generate", 0.0, start)] for start, _ in free]
    busy_seconds = sum(start for start, _ in free)
    end = score_units(units, free, machine.costs, spans)
    busy_seconds += sum(span.end - span.start for rank in spans for span in rank[1:])
    return SimulatedRollout(max(end, generated), generated, busy_seconds, len(spans), repackings, moved, spans)


def endings(active: dict[int, DecodingInstance]) -> list[float]:
    """When the steps begin that end the samples of these instances, in order."""
    return sorted(time for instance in active.values() for time in instance.course.ending_steps)


def first_tick(active: dict[int, DecodingInstance], ends: list[float], policy: FusionPolicy) -> int:
    """The first tick at which the counts of unfinished samples can lead to a repacking.

    Before tick n an instance makes every step that begins before then, so an end counts from when its step began.
    """
    times = [instance.course.begun for instance in active.values()]  # one is empty
    count = min(policy.threshold, len(ends), policy.rows * (len(active) - 1))
    if count:
        times.append(ends[-count - 1] if count < len(ends) else 0.0)
    return math.floor(min(times) / policy.tick) + 1


def handed_out(instance: DecodingInstance, opened: float, policy: FusionPolicy) -> list[tuple[float, int, int]]:
    """Units of an instance that has ended: (when, a number that keeps them apart, tokens)."""
    units: list[tuple[float, int, int]] = []
    kept: list[int] = []  # lengths

    def hand_out(time: float, all_of_it: bool) -> None:
        kept.sort(reverse=True)
        first, tokens = 0, 0
        for index, length in enumerate(kept):
            if index > first and tokens + length > policy.unit_tokens:
                units.append((time, len(units), tokens))
                first, tokens = index, 0
            tokens += length
        if tokens and (all_of_it or tokens >= policy.unit_tokens / 2):
            units.append((time, len(units), tokens))
            first = len(kept)
        del kept[:first]

    tick = policy.tick
    ready = [(max(opened, math.ceil(time / tick) * tick), job.length) for time, job in instance.ended]
    for time, together in groupby(ready, key=itemgetter(0)):
        kept += [length for _, length in together]
        if time < instance.clock:
            hand_out(time, all_of_it=False)
    hand_out(instance.clock, all_of_it=True)
    return units


def score_units(
    units: list[tuple[float, int, int]], free: list[tuple[float, int]], costs: Costs, spans: list[list[Span]]
) -> float:
    """The rank that is free first takes the next unit; returns the end, adds spans."""
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
