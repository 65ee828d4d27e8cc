"""Beam search for schedules that meet a makespan and a memory cap, where list scheduling alone does not.

All partial schedules of the beam are carried on by the same stretch of time, each under several drawn rules. One dies
as soon as an operation must be late. Of the rest those stay that have done most, and whose next operations have most
time to spare. Where all die the search goes back some stretches, further each time that it gets no further.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from training.planner.fusion.event_loop import PER_DEVICE, PER_MODEL, EventLoop, Rule, State
from training.planner.fusion.instance import BACKWARD, FORWARD, ROUNDING

WIDTH = 100
"""Partial schedules that are kept."""
BRANCHES, RULES = 6, 24
"""Rules that each of them is carried on under, drawn from so many."""
STRETCHES = 60
"""In the makespan."""
DEATHS = 12
"""The search gives up when all partial schedules have died so many times."""
CROWD = 30
"""Most of those kept that have done the same on the device with least time to spare."""
PATIENCE = 0.15
"""What time to spare counts, against work done."""
URGENT = (0.0, 0.3, 0.7)
"""Shares of devices that take first what is due first."""
HELD = (0.0, 0.0, 0.1, 0.3)
"""Shares of forwards that are held back."""
COPY_EFFORT = 1.5
"""What a copy and its rank cost a device, in operations started."""


class Beam:
    """One search: an instance, a makespan, a memory cap."""

    def __init__(self, loop: EventLoop, latest: list[list[float]], makespan: float, cap: float, rng: random.Random):
        """`latest` starts are those of schedules of this makespan within this cap."""
        self.loop, self.rng = loop, rng
        self.makespan, self.cap = makespan, cap
        self.rows = [[float(rank)] * max(loop.total) for rank in range(PER_DEVICE)]
        self.rule = Rule(self.rows, [], latest, room=cap, limit=makespan, strict=True)
        self.room = cap * (1 + ROUNDING)
        instance = loop.instance
        spare = [makespan - self._shortest_head(device) - left for device, left in enumerate(loop.left)]
        self.narrow = PER_DEVICE * spare.index(min(spare))
        self.chains: list[list[int]] = []
        """Forward slots of each copy of a model, by stage."""
        for model, each in enumerate(instance.models):
            for first in range(0, instance.devices, each.stages):
                devices = range(first, first + each.stages)
                chain = [PER_DEVICE * device + PER_MODEL * model for device in devices]
                self.chains.append(chain if model == 0 else chain[::-1])
        self.links: list[tuple[int, int]] = []
        """Slot and the slot that its micro-batches come from, in the order of the chains; -1 is none."""
        for chain in self.chains:
            path = [*chain, *(slot + BACKWARD for slot in reversed(chain))]
            self.links += zip(path, [-1, *path], strict=False)

    def _shortest_head(self, device: int) -> float:
        return min(self.loop.instance.time_before(model, device, FORWARD) for model in range(2))

    def search(self, is_over: Callable[[], bool]) -> State | None:
        """A state that is done, or None. `is_over` is asked now and then whether to give up."""
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
        kept = []
        for _, child in ranked:
            key = tuple(child.started[self.narrow : self.narrow + PER_DEVICE])
            crowd[key] = crowd.get(key, 0) + 1
            if crowd[key] <= CROWD:
                kept.append(child)
                if len(kept) == WIDTH:
                    break
        return kept

    def _draw(self) -> Rule:
        """A random preference of each device; windows near those of 1F1B; some forwards held back."""
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
        """Rank of a partial schedule; None if it cannot be completed in time.

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
