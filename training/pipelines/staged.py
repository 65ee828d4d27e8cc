"""Roles that a plan cuts into stages: in which order their passes run, and what an order is expected to take."""

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
from training.planner.schedules.best import QUICK, find_schedule
from training.planner.schedules.problem import BACKWARD, FORWARD, KINDS, Pipeline, SchedulingProblem
from training.planner.schedules.schedule import serial_1f1b

Order = Literal["auto", "serial", "1f1b", "fused"]
LEAST_GAIN = 0.02
"""Share of the seconds of 1F1B that fusing must save for `auto` to fuse."""
NEWS = 0.1
"""Measured rates that differ by more than this from those of the last search are a reason to search again."""
VALUE_BYTES = 4
"""Bytes of a value that is saved for the backward pass, at most."""
USABLE = 0.8
"""Share of the memory that is free after an update under 1F1B that a fused order may take for activations."""


StageKind = tuple[str, int, int]
"""Role, stage, kind of operation: what is measured together."""


@dataclass(frozen=True)
class Measurement:
    """Says how many seconds passes of micro-batches took in all."""

    seconds: float = 0.0
    tokens: int = 0
    count: int = 0

    def __add__(self, other: "Measurement") -> "Measurement":
        return Measurement(self.seconds + other.seconds, self.tokens + other.tokens, self.count + other.count)

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / self.tokens

    @property
    def seconds_per_micro_batch(self) -> float:
        return self.seconds / self.count


@dataclass(frozen=True)
class TrainedStep:
    """Says when this rank ran the passes of one optimiser step."""

    order: str
    events: list[Event]
    expected: list[Event]
    """Those of this rank's pipelines by the seconds measured before; none where nothing was measured."""


class StagedRoles:
    """Runs the roles of a run that have stages; none where its plan has no stages. All ranks make it, and call
    `learn`."""

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
        layouts = {name: assignment.layout for name, assignment in plan.assignments.items()}
        self.layouts = {name: layout for name, layout in layouts.items() if layout.pipeline > 1}
        trained = {(role_of(name), layout) for name, layout in self.layouts.items() if name.endswith("_train")}
        links = dict.fromkeys((role_of(name), layout) for name, layout in self.layouts.items())
        self.links = {
            key: connect(ranks, Pipelines.of(key[1], 0, (FORWARD, BACKWARD) if key in trained else (FORWARD,)))
            for key in links
        }
        self.measured: dict[StageKind, Measurement] = {}
        """Measurements of all ranks that orders are searched with."""
        self.spare = 0.0
        """Bytes that every rank has for activations beyond those of 1F1B."""
        self.newly_measured: dict[StageKind, Measurement] = {}
        """Measurements of this rank since the last `learn`."""
        self.trained: list[TrainedStep] = []
        """Steps of this rank since the last `learn`."""
        self.newest: TrainedStep | None = None
        self._orders: dict[tuple, tuple[str, Orders]] = {}
        self._to_say: list[str] = []
        """Lines that the next `learn` shows."""
        self._said: set[str] = set()

    def __contains__(self, call: str) -> bool:
        return call in self.layouts

    def score(self, call: str, work: ScoringWork) -> None:
        """Run the forward passes of a call, on a rank that takes part in it."""
        role, layout = role_of(call), self.layouts[call]
        roles = {role: Pipelines.of(layout, work.count, (FORWARD,))}
        execute(one_forward_one_backward(roles), self.ranks.rank, {role: work}, {role: self.links[role, layout]})

    def train(self, works: Mapping[str, TrainingWork], calls: Timeline) -> None:
        """Run the passes of the roles that this rank trains in stages, before an optimiser step of each. Their times
        are added to `calls`."""
        layouts = {role: self.layouts[f"{role}_train"] for role in works}
        roles = {role: Pipelines.of(layouts[role], work.count) for role, work in works.items()}
        tokens = {role: [sum(batch.lengths) for batch in work.batches] for role, work in works.items()}
        name, orders = self._order(roles)
        events: list[Event] = []
        execute(orders, self.ranks.rank, works, {role: self.links[role, layouts[role]] for role in works}, events)
        lines = [line for pipelines in roles.values() for line in pipelines.ranks if self.ranks.rank in line]
        ours = {rank for line in lines for rank in line}
        expected = self._timeline(orders, tokens) if self._is_measured(roles) else []
        self.newest = TrainedStep(name, events, [event for event in expected if event.rank in ours])
        self.trained.append(self.newest)
        for _, (role, kind, number), start, end in events:
            key = role, roles[role].stage(self.ranks.rank), kind
            before = self.newly_measured.get(key, Measurement())
            self.newly_measured[key] = before + Measurement(end - start, tokens[role][number], 1)
            calls.add(f"{role}_train", start, end)

    def learn(self) -> dict[str, float]:
        """Gather the measurements, with which the next orders are searched, and say what ranks have to say. Returns
        metrics of the iteration."""
        if not any(name.endswith("_train") for name in self.layouts):
            return {}
        achieved = sum(makespan(step.events) for step in self.trained)
        expected = sum(makespan(step.expected) for step in self.trained if step.expected)
        ours = self.newly_measured, (achieved, expected), free_memory(self.ranks), self._to_say
        of_ranks = self.ranks.gather(ours, "what stages took")
        self.newly_measured, self.trained, self._to_say = {}, [], []
        for text in dict.fromkeys(text for *_, texts in of_ranks for text in texts if text not in self._said):
            self._said.add(text)
            self.say(text)
        now: dict[StageKind, Measurement] = {}
        for measured, *_ in of_ranks:
            now |= {key: now.get(key, Measurement()) + measurement for key, measurement in measured.items()}
        if any(self._is_news(key, measurement.seconds_per_token) for key, measurement in now.items()):
            self.measured |= now
            self.spare = USABLE * min(spare for _, _, spare, _ in of_ranks)
            self._orders.clear()
        achieved, expected = max(seconds for _, seconds, *_ in of_ranks)
        metrics = {"pipeline/seconds": achieved, "pipeline/seconds_expected": expected}
        return metrics if expected else {"pipeline/seconds": achieved}

    def _is_news(self, key: StageKind, rate: float) -> bool:
        """Whether a rate, in seconds a token, differs from that of the last search by enough to search again."""
        before = self.measured.get(key, Measurement(0, 1)).seconds_per_token
        return abs(rate - before) > NEWS * rate

    def picture(self, begun: float) -> dict[str, Any] | None:
        """Return this rank's passes of the newest optimiser step in stages, achieved ones in seconds from `begun` on
        its clock; None where it has made none since."""
        if self.newest is None or self.newest.events[0].start < begun:
            return None

        def passes(events: Iterable[Event], begun: float) -> list[list[Any]]:
            return [[f"{role} {KINDS[kind]}", start - begun, end - begun] for _, (role, kind, _), start, end in events]

        ours = [event for event in self.newest.expected if event.rank == self.ranks.rank]
        achieved = passes(self.newest.events, begun)
        return {"order": self.newest.order, "achieved": achieved, "predicted": passes(ours, 0.0)}

    def _timeline(self, orders: Orders, tokens: Mapping[str, list[int]]) -> list[Event]:
        """Return when operations would run by the measurements, with micro-batches of so many tokens."""

        def seconds(rank: int, operation: Operation) -> float:
            role, kind, number = operation
            rate = self.measured[role, orders.roles[role].stage(rank), kind].seconds_per_token
            return rate * tokens[role][number]

        return timeline(orders, seconds)

    def _order(self, roles: Mapping[str, Pipelines]) -> tuple[str, Orders]:
        """Return the order of the passes, by name and in full: the same on all ranks, since all know what it follows
        from."""
        key = self.order, *((role, pipelines.micro_batches) for role, pipelines in roles.items())
        if key not in self._orders:
            self._orders[key] = self._chosen(roles)
        return self._orders[key]

    def _is_measured(self, roles: Mapping[str, Pipelines]) -> bool:
        """Whether passes of all stages have been measured: one role may start to learn later than the other."""
        stages = ((role, stage) for role, pipelines in roles.items() for stage in range(pipelines.stages))
        return all((role, stage, kind) in self.measured for role, stage in stages for kind in (FORWARD, BACKWARD))

    def _chosen(self, roles: Mapping[str, Pipelines]) -> tuple[str, Orders]:
        if self.order == "serial":
            return "serial", serial(roles)
        plain = one_forward_one_backward(roles)
        if self.order == "1f1b" or (self.order == "auto" and not self._is_measured(roles)):
            return "1f1b", plain
        try:
            devices(roles)
            problem = self._problem(roles)
        except CannotFuse as reason:
            self._to_say.append(f"PPO: training is not fused: {reason}")
            return "1f1b", plain
        schedule = find_schedule(problem, effort=QUICK).schedule
        under_1f1b, under_fusion = serial_1f1b(problem).makespan, schedule.makespan
        fuses = self.order == "fused" or under_fusion <= (1 - LEAST_GAIN) * under_1f1b
        if self._is_measured(roles):
            self._to_say.append(
                f"PPO: training of {' and '.join(roles)} is {'fused' if fuses else 'not fused'}: {under_fusion:.3g} s "
                f"of an optimiser step expected, {under_1f1b:.3g} s under 1F1B"
            )
        return ("fused", fused(roles, schedule)) if fuses else ("1f1b", plain)

    def _problem(self, roles: Mapping[str, Pipelines]) -> SchedulingProblem:
        """Return what the search is given: mean seconds and activations of micro-batches, and the room for these.
        Before all is measured a backward pass takes two forward ones, and no bound of the memory is known. Raises
        CannotFuse where there is no room."""
        both = []
        for role, pipelines in roles.items():
            layers = self.layouts[f"{role}_train"].runs(self.layers[role])
            forward, backward, tokens = tuple(map(float, layers)), tuple(2.0 * count for count in layers), 1.0
            if self._is_measured(roles):
                forward, backward = (
                    tuple(self.measured[role, stage, kind].seconds_per_micro_batch for stage in range(pipelines.stages))
                    for kind in (FORWARD, BACKWARD)
                )
                first = self.measured[role, 0, FORWARD]
                tokens = first.tokens / first.count
            activations = tuple(self.activations.get(role, 0.0) * VALUE_BYTES * tokens * count for count in layers)
            both.append(Pipeline(pipelines.stages, pipelines.micro_batches, forward, backward, activations))
        one, other = both
        boundless = SchedulingProblem(one, other)
        if not self._is_measured(roles):
            return boundless
        try:
            return replace(boundless, memory_cap=serial_1f1b(boundless).peak_memory + self.spare)
        except ValueError:
            raise CannotFuse("the memory has no room for a micro-batch of both at one time") from None


def free_memory(ranks: Ranks) -> float:
    """Return the bytes that this rank can still have."""
    if ranks.device.type == "cuda":
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return float(torch.cuda.mem_get_info()[0] + cached)
    import psutil  # DeepSpeed needs it too

    return psutil.virtual_memory().available / local_size()
