"""Randomised list scheduling with local search: event loops under drawn rules, then under rules near the best ones.

A schedule is looked for from its start and, where that is the same kind of problem, from its end: with time running
backwards a forward is a backward of the mirrored problem. A schedule of one direction gives the other its priorities
(forward-backward improvement of project scheduling), which repairs what a loop that never waits does badly.

Sources: RLHFuse (arXiv 2409.13221, section 5.3) for the problem; Li and Willis, "An iterative scheduling technique for
resource-constrained project scheduling" (1992), for the two directions.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from training.planner.schedules.event_loop import PER_DEVICE, PER_MODEL, EventLoop, Rule, State
from training.planner.schedules.problem import BACKWARD, FORWARD, ROUNDING, SchedulingProblem, Slack
from training.planner.schedules.schedule import Order, Schedule

UNBOUNDED = 2**31


@dataclass(frozen=True)
class DirectedSchedule:
    """Holds a whole schedule in one direction."""

    direction: int
    """0 is from the start, 1 from the end."""
    starts: list[list[float]]
    """Times by slot, then by micro-batch."""
    makespan: float
    peak: float
    """Memory."""
    most: list[int]
    """The most micro-batches alive at one time, by forward slot."""

    @property
    def score(self) -> tuple[float, float]:
        return self.makespan, self.peak


class Direction:
    """Shows the problem as seen from one end."""

    def __init__(self, problem: SchedulingProblem):
        self.problem = problem
        self.loop = EventLoop(problem)
        self.slack = Slack.of(problem)

    def latest(self, makespan: float, cap: float) -> list[list[float]]:
        """Return the latest starts, by slot, in schedules of this makespan within a memory cap."""
        slack = self.slack if cap >= self.problem.memory_cap else Slack.of(self.problem, cap)
        return self.loop.by_slot(slack.latest(makespan))


class ListScheduler:
    """Draws rules, moves near schedules and keeps the record of one problem."""

    def __init__(self, problem: SchedulingProblem, rng: random.Random):
        self.problem, self.rng = problem, rng
        self.directions = [Direction(problem)]
        if not any(pipeline.is_split for pipeline in problem.models):  # else the mirrored chains have another shape
            self.directions.append(Direction(mirrored(problem)))
        self.unit = self.directions[0].loop.unit
        """Scale of random changes of time."""
        self.count = PER_DEVICE * problem.devices
        self.forwards = range(0, self.count, PER_MODEL)
        self.unbounded = [UNBOUNDED] * self.count

    @property
    def dispatched(self) -> int:
        return sum(direction.loop.dispatched for direction in self.directions)

    def draw(self, direction: int) -> tuple[list[list[float]], list[int]]:
        """Draw priorities and windows: one value a slot, windows like those of 1F1B, wider or narrower."""
        rng, loop, problem = self.rng, self.directions[direction].loop, self.problem
        wider = [rng.choice((-2, -1, 0, 0, 0, 1, 2, 3, 4, 6, 8, UNBOUNDED)) for _ in range(2)]
        backwards_first = 1.0 if rng.random() < 0.8 else 0.0
        favoured, spread = rng.choice((-1.5, -0.5, 0, 0.5, 1.5)), rng.choice((0.1, 0.3, 1))
        priority, windows = [], self.unbounded[:]
        for slot in range(self.count):
            device, (model, kind) = slot // PER_DEVICE, divmod(slot % PER_DEVICE, PER_MODEL)
            value = rng.random() * spread + favoured * model + backwards_first * (kind == FORWARD)
            priority.append([value] * loop.total[slot])
            if kind == FORWARD:
                own = problem.models[model].stages - problem.stage(model, device)
                jitter = rng.choice((-1, 1)) if rng.random() < 0.1 else 0
                windows[slot] = max(1, own + wider[model] + jitter)
        return priority, windows

    def near(self, schedule: DirectedSchedule) -> tuple[int, list[list[float]]]:
        """Return a direction, and priorities that repeat the schedule with noise."""
        rng = self.rng
        direction = schedule.direction if rng.random() < 0.4 or len(self.directions) == 1 else 1 - schedule.direction
        starts = schedule.starts if direction == schedule.direction else self.turned(schedule)
        spread, share = rng.choice((0, 0.3, 1, 2, 4)) * self.unit, rng.choice((0.03, 0.1, 0.3, 1))
        if spread:
            gauss, draw = rng.gauss, rng.random
            starts = [[x + gauss(0, spread) if draw() < share else x for x in row] for row in starts]
        return direction, starts

    def turned(self, schedule: DirectedSchedule) -> list[list[float]]:
        """Return the starts as seen from the other end."""
        time = self.directions[schedule.direction].loop.time
        rows: list[list[float]] = [[] for _ in range(self.count)]
        for slot in self.forwards:
            for here, there in ((slot, slot + BACKWARD), (slot + BACKWARD, slot)):
                rows[there] = [schedule.makespan - start - time[here] for start in reversed(schedule.starts[here])]
        return rows

    def one_at_a_time(self) -> DirectedSchedule:
        """Let every stage hold one micro-batch of each model: slow, but possible whatever the cap."""
        total = self.directions[0].loop.total
        priority = [[float(slot)] * number for slot, number in enumerate(total)]
        latest = [[math.inf] * (number + 1) for number in total]
        schedule = self.run(0, Rule(priority, [1] * self.count, latest, room=self.problem.memory_cap))
        assert schedule is not None
        return schedule

    def run(self, direction: int, rule: Rule) -> DirectedSchedule | None:
        loop = self.directions[direction].loop
        state = loop.run(rule)
        return None if state is None else self.directed(direction, state)

    def directed(self, direction: int, state: State) -> DirectedSchedule:
        """Return the schedule of a state that is done."""
        loop = self.directions[direction].loop
        starts: list[list[float]] = [[] for _ in range(self.count)]
        alive, most, peak = [0] * self.count, [0] * self.count, 0.0
        for start, slot in state.starts():
            starts[slot].append(start)
            if slot % PER_MODEL == FORWARD:
                alive[slot] += 1
                most[slot] = max(most[slot], alive[slot])
                other = loop.rival[slot]
                peak = max(peak, alive[slot] * loop.activation[slot] + alive[other] * loop.activation[other])
            elif loop.frees[slot] >= 0:
                alive[loop.frees[slot]] -= 1  # when it ends; nothing else starts on the device before
        return DirectedSchedule(direction, starts, state.now, peak, most)

    def orders(self, schedule: DirectedSchedule) -> list[Order]:
        """Return what each device does, from the start."""
        starts = schedule.starts if schedule.direction == 0 else self.turned(schedule)
        rows = []
        for slots in self.directions[0].loop.slots:
            row = sorted((start, slot % PER_DEVICE) for slot in slots for start in starts[slot])
            rows.append([divmod(code, PER_MODEL) for _, code in row])
        return rows

    def read(self, schedule: Schedule) -> DirectedSchedule:
        """Convert a schedule from elsewhere, to start from it."""
        starts: list[list[float]] = [[] for _ in range(self.count)]
        for operation in sorted(schedule.operations, key=lambda operation: operation.micro_batch):
            slot = PER_DEVICE * operation.device + PER_MODEL * operation.model + operation.kind
            starts[slot].append(operation.start)
        state = self.directions[0].loop.fresh()
        log = sorted((start, slot) for slot, row in enumerate(starts) for start in row)
        state.now, state.log = schedule.makespan, (None, log)
        return self.directed(0, state)


def mirrored(problem: SchedulingProblem) -> SchedulingProblem:
    a, b = (replace(pipeline, forward=pipeline.backward, backward=pipeline.forward) for pipeline in problem.models)
    return replace(problem, a=a, b=b)


WIDTH = 100
"""Partial schedules that survive a stretch."""
BRANCHES, RULES = 6, 24
"""Rules that each of them is carried on under, drawn from so many."""
STRETCHES = 60
"""Stretches of the makespan."""
DEATHS = 12
"""The search gives up when all partial schedules have died so many times."""
CROWD = 30
"""Most survivors that have done the same on the device with least time to spare."""
PATIENCE = 0.15
"""What time to spare counts, against work done."""
URGENT = (0.0, 0.3, 0.7)
"""Shares of devices that take first what is due first."""
HELD = (0.0, 0.0, 0.1, 0.3)
"""Shares of forwards that are held back."""
COPY_EFFORT = 1.5
"""What a copy and its rank cost a device, in operations started."""


class Beam:
    """Searches schedules of one makespan within one memory cap."""

    def __init__(self, loop: EventLoop, latest: list[list[float]], makespan: float, cap: float, rng: random.Random):
        """`latest` starts are those of schedules of this makespan within this cap."""
        self.loop, self.rng = loop, rng
        self.makespan, self.cap = makespan, cap
        self.rows = [[float(rank)] * max(loop.total) for rank in range(PER_DEVICE)]
        self.rule = Rule(self.rows, [], latest, room=cap, limit=makespan, strict=True)
        self.room = cap * (1 + ROUNDING)
        problem = loop.problem
        spare = [makespan - self._shortest_head(device) - left for device, left in enumerate(loop.left)]
        self.narrow = PER_DEVICE * spare.index(min(spare))
        self.chains: list[list[int]] = []
        """Forward slots of each copy of a model, by stage."""
        for model, pipeline in enumerate(problem.models):
            for first in range(0, problem.devices, pipeline.stages):
                devices = range(first, first + pipeline.stages)
                chain = [PER_DEVICE * device + PER_MODEL * model for device in devices]
                self.chains.append(chain if model == 0 else chain[::-1])
        self.links: list[tuple[int, int]] = []
        """Slot and the slot that its micro-batches come from, in the order of the chains; -1 is none."""
        for chain in self.chains:
            path = [*chain, *(slot + BACKWARD for slot in reversed(chain))]
            self.links += zip(path, [-1, *path], strict=False)

    def _shortest_head(self, device: int) -> float:
        return min(self.loop.problem.time_before(model, device, FORWARD) for model in range(2))

    def search(self, is_over: Callable[[], bool]) -> State | None:
        """Return a state that is done, or None. `is_over` is asked now and then whether to give up."""
        generations = [[self.loop.fresh()]]
        furthest, back, deaths = 0, 2.0, 0
        while not is_over():
            until = self.makespan * len(generations) / STRETCHES
            children = self._children(generations[-1], until)
            for child in children:
                if self.loop.is_done(child):
                    return child
            if children:
                generations.append(children)
                continue
            deaths += 1
            if deaths > DEATHS:
                break
            reached = len(generations)
            back = 2.0 if reached > furthest + 1 else min(1.5 * back, reached)
            furthest = max(furthest, reached)
            del generations[max(1, reached - int(back)) :]
        return None

    def _children(self, parents: list[State], until: float) -> list[State]:
        rules = [self._draw() for _ in range(RULES)]
        best: dict[tuple[int, ...], tuple[float, State]] = {}
        for parent in parents:
            for rule in self.rng.sample(rules, BRANCHES):
                child = parent.copy()
                self.loop.dispatched += int(COPY_EFFORT * len(parent.running))
                if not self.loop.advance(child, rule, until):
                    continue
                promise = self._promise(child)
                if promise is None:
                    continue
                promise += 0.1 * self.rng.random()
                key = tuple(child.started)
                if key not in best or best[key][0] < promise:
                    best[key] = promise, child
        ranked = sorted(best.values(), key=lambda pair: -pair[0])
        crowd: dict[tuple[int, ...], int] = {}
        survivors = []
        for _, child in ranked:
            key = tuple(child.started[self.narrow : self.narrow + PER_DEVICE])
            crowd[key] = crowd.get(key, 0) + 1
            if crowd[key] <= CROWD:
                survivors.append(child)
                if len(survivors) == WIDTH:
                    break
        return survivors

    def _draw(self) -> Rule:
        """Draw a preference for each device, and windows near those of 1F1B; some forwards are held back."""
        rng, loop = self.rng, self.loop
        backwards_first = 0.7 if rng.random() < 0.8 else 0.0
        priority: list[Sequence[float]] = [self.rows[0]] * len(loop.time)
        windows = [0] * len(loop.time)
        urgent = rng.choice(URGENT)
        for slots in loop.slots:
            if rng.random() < urgent:
                for slot in slots:
                    priority[slot] = self.rule.latest[slot]
                continue
            ranked = sorted(slots, key=lambda slot: rng.random() + backwards_first * (slot % PER_MODEL == FORWARD))
            for rank, slot in enumerate(ranked):
                priority[slot] = self.rows[rank]
        held = rng.choice(HELD)
        for chain in self.chains:
            wider = rng.choice((-2, -1, 0, 0, 0, 1, 2, len(self.rows[0])))
            for stage, slot in enumerate(chain):
                jitter = rng.choice((-1, 0, 1)) if rng.random() < 0.2 else 0
                windows[slot] = 0 if rng.random() < held else max(1, len(chain) - stage + wider + jitter)
        return replace(self.rule, priority=priority, windows=windows)

    def _promise(self, state: State) -> float | None:
        """Rank a partial schedule; None if it cannot be completed in time.

        The next operation of every slot starts no earlier than its device is free, and than the chain of operations
        that lead to it from where the micro-batches are now takes.
        """
        loop, latest, queue, started, running = self.loop, self.rule.latest, state.queue, state.started, state.running
        time, total, alive, activation = loop.time, loop.total, state.alive, loop.activation
        free = [state.now] * len(running)
        for end, device in state.events:
            free[device] = end
        earliest = [0.0] * len(time)
        spare = math.inf
        for slot, before in self.links:
            number, start = started[slot], free[slot // PER_DEVICE]
            if not queue[slot] and number < total[slot] and before >= 0:
                source = before // PER_DEVICE
                if running[source] == before and started[before] == number + 1:
                    start = max(start, free[source])
                else:
                    start = max(start, earliest[before] + (number + 1 - started[before]) * time[before])
            earliest[slot] = start
            if latest[slot][number] - start < spare:
                spare = latest[slot][number] - start
        for slot, other in zip(loop.forwards, loop.forwards_of_rivals, strict=True):
            if (alive[slot] + 1) * activation[slot] + alive[other] * activation[other] <= self.room:
                continue
            frees = [
                free[forward // PER_DEVICE]
                if running[forward // PER_DEVICE] == forward + BACKWARD
                else earliest[forward + BACKWARD] + time[forward + BACKWARD]
                for forward in (slot, other)
                if alive[forward]
            ]
            if not frees:  # not even one fits
                return None
            spare = min(spare, latest[slot][started[slot]] - min(frees))
        if spare < -loop.rounding:
            return None
        for device, left in enumerate(state.left):
            if free[device] + left > self.makespan + loop.rounding and left > loop.over[device]:
                return None
        spare = min(spare, self.makespan)
        return (PATIENCE * spare - sum(state.left)) / loop.unit
