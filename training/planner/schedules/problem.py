"""What there is to schedule: two models in training on the same devices, their pipelines in opposite directions.

Model A runs device 0 -> N - 1, model B the other way. A model with fewer stages than there are devices stands on them
in several copies side by side, each with its own micro-batches: 4 stages on 8 devices are a pipeline on devices 0-3
and one on devices 4-7. Times and bytes are in any unit, the same for both models.

The problem: RLHFuse (arXiv 2409.13221, section 5).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush

PerStage = float | tuple[float, ...]
"""One number for all stages, or one for each."""
FORWARD, BACKWARD, WEIGHT = 0, 1, 2
KINDS = ("forward", "backward", "weight")
"""Names of the kinds of operation: `weight` is the weight-gradient part of a backward that is split in two."""
MODELS = ("A", "B")


@dataclass(frozen=True)
class Pipeline:
    """Describes one model in training, cut into stages."""

    stages: int
    micro_batches: int
    """The micro-batches of each copy."""
    forward: PerStage
    """Time of a micro-batch's forward on one stage."""
    backward: PerStage
    """Time of its backward; without the weight-gradient part where that is split off."""
    activation: PerStage
    """Memory of a micro-batch on one stage, from the start of its forward to the end of its backward (both parts)."""
    weight: PerStage = 0
    """Time of the weight-gradient part where it is an operation of its own; 0 means that it is part of `backward`."""

    def __post_init__(self) -> None:
        if min(self.stages, self.micro_batches) < 1:
            raise ValueError("a pipeline needs at least one stage and one micro-batch")
        weights = [times[WEIGHT] for times in self.times]
        if min(time for times in self.times for time in times[:WEIGHT]) <= 0:
            raise ValueError("forward and backward must be above 0")
        if min(*self.activations, *weights) < 0 or 0 < weights.count(0) < self.stages:
            raise ValueError("activation and weight must not be below 0, and weight must be 0 on all stages or on none")

    def _by_stage(self, value: PerStage) -> tuple[float, ...]:
        values = value if isinstance(value, tuple) else (value,) * self.stages
        if len(values) != self.stages:
            raise ValueError(f"{self.stages} stages need one number for all or {self.stages} numbers, not {value}")
        return values

    @property
    def kinds(self) -> tuple[int, ...]:
        """The kinds of operation of a micro-batch on one stage."""
        return (FORWARD, BACKWARD, WEIGHT) if self.is_split else (FORWARD, BACKWARD)

    @property
    def is_split(self) -> bool:
        """Whether the weight-gradient part is an operation of its own."""
        return self.times[0][WEIGHT] > 0

    @cached_property
    def times(self) -> list[tuple[float, ...]]:
        return list(zip(*map(self._by_stage, (self.forward, self.backward, self.weight)), strict=True))

    @cached_property
    def activations(self) -> tuple[float, ...]:
        return self._by_stage(self.activation)


@dataclass(frozen=True)
class SchedulingProblem:
    """Describes two pipelines in one optimiser step, and the limits of their schedule."""

    a: Pipeline
    b: Pipeline
    memory_cap: float = math.inf
    """Most memory that the activations alive on a device may take."""

    def __post_init__(self) -> None:
        needed = max(self.activation(0, device) + self.activation(1, device) for device in range(self.devices))
        if self.memory_cap < needed:
            raise ValueError("memory_cap must have room for one micro-batch of each model")

    @property
    def models(self) -> tuple[Pipeline, Pipeline]:
        return self.a, self.b

    @cached_property
    def devices(self) -> int:
        return math.lcm(self.a.stages, self.b.stages)

    def stage(self, model: int, device: int) -> int:
        """Return which of the model's stages the device holds."""
        stages = self.models[model].stages
        stage = device % stages
        return stage if model == 0 else stages - 1 - stage

    def times(self, model: int, device: int) -> tuple[float, ...]:
        return self.models[model].times[self.stage(model, device)]

    def activation(self, model: int, device: int) -> float:
        return self.models[model].activations[self.stage(model, device)]

    def time_before(self, model: int, device: int, kind: int) -> float:
        """Return the time of a micro-batch's operations of a kind on all stages before the device's."""
        return sum(times[kind] for times in self.models[model].times[: self.stage(model, device)])

    def before(self, model: int, device: int) -> int | None:
        """Return the device with the stage before; None at the first stage."""
        if self.stage(model, device) == 0:
            return None
        return device - 1 if model == 0 else device + 1

    def after(self, model: int, device: int) -> int | None:
        """Return the device with the next stage; None at the last stage."""
        if self.stage(model, device) == self.models[model].stages - 1:
            return None
        return device + 1 if model == 0 else device - 1


ROUNDING = 1e-9
"""Relative: sums of the same numbers in another order may differ by less."""
Key = tuple[int, int, int]
"""Device, model, kind."""
Numbers = dict[Key, list[float]]
"""A value by micro-batch."""


@dataclass(frozen=True)
class Slack:
    """Holds the least time before and after every operation, in every schedule."""

    problem: SchedulingProblem
    heads: Numbers
    """Time before the start of the operation."""
    tails: Numbers
    """Time from its end to the end of the schedule."""

    @classmethod
    def of(cls, problem: SchedulingProblem, cap: float = math.inf) -> "Slack":
        """Find that of schedules within a memory cap, and within that of the problem."""
        cap = min(cap, problem.memory_cap)
        tails = _heads(problem, cap, mirrored=True)
        return cls(problem, _heads(problem, cap, mirrored=False), {key: row[::-1] for key, row in tails.items()})

    def lower_bound(self) -> float:
        """Return a makespan that no schedule is shorter than."""
        return max(_preemptive(self._operations(device)) for device in range(self.problem.devices))

    def memory_bound(self, makespan: float) -> float:
        """Return a lower bound of the peak memory of schedules that take no longer than `makespan`."""
        return max(self._memory_bound(device, makespan) for device in range(self.problem.devices))

    def latest(self, makespan: float) -> Numbers:
        """Return the latest start of every operation in a schedule of this makespan."""
        return {
            (device, model, kind): [makespan - tail - self.problem.times(model, device)[kind] for tail in row]
            for (device, model, kind), row in self.tails.items()
        }

    def _operations(self, device: int) -> Iterator[tuple[float, float, float]]:
        for key, heads in self.heads.items():
            if key[0] == device:
                time = self.problem.times(key[1], device)[key[2]]
                yield from ((head, time, tail) for head, tail in zip(heads, self.tails[key], strict=True))

    def _memory_bound(self, device: int, makespan: float) -> float:
        changes = []  # between its latest start and its earliest end a micro-batch is there for certain
        for model, pipeline in enumerate(self.problem.models):
            last, times = pipeline.kinds[-1], self.problem.times(model, device)
            for tail, head in zip(self.tails[device, model, FORWARD], self.heads[device, model, last], strict=True):
                start, end = makespan - tail - times[FORWARD], head + times[last]
                if start < end:
                    changes += [(start, 1, model), (end, -1, model)]
        alive, peak = [0, 0], 0.0
        for _, change, model in sorted(changes):
            alive[model] += change
            held = (number * self.problem.activation(model, device) for model, number in enumerate(alive))
            peak = max(peak, sum(held))
        return peak


def _heads(problem: SchedulingProblem, cap: float, mirrored: bool) -> Numbers:
    """Return the earliest starts. Mirrored: with time running backwards, so that chains start with what is last.

    A model's operations of one kind on one device keep the order of the micro-batches, so all of the kinds k.. of the
    micro-batches i..j there start after kind k of micro-batch i can: they are a load that delays the last kind of j.
    """
    heads: Numbers = {}
    for model, pipeline in enumerate(problem.models):
        kinds = pipeline.kinds[::-1] if mirrored else pipeline.kinds
        downwards = sorted(range(problem.devices), key=lambda device: problem.stage(model, device))
        heads.update({(device, model, kind): [] for device in downwards for kind in kinds})
        times = {device: [problem.times(model, device)[kind] for kind in kinds] for device in downwards}
        windows = {}  # a forward waits for the memory of the micro-batch that many before it
        for device in downwards:
            activation = problem.activation(model, device)
            fits = cap / activation * (1 + ROUNDING) if activation else math.inf
            windows[device] = max(1, int(min(fits, pipeline.micro_batches)))
        loads: dict[tuple[int, int, int], float] = {}
        for number in range(pipeline.micro_batches):
            for position, kind in enumerate(kinds):
                goes_down = (kind == FORWARD) != mirrored
                for device in downwards if goes_down else downwards[::-1]:
                    mine, own, window = heads[device, model, kind], times[device], windows[device]
                    head = mine[-1] + own[position] if mine else 0.0
                    source = problem.before(model, device) if goes_down else problem.after(model, device)
                    if source is not None and kind != WEIGHT:
                        head = max(head, heads[source, model, kind][number] + times[source][position])
                    if position == 0 and number >= window:
                        head = max(head, heads[device, model, kinds[-1]][number - window] + own[-1])
                    for first in range(position):
                        load = max(
                            heads[device, model, kinds[first]][number], loads.get((device, first, position), 0.0)
                        )
                        loads[device, first, position] = load + sum(own[first : position + 1])
                        head = max(head, load + sum(own[first:position]))
                    mine.append(head)
    return heads


def _preemptive(operations: Iterator[tuple[float, float, float]]) -> float:
    """Return the shortest makespan of one device that may interrupt an operation for one with a longer tail
    (Jackson)."""
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
