"""How long generation and scoring will take, with fusion and without: an event simulation of `rollout`.

Fed with lengths and costs; decode steps between two ends of samples are summed in closed form, so a rollout costs some
hundred operations whatever its lengths.
"""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from inference.generation.engine import PREFILL_TOKENS
from training.data.batching import fill_micro_batches, plan_micro_batches
from training.fusion.costs import Costs
from training.fusion.repacking import Policy, Remaining, Unfinished, decide
from training.fusion.timeline import Span


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


@dataclass
class Outcome:
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
        """Rank-seconds without work."""
        return self.ranks * self.seconds - self.busy


@dataclass
class Running:
    job: Job
    done: int


class Instance:
    """One instance that decodes: a clock, rows and a queue."""

    def __init__(self, jobs: Sequence[Job], machine: Machine):
        self.machine = machine
        self.clock = 0.0
        self.waiting = deque(Running(job, 0) for job in jobs)
        self.running: list[Running] = []
        self.ended: list[tuple[float, Job]] = []
        self.begun = 0.0
        """When the last step began."""
        self.ending_steps: list[float] = []
        """When the step began that ended each sample."""

    def copy(self) -> "Instance":
        other = Instance([], self.machine)
        other.clock = self.clock
        other.waiting = deque(replace(r) for r in self.waiting)
        other.running = [replace(r) for r in self.running]
        other.ended, other.begun, other.ending_steps = list(self.ended), self.begun, list(self.ending_steps)
        return other

    @property
    def left(self) -> list[Unfinished]:
        return [Unfinished(r.job.index, r.job.prompt, r.done) for r in (*self.running, *self.waiting)]

    def advance(self, until: float = math.inf) -> None:
        """Make every step that begins before `until`."""
        while (self.running or self.waiting) and self.clock < until:
            if self.waiting and len(self.running) < self.machine.slots:
                self._prefill()
            else:
                self._decode(until)
            for r in [r for r in self.running if r.done >= r.job.response]:
                self.running.remove(r)
                self.ended.append((self.clock, r.job))
                self.ending_steps.append(self.begun)

    def _prefill(self) -> None:
        tokens = 0
        admitted: list[Running] = []
        while self.waiting and len(self.running) + len(admitted) < self.machine.slots:
            r = self.waiting[0]
            more = r.job.prompt + max(0, r.done - 1)
            if admitted and tokens + more > PREFILL_TOKENS:
                break
            tokens += more
            admitted.append(self.waiting.popleft())
        for r in admitted:
            r.done = max(r.done, 1)
        self.running += admitted
        self.begun = self.clock
        self.clock += self.machine.costs.prefill_seconds(tokens)

    def _decode(self, until: float) -> None:
        """Steps up to the next end of a sample, or up to `until`."""
        rows = len(self.running)
        context = sum(r.job.prompt + r.done - 1 for r in self.running)
        step, share = self.machine.costs.step_seconds(rows), self.machine.costs.per_context
        count = min(r.job.response - r.done for r in self.running)

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
        for r in self.running:
            r.done += count

    def drop(self, index: int) -> Running | None:
        """None if the sample has ended."""
        for place in (self.running, self.waiting):
            for r in place:
                if r.job.index == index:
                    place.remove(r)
                    return r
        return None


def serial(shares: Sequence[Sequence[Job]], machine: Machine) -> Outcome:
    """Generation, and when all have ended scoring on all ranks."""
    costs, ranks = machine.costs, len(shares) * machine.tensor
    instances = [Instance(jobs, machine) for jobs in shares]
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
    return Outcome(generated + max(scoring), generated, busy, ranks, spans=spans)


def fused(shares: Sequence[Sequence[Job]], machine: Machine, policy: Policy, remaining: Remaining) -> Outcome:
    """What `FusedRollout` does under a policy; ranks that decode do not score."""
    costs = machine.costs
    instances = dict(enumerate(Instance(jobs, machine) for jobs in shares))
    active = dict(instances)
    opened = math.inf
    tick, repackings, moved = 1, 0, 0
    while len(active) > 1:
        tick = max(tick, first_tick(active, policy))
        for instance in active.values():
            instance.advance(tick * policy.tick)
        left = {name: instance.left for name, instance in active.items()}
        repacking = decide(left, policy, remaining)
        tick += 1
        if repacking is None:
            if not any(left.values()):
                break
            continue
        opened = min(opened, tick * policy.tick)
        repackings += bool(repacking.moves)
        for instance in active.values():
            instance.advance(tick * policy.tick)
        for move in repacking.moves:
            source, target = active[move.source], instances[move.target]
            r = source.drop(move.index)
            if r is None:
                continue
            moved += 1
            target.advance((tick + 1) * policy.tick)
            target.clock = max(target.clock, tick * policy.tick)  # an empty one waits for the sample
            tokens = r.job.prompt + max(0, r.done - 1)
            if r.done and costs.moves_cache(tokens) and len(target.running) < machine.slots:
                target.clock += costs.move_seconds(tokens)
                target.running.append(r)
            else:
                target.waiting.appendleft(r)
        active = {name: instances[name] for name in repacking.keepers}
    for instance in instances.values():
        instance.advance()
    generated = max(instance.clock for instance in instances.values())
    units = [unit for instance in instances.values() for unit in handed_out(instance, opened, policy)]
    free = [(instances[rank // machine.tensor].clock, rank) for rank in range(len(shares) * machine.tensor)]
    spans = [[Span("generate", 0.0, start)] for start, _ in free]
    busy = sum(start for start, _ in free)
    end = score_units(units, free, costs, spans)
    busy += sum(span.end - span.start for rank in spans for span in rank[1:])
    return Outcome(max(end, generated), generated, busy, len(spans), repackings, moved, spans)


def first_tick(active: dict[int, Instance], policy: Policy) -> int:
    """The first tick at which the counts of unfinished samples can lead to a repacking.

    Before tick n an instance makes every step that begins before then, so an end counts from when its step began.
    """
    courses = {name: instance.copy() for name, instance in active.items()}
    for course in courses.values():
        course.advance()
    began = sorted(t for name, course in courses.items() for t in course.ending_steps[len(active[name].ended) :])
    total = len(began)
    times = [course.begun if active[name].left else 0.0 for name, course in courses.items()]
    for count in range(min(policy.threshold, total), 0, -1):
        if math.ceil(count / policy.rows) < len(active):
            times.append(began[total - count - 1] if count < total else 0.0)
            break
    return math.floor(min(times) / policy.tick) + 1


def handed_out(instance: Instance, opened: float, policy: Policy) -> list[tuple[float, int, int]]:
    """Units of an instance: (when, a number that keeps them apart, tokens)."""
    units: list[tuple[float, int, int]] = []
    kept: list[Job] = []

    def hand_out(time: float, all_of_it: bool) -> None:
        kept.sort(key=lambda job: -job.length)
        lengths = [job.length for job in kept]
        batches = fill_micro_batches(list(range(len(kept))), lengths, policy.unit_tokens)
        sums = [sum(lengths[row] for row in batch.rows) for batch in batches]
        rest = len(batches[-1].rows) if not all_of_it and sums and sums[-1] < policy.unit_tokens / 2 else 0
        for tokens in sums[: -1 if rest else None]:
            units.append((time, len(units), tokens))
        kept[:] = kept[len(kept) - rest :]

    ready = [(max(opened, math.ceil(time / policy.tick) * policy.tick), job) for time, job in instance.ended]
    for time in sorted({time for time, _ in ready if time < instance.clock}):
        kept += [job for at, job in ready if at == time]
        hand_out(time, all_of_it=False)
    kept += [job for at, job in ready if at >= instance.clock]
    hand_out(instance.clock, all_of_it=True)
    return units


def score_units(
    units: list[tuple[float, int, int]], free: list[tuple[float, int]], costs: Costs, spans: list[list[Span]]
) -> float:
    """The rank that is free first takes the longest unit that has been handed out; returns the end, adds spans."""
    coming = deque(sorted(units))
    ready: list[tuple[int, int]] = []  # (- tokens, a number): a heap
    heapq.heapify(free)
    end = 0.0
    for number in range(len(units)):
        now, rank = heapq.heappop(free)
        if not ready:
            now = max(now, coming[0][0])
        while coming and coming[0][0] <= now:
            heapq.heappush(ready, (-coming.popleft()[2], number))
        tokens = -heapq.heappop(ready)[0]
        spans[rank].append(Span("score", now, now + costs.score_seconds(tokens)))
        end = max(end, spans[rank][-1].end)
        heapq.heappush(free, (spans[rank][-1].end, rank))
    return end
