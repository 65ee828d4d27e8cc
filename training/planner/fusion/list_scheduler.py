"""Randomised list scheduling with local search: event loops under drawn rules, then under rules near the best found.

A schedule is looked for from its start and, where that is the same kind of problem, from its end: with time running
backwards a forward is a backward of the mirrored instance. What one direction finds gives the other its priorities
(forward-backward improvement of project scheduling), which repairs what a loop that never waits does badly.

Sources: RLHFuse (arXiv 2409.13221, section 5.3) for the problem; Li and Willis, "An iterative scheduling technique for
resource-constrained project scheduling" (1992), for the two directions.
"""

import math
import random
from dataclasses import dataclass, replace

from training.planner.fusion.event_loop import PER_DEVICE, PER_MODEL, EventLoop, Rule, State
from training.planner.fusion.instance import BACKWARD, FORWARD, Instance, Slack
from training.planner.fusion.schedule import Order, Schedule

UNBOUNDED = 2**31


@dataclass(frozen=True)
class Found:
    """A whole schedule in one direction."""

    direction: int
    """0 is from the start, 1 from the end."""
    starts: list[list[float]]
    """By slot, then by micro-batch."""
    makespan: float
    peak: float
    """Memory."""
    most: list[int]
    """The most micro-batches alive at one time, by forward slot."""

    @property
    def score(self) -> tuple[float, float]:
        return self.makespan, self.peak


class Direction:
    """The instance as seen from one end."""

    def __init__(self, instance: Instance):
        self.instance = instance
        self.loop = EventLoop(instance)
        self.slack = Slack.of(instance)

    def latest(self, makespan: float, cap: float) -> list[list[float]]:
        """Latest starts by slot in schedules of this makespan within a memory cap."""
        slack = self.slack if cap >= self.instance.memory_cap else Slack.of(self.instance, cap)
        return self.loop.by_slot(slack.latest(makespan))


class ListScheduler:
    """Draws, moves and the record of one instance."""

    def __init__(self, instance: Instance, rng: random.Random):
        self.instance, self.rng = instance, rng
        self.directions = [Direction(instance)]
        if not any(each.is_split for each in instance.models):  # else the mirrored chains have another shape
            self.directions.append(Direction(mirrored(instance)))
        self.unit = self.directions[0].loop.unit
        """Scale of random changes of time."""
        self.count = PER_DEVICE * instance.devices
        self.forwards = range(0, self.count, PER_MODEL)
        self.unbounded = [UNBOUNDED] * self.count

    @property
    def dispatched(self) -> int:
        """Effort so far."""
        return sum(direction.loop.dispatched for direction in self.directions)

    def draw(self, direction: int) -> tuple[list[list[float]], list[int]]:
        """Priorities and windows: one value a slot, windows like those of 1F1B, wider or narrower."""
        rng, loop, instance = self.rng, self.directions[direction].loop, self.instance
        wider = [rng.choice((-2, -1, 0, 0, 0, 1, 2, 3, 4, 6, 8, UNBOUNDED)) for _ in range(2)]
        backwards_first = 1.0 if rng.random() < 0.8 else 0.0
        favoured, spread = rng.choice((-1.5, -0.5, 0, 0.5, 1.5)), rng.choice((0.1, 0.3, 1))
        priority, windows = [], self.unbounded[:]
        for slot in range(self.count):
            device, (model, kind) = slot // PER_DEVICE, divmod(slot % PER_DEVICE, PER_MODEL)
            value = rng.random() * spread + favoured * model + backwards_first * (kind == FORWARD)
            priority.append([value] * loop.total[slot])
            if kind == FORWARD:
                own = instance.models[model].stages - instance.stage(model, device)
                jitter = rng.choice((-1, 1)) if rng.random() < 0.1 else 0
                windows[slot] = max(1, own + wider[model] + jitter)
        return priority, windows

    def near(self, found: Found) -> tuple[int, list[list[float]]]:
        """A direction, and priorities that repeat the schedule with noise."""
        rng = self.rng
        direction = found.direction if rng.random() < 0.4 or len(self.directions) == 1 else 1 - found.direction
        starts = found.starts if direction == found.direction else self.turned(found)
        spread, share = rng.choice((0, 0.3, 1, 2, 4)) * self.unit, rng.choice((0.03, 0.1, 0.3, 1))
        if spread:
            gauss, draw = rng.gauss, rng.random
            starts = [[x + gauss(0, spread) if draw() < share else x for x in row] for row in starts]
        return direction, starts

    def turned(self, found: Found) -> list[list[float]]:
        """The starts as seen from the other end."""
        time = self.directions[found.direction].loop.time
        rows: list[list[float]] = [[] for _ in range(self.count)]
        for slot in self.forwards:
            for here, there in ((slot, slot + BACKWARD), (slot + BACKWARD, slot)):
                rows[there] = [found.makespan - start - time[here] for start in reversed(found.starts[here])]
        return rows

    def one_at_a_time(self) -> Found:
        """Every stage holds one micro-batch of each model: slow, but possible whatever the cap."""
        total = self.directions[0].loop.total
        priority = [[float(slot)] * number for slot, number in enumerate(total)]
        latest = [[math.inf] * (number + 1) for number in total]
        found = self.run(0, Rule(priority, [1] * self.count, latest, room=self.instance.memory_cap))
        assert found is not None
        return found

    def run(self, direction: int, rule: Rule) -> Found | None:
        loop = self.directions[direction].loop
        state = loop.run(rule)
        return None if state is None else self.found(direction, state)

    def found(self, direction: int, state: State) -> Found:
        """What a state that is done amounts to."""
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
        return Found(direction, starts, state.now, peak, most)

    def orders(self, found: Found) -> list[Order]:
        """What each device does, from the start."""
        starts = found.starts if found.direction == 0 else self.turned(found)
        rows = []
        for slots in self.directions[0].loop.slots:
            row = sorted((start, slot % PER_DEVICE) for slot in slots for start in starts[slot])
            rows.append([divmod(code, PER_MODEL) for _, code in row])
        return rows

    def read(self, schedule: Schedule) -> Found:
        """A schedule from elsewhere as a place to start from."""
        starts: list[list[float]] = [[] for _ in range(self.count)]
        for each in sorted(schedule.operations, key=lambda each: each.micro_batch):
            starts[PER_DEVICE * each.device + PER_MODEL * each.model + each.kind].append(each.start)
        state = self.directions[0].loop.fresh()
        log = sorted((start, slot) for slot, row in enumerate(starts) for start in row)
        state.now, state.log = schedule.makespan, (None, log)
        return self.found(0, state)


def mirrored(instance: Instance) -> Instance:
    """The same with time running backwards."""
    a, b = (replace(each, forward=each.backward, backward=each.forward) for each in instance.models)
    return replace(instance, a=a, b=b)
