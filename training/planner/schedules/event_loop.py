"""A list scheduler: whenever a device is free it takes, of what is ready, what has the smallest priority value.

Everything the search does is this loop under other rules, so it is written for speed: flat lists, one heap, no
objects. A *slot* is one kind of operation of one model on one device: 6 x device + 3 x model + kind.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from training.planner.schedules.problem import BACKWARD, FORWARD, ROUNDING, WEIGHT, Numbers, SchedulingProblem
from training.planner.schedules.schedule import Order

PER_DEVICE, PER_MODEL = 6, 3


@dataclass(frozen=True)
class Rule:
    """Says what an event loop goes by. All lists are by slot."""

    priority: Sequence[Sequence[float]]
    """Priorities by micro-batch; the smallest goes first."""
    windows: Sequence[int]
    """How many micro-batches may be alive, for forward slots; those of other slots are not used."""
    latest: Sequence[Sequence[float]]
    """Latest start by micro-batch, and one endless one behind the last. What would make another operation of the device
    late does not start."""
    room: float = math.inf
    """Most memory of the activations alive on a device."""
    limit: float = math.inf
    """The loop stops when a device has idled too much to be done by then."""
    leeway: float = 0
    """Added to all latest starts."""
    strict: bool = False
    """The loop stops when an operation is late; otherwise the operation no longer counts."""


class State:
    __slots__ = ("alive", "events", "left", "log", "now", "queue", "running", "started")

    queue: list[int]
    """Operations that could start, by slot."""
    started: list[int]
    alive: list[int]
    """Micro-batches alive, by forward slot."""
    left: list[float]
    """Time that a device still needs, with the shortest tail behind it."""
    running: list[int]
    """The slot by device; -1 is idle."""
    events: list[tuple[float, int]]
    """Ends of what runs, a heap of (time, device)."""
    now: float
    log: "tuple[object, list[tuple[float, int]]] | None"
    """What has started: the log before, then (time, slot) in order of time."""

    def copy(self) -> "State":
        other = State()
        other.queue, other.started, other.alive = self.queue[:], self.started[:], self.alive[:]
        other.left, other.running, other.events = self.left[:], self.running[:], self.events[:]
        other.now, other.log = self.now, self.log
        return other

    def starts(self) -> list[tuple[float, int]]:
        """Return (time, slot) of everything that has started, in order of time."""
        parts, log = [], self.log
        while log is not None:
            log, part = log  # type: ignore[assignment]
            parts.append(part)
        return [start for part in reversed(parts) for start in part]


class EventLoop:
    """Runs schedules of one problem, whose tables it holds."""

    def __init__(self, problem: SchedulingProblem):
        self.problem = problem
        self.dispatched = 0
        """Operations started so far: the measure of effort."""
        count = PER_DEVICE * problem.devices
        self.slots: list[tuple[int, ...]] = [()] * problem.devices
        self.time: list[float] = [0.0] * count
        self.total = [0] * count
        self.activation = [0.0] * count
        self.rival = [0] * count  # the forward slot of the other model
        self.next = [-1] * count  # the slot of the same micro-batch's next operation
        self.aside = [-1] * count  # the weight part that a backward makes ready too
        self.frees = [-1] * count  # the forward slot whose memory this operation frees
        self.first = [False] * count  # forwards that wait for nothing but their turn
        self.tail = [math.inf] * problem.devices
        for device in range(problem.devices):
            for model in range(2):
                self._fill(device, model)
        self.forwards = range(0, count, PER_MODEL)
        self.forwards_of_rivals = [self.rival[slot] for slot in self.forwards]
        work = [sum(self.time[slot] * self.total[slot] for slot in slots) for slots in self.slots]
        self.left = [tail + time for tail, time in zip(self.tail, work, strict=True)]
        # less than that is left where nothing is to do any more; halves, since sums of times are not exact
        shortest = min(time for time in self.time if time)
        self.over = [tail + shortest / 2 for tail in self.tail]
        self.rounding = ROUNDING * max(work)
        self.unit = sum(self.time) / sum(time > 0 for time in self.time)
        """Mean time of an operation."""

    def _fill(self, device: int, model: int) -> None:
        problem, pipeline = self.problem, self.problem.models[model]
        same, slot = PER_MODEL * model, PER_DEVICE * device + PER_MODEL * model
        behind, before = problem.after(model, device), problem.before(model, device)
        for kind in pipeline.kinds:
            self.slots[device] += (slot + kind,)
            self.time[slot + kind] = problem.times(model, device)[kind]
            self.total[slot + kind] = pipeline.micro_batches
        self.activation[slot] = problem.activation(model, device)
        self.rival[slot] = slot + (PER_MODEL if model == 0 else -PER_MODEL)
        self.first[slot] = before is None
        self.next[slot] = slot + BACKWARD if behind is None else PER_DEVICE * behind + same
        self.next[slot + BACKWARD] = -1 if before is None else PER_DEVICE * before + same + BACKWARD
        if pipeline.is_split:
            self.aside[slot + BACKWARD] = slot + WEIGHT
        self.frees[slot + pipeline.kinds[-1]] = slot
        tail = 0 if pipeline.is_split else problem.time_before(model, device, BACKWARD)
        self.tail[device] = min(self.tail[device], tail)

    def by_slot(self, numbers: Numbers) -> list[list[float]]:
        """Return them by slot instead of by (device, model, kind), with an infinite one after the last."""
        rows = [[math.inf] for _ in self.time]
        for (device, model, kind), row in numbers.items():
            rows[PER_DEVICE * device + PER_MODEL * model + kind] = [*row, math.inf]
        return rows

    def fresh(self) -> State:
        state = State()
        state.queue = [total if first else 0 for total, first in zip(self.total, self.first, strict=True)]
        state.started, state.alive = [0] * len(self.time), [0] * len(self.time)
        state.left = self.left[:]
        state.running, state.events = [-1] * len(self.slots), []
        state.now, state.log = 0, None
        return state

    def orders(self, state: State) -> list[Order]:
        """Return what each device has started, one after the other."""
        rows: list[list[tuple[int, int]]] = [[] for _ in self.slots]
        for _, slot in state.starts():
            rows[slot // PER_DEVICE].append(divmod(slot % PER_DEVICE, PER_MODEL))
        return rows

    def is_done(self, state: State) -> bool:
        return not state.events and state.started == self.total

    def run(self, rule: Rule) -> State | None:
        """Return a whole schedule; None where the rule stops the loop or the devices wait for each other."""
        state = self.fresh()
        return state if self.advance(state, rule) and self.is_done(state) else None

    def advance(self, state: State, rule: Rule, until: float = math.inf) -> bool:
        """Carry the state on through all events up to a time, in place; False where the rule stops the loop."""
        time, next_slot, aside, frees, over = self.time, self.next, self.aside, self.frees, self.over
        activation, rival, slots = self.activation, self.rival, self.slots
        queue, started, alive = state.queue, state.started, state.alive
        left, running, events, now = state.left, state.running, state.events, state.now
        priority, windows, latest, leeway, strict = rule.priority, rule.windows, rule.latest, rule.leeway, rule.strict
        rounding, inf = self.rounding, math.inf
        room, limit = rule.room * (1 + ROUNDING), rule.limit + rounding
        log: list[tuple[float, int]] = []
        touched: Sequence[int] = range(len(slots))
        fine = True
        while fine:
            for device in touched:
                if running[device] >= 0:
                    continue
                if now + left[device] > limit and left[device] > over[device]:
                    fine = False
                    break
                soonest = second = inf  # the two earliest latest starts
                hurried = -1  # whose the first one is
                for slot in slots[device]:
                    due = latest[slot][started[slot]] + leeway
                    if due < now - rounding:
                        if strict:
                            fine = False
                    elif due < soonest:
                        soonest, second, hurried = due, soonest, slot
                    elif due < second:
                        second = due
                best, chosen = inf, -1
                for slot in slots[device]:
                    if not queue[slot]:
                        continue
                    value = priority[slot][started[slot]]
                    if value >= best or now + time[slot] - rounding > (second if slot == hurried else soonest):
                        continue
                    if slot % PER_MODEL == FORWARD:
                        if alive[slot] >= windows[slot]:
                            continue
                        other = rival[slot]
                        if (alive[slot] + 1) * activation[slot] + alive[other] * activation[other] > room:
                            continue
                    best, chosen = value, slot
                if chosen < 0:
                    continue
                log.append((now, chosen))
                left[device] -= time[chosen]
                started[chosen] += 1
                queue[chosen] -= 1
                running[device] = chosen
                if chosen % PER_MODEL == FORWARD:
                    alive[chosen] += 1
                heappush(events, (now + time[chosen], device))
            if not events or events[0][0] > until:
                break
            now, device = heappop(events)
            touched = []
            while True:
                slot = running[device]
                running[device] = -1
                touched.append(device)
                follower = next_slot[slot]
                if follower >= 0:
                    queue[follower] += 1
                    touched.append(follower // PER_DEVICE)
                if aside[slot] >= 0:
                    queue[aside[slot]] += 1
                if frees[slot] >= 0:
                    alive[frees[slot]] -= 1
                if not events or events[0][0] != now:
                    break
                device = heappop(events)[1]
        state.now, state.log = now, (state.log, log)
        self.dispatched += len(log)
        return fine
