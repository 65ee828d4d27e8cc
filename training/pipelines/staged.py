"""The roles that a plan cuts into stages: in which order their passes run, and what an order is expected to take."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import torch

from training.distributed import Ranks, local_size
from training.fusion.timeline import Timeline
from training.pipelines.executor import connect, execute
from training.pipelines.orders import (
    CannotFuse,
    Event,
    Operation,
    Orders,
    Pipelines,
    devices,
    fused,
    makespan,
    one_forward_one_backward,
    serial,
    timeline,
)
from training.pipelines.stage_engine import ScoringWork, TrainingWork
from training.plan import Plan
from training.planner.fusion.baselines import serial_1f1b
from training.planner.fusion.instance import BACKWARD, FORWARD, KINDS, Instance, Pipeline
from training.planner.fusion.search import QUICK, find_schedule

Order = Literal["auto", "serial", "1f1b", "fused"]
LEAST_GAIN = 0.02
"""What fusing must save of the seconds of 1F1B for `auto` to fuse."""
NEWS = 0.1
"""Measured rates that differ by more than this from those of the last search are a reason to search again."""
VALUE_BYTES = 4
"""Of a value kept for the backward pass, at most."""
USABLE = 0.8
"""Of the memory that is free after an update under 1F1B, what a fused order may take for activations."""


Key = tuple[str, int, int]
"""Role, stage, kind of operation."""


@dataclass(frozen=True)
class Taken:
    """What operations of one kind took, summed."""

    seconds: float = 0.0
    tokens: int = 0
    count: int = 0

    def __add__(self, other: "Taken") -> "Taken":
        return Taken(self.seconds + other.seconds, self.tokens + other.tokens, self.count + other.count)

    @property
    def rate(self) -> float:
        """Seconds a token."""
        return self.seconds / self.tokens

    @property
    def mean(self) -> float:
        """Seconds of a micro-batch."""
        return self.seconds / self.count


@dataclass(frozen=True)
class Trained:
    """The passes of one optimiser step on this rank."""

    order: str
    events: list[Event]
    expected: list[Event]
    """Those of this rank's pipelines by the seconds measured before; none where there were none."""


class StagedRoles:
    """Those of a run; none where its plan has no stages. All ranks make it, and call `learn`."""

    def __init__(
        self,
        plan: Plan,
        ranks: Ranks,
        layers: Mapping[str, int],
        order: Order = "auto",
        activations: Mapping[str, float] = MappingProxyType({}),
        say: Callable[[str], None] = lambda text: None,
    ):
        """`layers` are those of the models, `activations` the values that a token leaves in a layer until its
        backward pass, by role; `say` shows a line."""
        self.ranks, self.layers, self.order, self.activations, self.say = ranks, layers, order, activations, say
        self.layouts = {name: each.layout for name, each in plan.assignments.items() if each.layout.pipeline > 1}
        links = dict.fromkeys((name.partition("_")[0], layout) for name, layout in self.layouts.items())
        self.links = {key: connect(ranks, Pipelines.of(key[1], 0)) for key in links}
        self.taken: dict[Key, Taken] = {}
        """On all ranks, when it was last searched for an order."""
        self.spare = 0.0
        """Bytes that every rank has for activations beyond those of 1F1B."""
        self.newly_taken: dict[Key, Taken] = {}
        """On this rank, since the last `learn`."""
        self.trained: list[Trained] = []
        """Since the last `learn`."""
        self._found: dict[tuple, tuple[str, Orders]] = {}
        self._said: set[str] = set()

    def __contains__(self, call: str) -> bool:
        """Whether a call runs in stages."""
        return call in self.layouts

    def score(self, call: str, work: ScoringWork) -> None:
        """Its forward passes, on a rank that takes part in the call."""
        role, layout = call.partition("_")[0], self.layouts[call]
        roles = {role: Pipelines.of(layout, work.count, (FORWARD,))}
        execute(one_forward_one_backward(roles), self.ranks.rank, {role: work}, {role: self.links[role, layout]})

    def train(self, works: Mapping[str, TrainingWork], calls: Timeline) -> None:
        """The passes of the roles that this rank trains in stages, before an optimiser step of each. What they took is
        added to `calls`."""
        layouts = {role: self.layouts[f"{role}_train"] for role in works}
        roles = {role: Pipelines.of(layouts[role], work.count) for role, work in works.items()}
        tokens = {role: [sum(batch.lengths) for batch in work.batches] for role, work in works.items()}
        name, orders = self._orders(roles)
        events: list[Event] = []
        execute(orders, self.ranks.rank, works, {role: self.links[role, layouts[role]] for role in works}, events)
        ours = {rank for each in roles.values() for line in each.ranks if self.ranks.rank in line for rank in line}
        expected = self._timeline(orders, tokens) if self.taken else []
        self.trained.append(Trained(name, events, [event for event in expected if event.rank in ours]))
        for _, (role, kind, number), start, end in events:
            key = role, roles[role].stage(self.ranks.rank), kind
            self.newly_taken[key] = self.newly_taken.get(key, Taken()) + Taken(end - start, tokens[role][number], 1)
            calls.add(f"{role}_train", start, end)

    def learn(self) -> dict[str, float]:
        """What was measured becomes what orders to come are searched with. Returns metrics of the iteration."""
        if not any(name.endswith("_train") for name in self.layouts):
            return {}
        seconds = [(makespan(each.events), makespan(each.expected or each.events)) for each in self.trained]
        ours = self.newly_taken, seconds, free_memory(self.ranks)
        found = self.ranks.gather(ours, "what stages took")
        now: dict[Key, Taken] = {}
        for of_rank, _, _ in found:
            now |= {key: now.get(key, Taken()) + taken for key, taken in of_rank.items()}
        if any(abs(each.rate - self.taken.get(key, Taken(0, 1)).rate) > NEWS * each.rate for key, each in now.items()):
            self.taken |= now
            self.spare = USABLE * min(spare for _, _, spare in found)
            self._found.clear()
        self.newly_taken, self.trained = {}, self.trained[-1:]
        slowest = max((rows for _, rows, _ in found), key=lambda rows: sum(taken for taken, _ in rows))
        achieved, expected = (sum(each) for each in zip((0.0, 0.0), *slowest, strict=True))
        return {"pipeline/seconds": achieved, "pipeline/seconds_expected": expected}

    def newest(self) -> dict[str, Any] | None:
        """This rank's passes of the newest optimiser step in stages, for a picture; None where it has made none."""
        if not self.trained:
            return None
        newest = self.trained[-1]
        ours = [event for event in newest.expected if event.rank == self.ranks.rank]
        passes = [
            [[f"{role} {KINDS[kind]}", start, end] for _, (role, kind, _), start, end in events]
            for events in (newest.events, ours)
        ]
        return {"order": newest.order, "achieved": passes[0], "predicted": passes[1]}

    def _timeline(self, orders: Orders, tokens: Mapping[str, list[int]]) -> list[Event]:
        """When each operation would run by what was measured, with micro-batches of so many tokens."""

        def seconds(rank: int, operation: Operation) -> float:
            role, kind, number = operation
            return self.taken[role, orders.roles[role].stage(rank), kind].rate * tokens[role][number]

        return timeline(orders, seconds)

    def _orders(self, roles: Mapping[str, Pipelines]) -> tuple[str, Orders]:
        """The same on all ranks: it hangs on what all of them know."""
        key = self.order, *((role, each.micro_batches) for role, each in roles.items())
        if key not in self._found:
            self._found[key] = self._chosen(roles)
        return self._found[key]

    def _chosen(self, roles: Mapping[str, Pipelines]) -> tuple[str, Orders]:
        if self.order == "serial":
            return "serial", serial(roles)
        plain = one_forward_one_backward(roles)
        if self.order == "1f1b" or (self.order == "auto" and not self.taken):
            return "1f1b", plain
        try:
            devices(roles)
            instance = self._instance(roles)
        except CannotFuse as reason:
            self._say_once(f"PPO: training is not fused: {reason}")
            return "1f1b", plain
        woven = find_schedule(instance, effort=QUICK).schedule
        one, other = serial_1f1b(instance).makespan, woven.makespan
        fuses = self.order == "fused" or other <= (1 - LEAST_GAIN) * one
        if self.taken:
            self._say_once(
                f"PPO: training of {' and '.join(roles)} is {'fused' if fuses else 'not fused'}: {other:.3g} s of an "
                f"optimiser step expected, {one:.3g} s under 1F1B"
            )
        return ("fused", fused(roles, woven)) if fuses else ("1f1b", plain)

    def _instance(self, roles: Mapping[str, Pipelines]) -> Instance:
        """What the search is told: mean seconds and activations of micro-batches, and the room for these. Before
        anything is measured a backward pass takes two forward ones. Raises CannotFuse where there is no room."""
        pipelines = []
        for role, each in roles.items():
            layers = self.layouts[f"{role}_train"].runs(self.layers[role])
            keys = [[(role, stage, kind) for stage in range(each.stages)] for kind in (FORWARD, BACKWARD)]
            unmeasured = [tuple((1.0 + kind) * count for count in layers) for kind in (FORWARD, BACKWARD)]
            is_known = all(key in self.taken for of_kind in keys for key in of_kind)
            forward, backward = (
                [tuple(self.taken[key].mean for key in of_kind) for of_kind in keys] if is_known else unmeasured
            )
            tokens = self.taken[keys[0][0]].tokens / self.taken[keys[0][0]].count if is_known else 1
            activations = tuple(self.activations.get(role, 0.0) * VALUE_BYTES * tokens * count for count in layers)
            pipelines.append(Pipeline(each.stages, each.micro_batches, forward, backward, activations))
        one, other = pipelines
        boundless = Instance(one, other)
        try:
            return replace(boundless, memory_cap=serial_1f1b(boundless).peak_memory + self.spare)
        except ValueError:
            raise CannotFuse("the memory has no room for a micro-batch of both at one time") from None

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.say(text)


def free_memory(ranks: Ranks) -> float:
    """Bytes that this rank can still have."""
    if ranks.device.type == "cuda":
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return float(torch.cuda.mem_get_info()[0] + cached)
    import psutil  # DeepSpeed needs it too

    return psutil.virtual_memory().available / local_size()
