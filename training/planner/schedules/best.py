"""The search for the best schedule: shortest first, then smallest in memory.

    result = find_schedule(problem, seed=0, seconds=20)
    result.schedule.makespan, result.is_optimal, result.schedule.peak_memory
    find_schedule(problem, effort=QUICK)  # inside a training run

List schedules are drawn until one is as short as the lower bound, or as short as may be. Then memory goes down: moves
that keep the makespan, from several such schedules, and a beam search under ever tighter caps. It is one search: what
is left of the effort when the bound is met goes into memory. The same seed and effort give the same schedule, unless
`seconds` cut the search short.
"""

import math
import random
import time
from dataclasses import dataclass

from training.planner.schedules.event_loop import Rule
from training.planner.schedules.problem import ROUNDING, SchedulingProblem
from training.planner.schedules.schedule import Schedule, serial_1f1b, timed
from training.planner.schedules.scheduler import UNBOUNDED, Beam, DirectedSchedule, ListScheduler

EFFORT = 6_500_000
"""Operations that the search may start, in all its event loops together: some seconds."""
QUICK = 30_000
"""Effort of some tenths of a second."""
SECONDS = 17.0
"""A limit for those who cannot wait for a slow machine."""
DRAWS = (5, 30, 100)
"""Drawn schedules before the first move."""
REACH = 600
"""Schedules that are tried to meet the bound before memory has its turn."""
PATIENCE = 300
"""Moves without gain before a descent ends."""
FIRST_AIMS = (1, 1, 1.1, 1.3)
"""Makespans that deadlines ask for, against the bound, as long as there is no schedule."""
STEPS = (0, 0, 0.25, 0.5, 1, 2, 5)
"""How much shorter a schedule deadlines ask for, in mean times of an operation."""


@dataclass(frozen=True)
class ScheduleResult:
    """Holds the best schedule, what is proved of it, and what the search took."""

    schedule: Schedule
    lower_bound: float
    """No schedule is shorter."""
    memory_bound: float
    """No schedule as short as this one needs less memory."""
    dispatched: int
    """Operations started on the way."""
    seconds: float
    seconds_to_makespan: float
    """The seconds until the first schedule as short as this one."""

    @property
    def is_optimal(self) -> bool:
        """Whether the makespan is proved to be the shortest."""
        return self.schedule.makespan <= self.lower_bound * (1 + ROUNDING)


def find_schedule(
    problem: SchedulingProblem,
    seed: int = 0,
    effort: int = EFFORT,
    seconds: float = math.inf,
    start: Schedule | None = None,
) -> ScheduleResult:
    """Find a schedule never longer than `start`, one of the same problem, and where as long never larger in memory.

    Without `start` it is 1F1B of one model after the other, where the memory cap has room for that.
    """
    search = _ScheduleSearch(problem, seed, effort, seconds, start)
    search.search()
    return search.result()


class _ScheduleSearch:
    def __init__(self, problem: SchedulingProblem, seed: int, effort: int, seconds: float, start: Schedule | None):
        self.problem, self.rng = problem, random.Random(seed)
        self.scheduler = ListScheduler(problem, self.rng)
        self.began, self.effort, self.seconds = time.perf_counter(), effort, seconds
        self.slack = self.scheduler.directions[0].slack
        self.bound = self.slack.lower_bound()
        self.longest = self.bound * (1 + ROUNDING)
        """What counts as meeting the bound."""
        self.least = self.slack.memory_bound(self.bound)
        """Memory of schedules that meet the bound."""
        self.latest = [direction.latest(self.bound, problem.memory_cap) for direction in self.scheduler.directions]
        if start is None and (serial := serial_1f1b(problem)).peak_memory <= problem.memory_cap:
            start = timed(problem, serial.orders)  # without the barrier
        self.best = self.scheduler.one_at_a_time() if start is None else self.scheduler.read(start)
        self.shortest_at = self._elapsed()
        self.tightness = 0.9

    def result(self) -> ScheduleResult:
        schedule = timed(self.problem, self.scheduler.orders(self.best))
        return ScheduleResult(
            schedule,
            self.bound,
            self.slack.memory_bound(schedule.makespan),
            self.scheduler.dispatched,
            self._elapsed(),
            self.shortest_at,
        )

    def _elapsed(self) -> float:
        return time.perf_counter() - self.began

    def is_over(self) -> bool:
        used_up = self.scheduler.dispatched >= self.effort or self._elapsed() >= self.seconds
        return used_up or self._is_best_possible()

    def take(self, schedule: DirectedSchedule) -> None:
        if schedule.makespan < self.best.makespan:
            self.shortest_at = self._elapsed()
        self.best = min(self.best, schedule, key=lambda candidate: candidate.score)

    def search(self) -> None:
        """Search until effort or time is used up, or nothing better can exist."""
        while not self.is_over():
            here = self._reach()
            if here.makespan <= self.best.makespan:
                self._descend(here)
            if not self.is_over():
                self._squeeze()

    def _run(self, direction: int, rule: Rule) -> DirectedSchedule | None:
        schedule = self.scheduler.run(direction, rule)
        if schedule is not None:
            self.take(schedule)
        return schedule

    def _reach(self) -> DirectedSchedule:
        """Return a schedule as short as the bound, or as moves make it: draws first, then changes of the best one."""
        rng, scheduler, bound = self.rng, self.scheduler, self.bound
        here: DirectedSchedule | None = None
        draws = rng.choice(DRAWS)
        for number in range(REACH):
            if here is None or number < draws:
                direction = rng.randrange(len(scheduler.directions))
                priority, windows = scheduler.draw(direction)
            else:
                direction, priority = scheduler.near(here)
                windows = scheduler.unbounded
            aim = bound * rng.choice(FIRST_AIMS) if here is None else here.makespan - rng.choice(STEPS) * scheduler.unit
            rule = Rule(
                priority,
                windows,
                self.latest[direction],
                room=self.problem.memory_cap,
                limit=math.inf if here is None else here.makespan,
                leeway=max(0.0, aim - bound),
            )
            schedule = self._run(direction, rule)
            if schedule is not None and (here is None or schedule.score <= here.score):
                here = schedule
            if self.is_over() or (here is not None and number >= draws and here.makespan <= self.longest):
                break
        return here or self.best

    def _descend(self, here: DirectedSchedule) -> None:
        """Make moves that keep the makespan and bring down the number of micro-batches alive, until that stops."""
        rng, scheduler = self.rng, self.scheduler
        alive = self._alive(here)
        idle = 0
        while idle < PATIENCE and not self.is_over():
            idle += 1
            direction, priority = scheduler.near(here)
            slack = rng.choice((0, 0, 1, 3, UNBOUNDED, UNBOUNDED, UNBOUNDED))
            windows = [most + slack for most in here.most]
            if rng.random() < 0.7:
                for slot in rng.sample(scheduler.forwards, min(len(scheduler.forwards), rng.choice((1, 1, 2, 4)))):
                    windows[slot] = max(1, here.most[slot] - rng.choice((1, 1, 2)))
            rule = Rule(
                priority,
                windows,
                self.latest[direction],
                room=min(self.problem.memory_cap, here.peak * (1 - rng.choice((0, 0, 0, 1e-6, 0.03, 0.08)))),
                limit=here.makespan,
                leeway=here.makespan - self.bound,
            )
            schedule = self._run(direction, rule)
            if schedule is None:
                continue
            fewer = self._alive(schedule)
            if schedule.score < here.score or fewer <= alive:
                if schedule.score < here.score or fewer < alive:
                    idle = 0
                here, alive = schedule, fewer

    def _alive(self, schedule: DirectedSchedule) -> float:
        """Return what `_descend` brings down: smooth, unlike the peak."""
        activation = self.scheduler.directions[0].loop.activation
        return sum((schedule.most[slot] * activation[slot]) ** 3 for slot in self.scheduler.forwards)

    def _squeeze(self) -> None:
        """Run a beam search for what would be a little better than the best."""
        best, rng = self.best, self.rng
        direction = rng.randrange(len(self.scheduler.directions))
        if best.makespan > self.longest:
            makespan = self.bound + rng.choice((0.0, 0.5, 0.9)) * (best.makespan - self.bound)
            cap = self.problem.memory_cap
        else:
            makespan, cap = best.makespan, self.least + min(self.tightness, 1 - 1e-6) * (best.peak - self.least)
        view = self.scheduler.directions[direction]
        beam = Beam(view.loop, view.latest(makespan, cap), makespan, cap, rng)
        state = beam.search(self.is_over)
        if state is None:
            self.tightness = 1 - (1 - self.tightness) / 2
            return
        self.tightness *= 0.9
        schedule = self.scheduler.directed(direction, state)
        self.take(schedule)
        if schedule.makespan <= self.best.makespan:
            self._descend(schedule)

    def _is_best_possible(self) -> bool:
        best = self.best
        return best.makespan <= self.longest and best.peak <= self.least * (1 + ROUNDING)
