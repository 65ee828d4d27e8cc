"""The roles that a plan cuts into stages: in which order their passes run, and what an order is expected to take."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import torch

from training.calls import role_of
from training.distributed import Ranks, local_size
from training.fusion.board import Timeline
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
from training.planner.fusion.instance import BACKWARD, FORWARD, KINDS, Instance, Pipeline
from training.planner.fusion.schedule import serial_1f1b
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


StageKind = tuple[str, int, int]
"""Role, stage, kind of operation: what is measured together."""


@dataclass(frozen=True)
class Taken:
    seconds: float = 0.0
    tokens: int = 0
    count: int = 0

    def __add__(self, other: "Taken") -> "Taken":
        return Taken(self.seconds + other.seconds, self.tokens + other.tokens, self.count + other.count)

    @property
    def rate(self) -> float:
        """Seconds of a token."""
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
        trained = {(role_of(name), layout) for name, layout in self.layouts.items() if name.endswith("_train")}
        links = dict.fromkeys((role_of(name), layout) for name, layout in self.layouts.items())
        self.links = {
            key: connect(ranks, Pipelines.of(key[1], 0, (FORWARD, BACKWARD) if key in trained else (FORWARD,)))
            for key in links
        }
        self.taken: dict[StageKind, Taken] = {}
        """On all ranks, when it was last searched for an order."""
        self.spare = 0.0
        """Bytes that every rank has for activations beyond those of 1F1B."""
        self.newly_taken: dict[StageKind, Taken] = {}
        """On this rank, since the last `learn`."""
        self.trained: list[Trained] = []
        """Since the last `learn`."""
        self.newest: Trained | None = None
        self._found: dict[tuple, tuple[str, Orders]] = {}
        self._to_say: list[str] = []
        """By this rank, in the next `learn`."""
        self._said: set[str] = set()

    def __contains__(self, call: str) -> bool:
        return call in self.layouts

    def score(self, call: str, work: ScoringWork) -> None:
        """Run the forward passes of a call, on a rank that takes part in it."""
        role, layout = role_of(call), self.layouts[call]
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
        expected = self._timeline(orders, tokens) if self._is_known(roles) else []
        self.newest = Trained(name, events, [event for event in expected if event.rank in ours])
        self.trained.append(self.newest)
        for _, (role, kind, number), start, end in events:
            key = role, roles[role].stage(self.ranks.rank), kind
            self.newly_taken[key] = self.newly_taken.get(key, Taken()) + Taken(end - start, tokens[role][number], 1)
            calls.add(f"{role}_train", start, end)

    def learn(self) -> dict[str, float]:
        """What was measured becomes what orders to come are searched with, and what ranks have to say is said. Returns
        metrics of the iteration."""
        if not any(name.endswith("_train") for name in self.layouts):
            return {}
        achieved = sum(makespan(each.events) for each in self.trained)
        expected = sum(makespan(each.expected) for each in self.trained if each.expected)
        ours = self.newly_taken, (achieved, expected), free_memory(self.ranks), self._to_say
        found = self.ranks.gather(ours, "what stages took")
        self.newly_taken, self.trained, self._to_say = {}, [], []
        for text in dict.fromkeys(text for *_, texts in found for text in texts if text not in self._said):
            self._said.add(text)
            self.say(text)
        now: dict[StageKind, Taken] = {}
        for of_rank, *_ in found:
            now |= {key: now.get(key, Taken()) + taken for key, taken in of_rank.items()}
        if any(abs(each.rate - self.taken.get(key, Taken(0, 1)).rate) > NEWS * each.rate for key, each in now.items()):
            self.taken |= now
            self.spare = USABLE * min(spare for _, _, spare, _ in found)
            self._found.clear()
        achieved, expected = max(seconds for _, seconds, *_ in found)
        metrics = {"pipeline/seconds": achieved, "pipeline/seconds_expected": expected}
        return metrics if expected else {"pipeline/seconds": achieved}

    def picture(self, begun: float) -> dict[str, Any] | None:
        """This rank's passes of the newest optimiser step in stages, achieved ones in seconds from `begun` on its
        clock; None where it has made none since."""
        if self.newest is None or self.newest.events[0].start < begun:
            return None

        def passes(events: Iterable[Event], begun: float) -> list[list[Any]]:
            return [[f"{role} {KINDS[kind]}", start - begun, end - begun] for _, (role, kind, _), start, end in events]

        ours = [event for event in self.newest.expected if event.rank == self.ranks.rank]
        achieved = passes(self.newest.events, begun)
        return {"order": self.newest.order, "achieved": achieved, "predicted": passes(ours, 0.0)}

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

    def _is_known(self, roles: Mapping[str, Pipelines]) -> bool:
        """Whether passes of all stages have been measured: a role may learn later than the other."""
        stages = ((role, stage) for role, each in roles.items() for stage in range(each.stages))
        return all((*each, kind) in self.taken for each in stages for kind in (FORWARD, BACKWARD))

    def _chosen(self, roles: Mapping[str, Pipelines]) -> tuple[str, Orders]:
        if self.order == "serial":
            return "serial", serial(roles)
        plain = one_forward_one_backward(roles)
        if self.order == "1f1b" or (self.order == "auto" and not self._is_known(roles)):
            return "1f1b", plain
        try:
            devices(roles)
            instance = self._instance(roles)
        except CannotFuse as reason:
            self._to_say.append(f"PPO: training is not fused: {reason}")
            return "1f1b", plain
        woven = find_schedule(instance, effort=QUICK).schedule
        one, other = serial_1f1b(instance).makespan, woven.makespan
        fuses = self.order == "fused" or other <= (1 - LEAST_GAIN) * one
        if self._is_known(roles):
            self._to_say.append(
                f"PPO: training of {' and '.join(roles)} is {'fused' if fuses else 'not fused'}: {other:.3g} s of an "
                f"optimiser step expected, {one:.3g} s under 1F1B"
            )
        return ("fused", fused(roles, woven)) if fuses else ("1f1b", plain)

    def _instance(self, roles: Mapping[str, Pipelines]) -> Instance:
        """What the search is told: mean seconds and activations of micro-batches, and the room for these. Before all
        is measured a backward pass takes two forward ones, and no bound of the memory is known. Raises CannotFuse
        where there is no room."""
        pipelines, is_known = [], self._is_known(roles)
        for role, each in roles.items():
            layers = self.layouts[f"{role}_train"].runs(self.layers[role])
            keys = [[(role, stage, kind) for stage in range(each.stages)] for kind in (FORWARD, BACKWARD)]
            unmeasured = [tuple((1.0 + kind) * count for count in layers) for kind in (FORWARD, BACKWARD)]
            forward, backward = (
                [tuple(self.taken[key].mean for key in of_kind) for of_kind in keys] if is_known else unmeasured
            )
            tokens = self.taken[keys[0][0]].tokens / self.taken[keys[0][0]].count if is_known else 1
            activations = tuple(self.activations.get(role, 0.0) * VALUE_BYTES * tokens * count for count in layers)
            pipelines.append(Pipeline(each.stages, each.micro_batches, forward, backward, activations))
        one, other = pipelines
        boundless = Instance(one, other)
        if not is_known:
            return boundless
        try:
            return replace(boundless, memory_cap=serial_1f1b(boundless).peak_memory + self.spare)
        except ValueError:
            raise CannotFuse("the memory has no room for a micro-batch of both at one time") from None


def free_memory(ranks: Ranks) -> float:
    """Bytes that this rank can still have."""
    if ranks.device.type == "cuda":
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return float(torch.cuda.mem_get_info()[0] + cached)
    import psutil  # DeepSpeed needs it too

    return psutil.virtual_memory().available / local_size()
