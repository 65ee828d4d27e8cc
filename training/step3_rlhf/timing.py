"""Timing of an iteration, call by call, and what the cost model predicts of it."""

import resource
import statistics
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from inference.errors import UserError
from training.calls import Call
from training.distributed import local_size
from training.fusion.board import Span, Timeline
from training.metrics import WARNING
from training.plan import Plan
from training.planner.cost import CallCosts
from training.planner.hardware import Cluster, cluster_here
from training.planner.reallocation_cost import AugmentedGraphs, Node
from training.planner.table import Interval, IterationSchedule, list_schedule
from training.stage import Stage
from training.step3_rlhf.planned import graphs_of, shape_of


@dataclass(frozen=True)
class Forecast:
    """Predicts the iterations of a plan on the hardware here."""

    graphs: AugmentedGraphs
    plan: Plan

    @classmethod
    def of(
        cls,
        stage: Stage,
        plan: Plan,
        calls: tuple[Call, ...],
        actor: Path,
        scorer: Path | None,
        own: Path | None = None,
    ) -> "Forecast | None":
        """Make one for the models in these directories; `scorer` is reward model and critic, `own` a reference of one's
        own. None where no rates of this machine are known."""
        try:
            if (cluster := hardware_of(stage)) is None:
                return None
            shapes = shape_of(actor), None if scorer is None else shape_of(scorer)
            of_reference = shape_of(own) if own else None
        except UserError as error:  # nothing that training needs
            stage.display.say(f"{WARNING}iterations are not predicted: {error}")
            return None
        return cls(graphs_of(stage.config, calls, *shapes, stage.dtype, cluster, of_reference), plan)

    def schedule(
        self,
        prompts: Sequence[int],
        responses: Sequence[int],
        learned: Sequence[int] | None = None,
        left_out: Collection[str] = (),
    ) -> IterationSchedule:
        """Predict an iteration with prompts and responses of these lengths, in tokens, without the calls `left_out`.
        Only the samples `learned`, by index, are trained on; None: all."""
        nodes = self._nodes(prompts, responses)
        if learned is not None and len(learned) < len(prompts):
            lengths = ([of_all[i] for i in learned] for of_all in (prompts, responses))
            of_learned = self._nodes(*lengths) if learned else ()
            seconds = {call.name: 0.0 for call in self.graphs.graph.calls if call.kind == "train"}
            seconds |= {node.name: node.seconds for node in of_learned if node.name in seconds}
            nodes = [replace(node, seconds=seconds.get(node.name, node.seconds)) for node in nodes]
        return list_schedule([replace(n, seconds=0.0) if n.name in left_out else n for n in nodes], iterations=1)

    def _nodes(self, prompts: Sequence[int], responses: Sequence[int]) -> Sequence[Node]:
        """Return the nodes of an iteration with samples of these lengths."""
        workload = replace(
            self.graphs.costs.workload,
            samples=len(prompts),
            prompt_tokens=max(1, round(statistics.mean(prompts))),
            response_tokens=max(1, round(statistics.mean(responses))),
            longest_response=max(responses),
        )
        costs = CallCosts(workload, self.graphs.costs.cluster)
        return AugmentedGraphs(self.graphs.graph, costs).nodes(self.plan)


def hardware_of(stage: Stage) -> Cluster | None:
    """Return the ranks of a stage, as they were profiled or by the data sheet of their GPU; None where no rates are
    known, and where nodes have unlike numbers of ranks."""
    ranks, here = stage.ranks, local_size()
    if ranks.size % here:
        return None
    gpus = []
    if ranks.device.type == "cuda":
        properties = torch.cuda.get_device_properties(ranks.device)
        gpus = [(properties.name, properties.total_memory)]
    known = cluster_here(here, ranks.size // here, gpus)
    return None if known is None else known[0]


def predicted_seconds(schedule: IterationSchedule) -> dict[str, float]:
    """Return the seconds of each call, and of what is moved before calls, by its kind."""
    seconds: dict[str, float] = {}
    for interval in schedule.intervals:
        name = kind_of(interval)
        seconds[name] = seconds.get(name, 0.0) + interval.end - interval.start
    return seconds


def kind_of(interval: Interval) -> str:
    """Return a call's name, or the kind of another node."""
    return interval.node.name if interval.node.kind == "call" else interval.node.kind


def achieved_seconds(spans: Sequence[Sequence[Span]]) -> dict[str, float]:
    """Return the seconds of each call on the rank that took longest; `spans` are by rank."""
    longest: dict[str, float] = {}
    for of_rank in spans:
        seconds: dict[str, float] = {}
        for span in of_rank:
            seconds[span.kind] = seconds.get(span.kind, 0.0) + span.end - span.start
        longest |= {name: max(longest.get(name, 0.0), of_call) for name, of_call in seconds.items()}
    return longest


def metrics_of(schedule: IterationSchedule, spans: Sequence[Sequence[Span]], seconds: float) -> dict[str, float]:
    """Return `plan/CALL/predicted` and `plan/CALL/achieved`, also of the whole iteration, which took `seconds`."""
    predicted = predicted_seconds(schedule) | {"iteration": schedule.makespan}
    achieved = achieved_seconds(spans) | {"iteration": seconds}
    return {
        f"plan/{name}/{kind}": values[name]
        for name in predicted
        if name in achieved
        for kind, values in (("predicted", predicted), ("achieved", achieved))
    }


def beside(metrics: Mapping[str, float]) -> str:
    """Say what an iteration took, and what was predicted, where anything was; for its line of progress."""
    names = "plan/iteration/achieved", "plan/iteration/predicted"
    if names[0] not in metrics:
        return ""
    achieved, predicted = (metrics[name] for name in names)
    return f" · {achieved:.3g} s, predicted {predicted:.3g}"


def as_data(number: int, schedule: IterationSchedule | None, spans: Sequence[Sequence[Span]]) -> dict[str, Any]:
    """Return, for the picture, what each rank did in an iteration, and what was predicted; seconds from its start."""
    intervals = () if schedule is None else schedule.intervals
    return {
        "iteration": number,
        "achieved": [[[span.kind, span.start, span.end] for span in of_rank] for of_rank in spans],
        "predicted": [
            [[kind_of(i), i.start, i.end] for i in intervals if rank in i.node.ranks and i.end > i.start]
            for rank in range(len(spans))
        ],
    }


def update_data(of_ranks: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return the same of the newest optimiser step in pipeline stages, in seconds from its start; None without stages.

    `of_ranks` are by rank, as `StagedRoles.picture` gives them from the start of the iteration.
    """
    order = next((of_rank["order"] for of_rank in of_ranks if of_rank is not None), None)
    if order is None:
        return None
    data: dict[str, Any] = {"order": order}
    for name in ("achieved", "predicted"):
        passes = [[] if of_rank is None else of_rank[name] for of_rank in of_ranks]
        begun = min((start for of_rank in passes for _, start, _ in of_rank), default=0.0)
        data[name] = [[[kind, start - begun, end - begun] for kind, start, end in of_rank] for of_rank in passes]
    return data


class Clock:
    """Measures from when it is made; `seconds` are by phase, under the names of the metrics."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.timeline = Timeline()
        self.calls = Timeline()
        """The model function calls, by their names."""

    @contextmanager
    def phase(self, metric: str) -> Iterator[None]:
        """Count the seconds inside; a phase that is entered again adds to them."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[metric] = self.seconds.get(metric, 0.0) + time.perf_counter() - begun

    def elapsed(self) -> float:
        """Return the seconds since it was made."""
        return time.perf_counter() - self.begun

    def metrics(self, tokens: int, device: torch.device) -> dict[str, float]:
        """Return the seconds by phase, `tokens` generated a second, and this process's peak memory."""
        seconds = self.elapsed()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        return {
            **self.seconds,
            "time/other": seconds - sum(self.seconds.values()),
            "tokens_per_second": tokens / seconds,
            "memory/peak_gb": peak / 1e9,
        }
