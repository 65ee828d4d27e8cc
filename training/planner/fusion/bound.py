"""What holds for every schedule of an instance: how early an operation starts, how much follows it, and what that
means for the makespan and the memory.

The bound of RLHFuse (arXiv 2409.13221, section 5.3) takes for each device the earliest start of any operation there,
all work, and the shortest tail. `lower_bound` does the same for every subset of the device's operations, so it is
never lower.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush

from training.planner.fusion.instance import FORWARD, WEIGHT, Instance

ROUNDING = 1e-9
"""Relative: sums of the same numbers in another order may differ by less."""
Key = tuple[int, int, int]
"""Device, model, kind."""
Numbers = dict[Key, list[float]]
"""A value by micro-batch."""


@dataclass(frozen=True)
class Slack:
    """What surrounds every operation in every schedule."""

    instance: Instance
    heads: Numbers
    """Time before the start of the operation."""
    tails: Numbers
    """Time from its end to the end of the schedule."""

    @classmethod
    def of(cls, instance: Instance, cap: float = math.inf) -> "Slack":
        """In schedules within a memory cap, and within that of the instance."""
        cap = min(cap, instance.memory_cap)
        tails = _heads(instance, cap, mirrored=True)
        return cls(instance, _heads(instance, cap, mirrored=False), {key: row[::-1] for key, row in tails.items()})

    def lower_bound(self) -> float:
        """Of the makespan."""
        return max(_preemptive(self._operations(device)) for device in range(self.instance.devices))

    def memory_bound(self, makespan: float) -> float:
        """Of the peak memory of schedules that take no longer than `makespan`."""
        return max(self._memory_bound(device, makespan) for device in range(self.instance.devices))

    def latest(self, makespan: float) -> Numbers:
        """The latest start of every operation in a schedule of this makespan."""
        return {
            (device, model, kind): [makespan - tail - self.instance.times(model, device)[kind] for tail in row]
            for (device, model, kind), row in self.tails.items()
        }

    def _operations(self, device: int) -> Iterator[tuple[float, float, float]]:
        """Head, time and tail."""
        for key, heads in self.heads.items():
            if key[0] == device:
                time = self.instance.times(key[1], device)[key[2]]
                yield from ((head, time, tail) for head, tail in zip(heads, self.tails[key], strict=True))

    def _memory_bound(self, device: int, makespan: float) -> float:
        changes = []  # between its latest start and its earliest end a micro-batch is there for certain
        for model, each in enumerate(self.instance.models):
            last, times = each.kinds[-1], self.instance.times(model, device)
            for tail, head in zip(self.tails[device, model, FORWARD], self.heads[device, model, last], strict=True):
                start, end = makespan - tail - times[FORWARD], head + times[last]
                if start < end:
                    changes += [(start, 1, model), (end, -1, model)]
        alive, peak = [0, 0], 0.0
        for _, change, model in sorted(changes):
            alive[model] += change
            held = (number * self.instance.activation(model, device) for model, number in enumerate(alive))
            peak = max(peak, sum(held))
        return peak


def _heads(instance: Instance, cap: float, mirrored: bool) -> Numbers:
    """Earliest starts. Mirrored: with time running backwards, so that chains start with what is last.

    A model's operations of one kind on one device keep the order of the micro-batches, so of a mini-batch's operations
    there, all of the kinds k.. of the micro-batches i..j start after kind k of micro-batch i can: they are a load that
    delays the last kind of j.
    """
    heads: Numbers = {}
    for model, each in enumerate(instance.models):
        kinds = each.kinds[::-1] if mirrored else each.kinds
        downwards = sorted(range(instance.devices), key=lambda device: instance.stage(model, device))
        heads.update({(device, model, kind): [] for device in downwards for kind in kinds})
        times = {device: [instance.times(model, device)[kind] for kind in kinds] for device in downwards}
        windows = {}  # a forward waits for the memory of the micro-batch that many before it
        for device in downwards:
            activation = instance.activation(model, device)
            fits = cap / activation * (1 + ROUNDING) if activation else math.inf
            windows[device] = max(1, int(min(fits, instance.micro_batches(model))))
        over = dict.fromkeys(downwards, 0.0)  # the earliest end of the mini-batch before
        for number in range(instance.micro_batches(model)):
            if number % each.micro_batches == 0:
                loads: dict[tuple[int, int, int], float] = {}
            for place, kind in enumerate(kinds):
                goes_down = (kind == FORWARD) != mirrored
                for device in downwards if goes_down else downwards[::-1]:
                    mine, own, window = heads[device, model, kind], times[device], windows[device]
                    head = mine[-1] + own[place] if number % each.micro_batches else over[device]
                    source = instance.before(model, device) if goes_down else instance.after(model, device)
                    if source is not None and kind != WEIGHT:
                        head = max(head, heads[source, model, kind][number] + times[source][place])
                    if place == 0 and number >= window:
                        head = max(head, heads[device, model, kinds[-1]][number - window] + own[-1])
                    for first in range(place):
                        load = max(heads[device, model, kinds[first]][number], loads.get((device, first, place), 0.0))
                        loads[device, first, place] = load + sum(own[first : place + 1])
                        head = max(head, load + sum(own[first:place]))
                    mine.append(head)
            if (number + 1) % each.micro_batches == 0:
                last = len(kinds) - 1
                for device in downwards:
                    over[device] = max(
                        *(heads[device, model, kind][-1] + instance.times(model, device)[kind] for kind in kinds),
                        *(loads[device, first, last] for first in range(last)),
                    )
    return heads


def _preemptive(operations: Iterator[tuple[float, float, float]]) -> float:
    """The shortest makespan of one device that may interrupt an operation for one with a longer tail (Jackson)."""
    waiting = sorted(operations, reverse=True)
    ready: list[tuple[float, float]] = []  # (-tail, time left)
    now, makespan = 0.0, 0.0
    while waiting or ready:
        if not ready:
            now = max(now, waiting[-1][0])
        while waiting and waiting[-1][0] <= now:
            _, time, tail = waiting.pop()
            heappush(ready, (-tail, time))
        tail, time = heappop(ready)
        spent = min(time, waiting[-1][0] - now) if waiting else time
        now += spent
        if spent < time:
            heappush(ready, (tail, time - spent))
        else:
            makespan = max(makespan, now - tail)
    return makespan
