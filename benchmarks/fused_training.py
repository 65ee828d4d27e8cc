"""Actor and critic in pipeline stages on two processes: serial, 1F1B and fused orders in turn, predicted and achieved.

    python -m benchmarks.fused_training --size m --lengths skew --rounds 7
    python -m benchmarks.fused_training --size m --lengths fixed --picture update.svg

Two processes with one core each; models, prompts and forced lengths of `work.py`, fp32, forward and backward passes of
one optimiser step, in micro-batches of one row each. The first rounds of 1F1B say how many seconds each operation
takes; the schedule is searched with them, and every order's seconds are predicted. `own share` is what a round takes
longer than its own operations would in its order: messages and the executor. `kept` is what a rank keeps for backward
passes at its fullest, against what its order says, each micro-batch as large as it is alone. Ends with 1 where a target
is missed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import work
from benchmarks.work import LENGTHS, MINI_BATCHES, SAMPLES, SIZES
from training.hybrid_engine.layout import Layout
from training.pictures import PASS_COLOURS, Bar, Panel, gantt_svg
from training.pipelines.orders import (
    Event,
    Operation,
    Orders,
    Pipelines,
    fused,
    makespan,
    one_forward_one_backward,
    serial,
    timeline,
)
from training.planner.schedules.best import QUICK, find_schedule
from training.planner.schedules.problem import BACKWARD, FORWARD, KINDS, Pipeline, SchedulingProblem

if TYPE_CHECKING:
    from training.distributed import Ranks
    from training.pipelines.executor import Links

ROLES = ("actor", "critic")
MESHES = {"actor": (0, 1), "critic": (1, 0)}
PROFILED = 3
"""Rounds of 1F1B that give the seconds; the one before them warms up."""
GAIN, PREDICTED, OWN, KEPT = 0.8, 0.10, 0.05, 1.05
"""Targets: share of the promised gain over 1F1B that is achieved, error of predictions, own share, memory of
activations over that of the order."""
Seconds = Mapping[tuple[int, Operation], float]
"""By rank and operation."""


class Training:
    """The engines of this rank's stages, and what they do in one optimiser step."""

    def __init__(self, ranks: "Ranks", size: str, lengths: str, layers: dict[str, tuple[int, ...]]):
        from transformers import OPTForCausalLM, OPTForSequenceClassification

        from training.models.policy import Policy, Scorer
        from training.pipelines.executor import connect
        from training.pipelines.stage_engine import Pass, StageEngine
        from training.pipelines.stage_model import keep_stage
        from training.role_settings import OptimizerSettings

        self.ranks = ranks
        directories = work.models(size)
        rows = rows_of(lengths)
        self.roles: dict[str, Pipelines] = {}
        self.links: dict[str, Links] = {}
        self.engines: dict[str, Any] = {}
        self.passes: dict[str, list[Pass]] = {}
        alone = [ranks.part([rank]) for rank in range(ranks.size)][ranks.rank]
        assert alone is not None
        for role in ROLES:
            layout = Layout(MESHES[role], pipeline=2, layers=layers[role])
            self.roles[role] = Pipelines.of(layout, len(rows))
            self.links[role] = connect(ranks, self.roles[role])
            cut = layout.stage_cut(ranks.rank, SIZES[size].layers)
            model: Any
            if role == "actor":
                model = Policy(OPTForCausalLM.from_pretrained(directories.actor))
            else:
                model = Scorer(OPTForSequenceClassification.from_pretrained(directories.reward))
            keep_stage(model.model, cut)
            loss = actor_loss if role == "actor" else critic_loss
            self.passes[role] = [Pass(partial(batch_of, row), loss) for row in rows]
            settings = OptimizerSettings(learning_rate=work.LEARNING_RATE)
            self.engines[role] = StageEngine(model, settings, torch.float32, 100, alone, ranks, cut)

    def kept(self, orders: Orders) -> float:
        """The most that a rank keeps for backward passes, over what its order says; of the rank where that is most."""
        alone, woven = self._watched(serial(self.roles)), self._watched(orders)
        alive = due = 0
        for kind, micro_batch in ((op.kind, (op.role, op.micro_batch)) for op in orders.by_rank[self.ranks.rank]):
            alive += alone.of[micro_batch] if kind == FORWARD else -alone.of[micro_batch]
            due = max(due, alive)
        return max(self.ranks.gather(woven.most / due))

    def _watched(self, orders: Orders) -> "Kept":
        kept = Kept({p.untyped_storage().data_ptr() for e in self.engines.values() for p in e.module.parameters()})
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: Saved(tensor, kept), lambda saved: saved.tensor):
            self.round(orders, kept)
        return kept

    def round(self, orders: Orders, kept: "Kept | None" = None) -> list[Event]:
        """What all ranks did, of one optimiser step."""
        from training.pipelines.executor import execute

        works: dict[str, Any] = {role: engine.work(self.passes[role]) for role, engine in self.engines.items()}
        for role, work_of_role in works.items() if kept is not None else ():
            work_of_role.forward = partial(kept.forward, role, work_of_role.forward)
        events: list[Event] = []
        self.ranks.barrier()
        execute(orders, self.ranks.rank, works, self.links, events)
        for engine in self.engines.values():
            engine.step()
        return [event for of_rank in self.ranks.gather(events) for event in of_rank]


class Kept:
    """Bytes that a rank's forward passes keep for backward passes; weights are not counted."""

    def __init__(self, weights: set[int]):
        self.holders: dict[int, int] = dict.fromkeys(weights, 1)
        """By the address of a storage."""
        self.alive = self.most = 0
        self.of: dict[tuple[str, int], int] = {}
        """By role and micro-batch."""

    def forward(self, role: str, forward: Any, micro_batch: int, received: torch.Tensor | None) -> torch.Tensor | None:
        before, result = self.alive, forward(micro_batch, received)
        self.of[role, micro_batch] = self.alive - before
        return result

    def count(self, storage: torch.UntypedStorage, change: int) -> None:
        key = storage.data_ptr()
        self.holders[key] = self.holders.get(key, 0) + change
        if self.holders[key] == max(0, change):  # the first one came, or the last one went
            self.alive += change * storage.nbytes()
            self.most = max(self.most, self.alive)


class Saved:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: torch.Tensor, kept: Kept):
        self.tensor, self.kept = tensor, kept
        kept.count(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.kept.count(self.tensor.untyped_storage(), -1)


def rows_of(lengths: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Prompt and response ids of the samples of a mini-batch, the longest first as micro-batches are dealt."""
    generator = torch.Generator().manual_seed(work.SEED)
    prompts, samples = work.prompts(1), SAMPLES // MINI_BATCHES
    each = zip(prompts, LENGTHS[lengths].of(0), strict=True)
    rows = [(prompt, torch.randint(5, work.VOCABULARY_SIZE, (length,), generator=generator)) for prompt, length in each]
    return sorted(rows[:samples], key=lambda row: -len(row[1]))


def batch_of(row: tuple[torch.Tensor, torch.Tensor]) -> Any:
    from training.data.batching import TokenBatch

    return TokenBatch.of([row], torch.device("cpu"))


def actor_loss(said: Any, batch: Any) -> torch.Tensor:
    return -said[0].mean()


def critic_loss(said: torch.Tensor, batch: Any) -> torch.Tensor:
    return said.square().mean()


def medians(rounds: list[list[Event]]) -> Seconds:
    found: dict[tuple[int, Operation], list[float]] = {}
    for events in rounds:
        for event in events:
            found.setdefault((event.rank, event.operation), []).append(event.end - event.start)
    return {key: statistics.median(each) for key, each in found.items()}


def predicted(orders: Orders, seconds: Seconds) -> list[Event]:
    return timeline(orders, lambda rank, operation: seconds[rank, operation])


def problem_of(roles: Mapping[str, Pipelines], seconds: Seconds) -> SchedulingProblem:
    """Of mean seconds over the micro-batches; activations are counted, for memory does not bind here."""

    def mean(role: str, rank: int, kind: int) -> float:
        return statistics.mean(each for (on, op), each in seconds.items() if (on, *op[:2]) == (rank, role, kind))

    def pipeline(role: str) -> Pipeline:
        ranks = roles[role].ranks[0]
        forward, backward = (tuple(mean(role, rank, kind) for rank in ranks) for kind in (FORWARD, BACKWARD))
        return Pipeline(len(ranks), roles[role].micro_batches, forward, backward, 1.0)

    return SchedulingProblem(pipeline("actor"), pipeline("critic"))


@dataclass(frozen=True)
class Measured:
    orders: dict[str, Orders]
    seconds: Seconds
    """Before the rounds."""
    rounds: dict[str, list[list[Event]]]
    kept: dict[str, float]
    """Activations, over those of the order."""

    @classmethod
    def of(cls, training: Training, rounds: int) -> "Measured":
        """Of all orders in turn."""
        roles = training.roles
        orders = {"serial": serial(roles), "1f1b": one_forward_one_backward(roles)}
        seconds = medians([training.round(orders["1f1b"]) for _ in range(PROFILED + 1)][1:])
        orders["fused"] = fused(roles, find_schedule(problem_of(roles, seconds), effort=QUICK).schedule)
        done: dict[str, list[list[Event]]] = {name: [] for name in orders}
        for number in range(rounds):
            for name in list(orders)[number % 3 :] + list(orders)[: number % 3]:
                done[name].append(training.round(orders[name]))
        return cls(orders, seconds, done, {name: training.kept(each) for name, each in orders.items()})

    def figures(self) -> dict[str, dict[str, Any]]:
        """By order."""
        found = {}
        for name, rounds in self.rounds.items():
            orders = self.orders[name]
            walls = [makespan(events) for events in rounds]
            without = [makespan(predicted(orders, medians([events]))) for events in rounds]
            found[name] = {
                "predicted": makespan(predicted(orders, self.seconds)),
                "walls": walls,
                "own": [wall / each - 1 for wall, each in zip(walls, without, strict=True)],
                "busy": [busiest(events) / wall for wall, events in zip(walls, rounds, strict=True)],
                "kept": self.kept[name],
            }
        return found

    def picture(self) -> str:
        """The last round of each order above its prediction."""
        panels = [
            panel(f"{name}, {said}: {makespan(events):.2f} s", events)
            for name, orders in self.orders.items()
            for said, events in (("measured", self.rounds[name][-1]), ("predicted", predicted(orders, self.seconds)))
        ]
        return gantt_svg(panels, PASS_COLOURS)


def run_rank(size: str, lengths: str, rounds: int, layers: dict[str, tuple[int, ...]], picture: Path | None) -> None:
    """The first rank prints what all have found."""
    from training.distributed import start_ranks, stop_ranks

    ranks = start_ranks(1)
    measured = Measured.of(Training(ranks, size, lengths, layers), rounds)
    if ranks.is_first:
        print("FOUND " + json.dumps(measured.figures()))
        if picture is not None:
            picture.write_text(measured.picture())
    stop_ranks()


def busiest(events: list[Event]) -> float:
    """Seconds of operations on the rank that has most."""
    return max(sum(each.end - each.start for each in events if each.rank == rank) for rank in range(2))


def panel(title: str, events: list[Event]) -> Panel:
    begun = min(event.start for event in events)
    return Panel(
        title,
        {
            f"rank {rank}": [
                Bar(
                    f"{each.operation.role} {KINDS[each.operation.kind]}",
                    each.start - begun,
                    each.end - begun,
                    str(each.operation),
                )
                for each in events
                if each.rank == rank
            ]
            for rank in range(2)
        },
    )


def report(found: dict[str, dict[str, Any]]) -> bool:
    """Print it; whether no target is missed."""
    met = True
    print("  order  predicted  achieved  error  own share  busiest rank   kept")
    for name, each in found.items():
        wall = statistics.median(each["walls"])
        error, own = wall / each["predicted"] - 1, statistics.median(each["own"])
        busy = statistics.median(each["busy"])
        seconds = f"{each['predicted']:7.3f} s  {wall:6.3f} s  {error:+5.1%}"
        print(f"{name:>7}  {seconds}  {own:9.1%}  {busy:12.1%}  {each['kept']:5.3f}")
        met = met and abs(error) <= PREDICTED and own <= OWN and each["kept"] <= KEPT
    one, both = found["1f1b"], found["fused"]
    promised = one["predicted"] / both["predicted"] - 1
    ratios = [a / b for a, b in zip(one["walls"], both["walls"], strict=True)]
    achieved = statistics.median(ratios) - 1
    print(
        f"fused is {1 + achieved:.3f} times as fast as 1f1b ({min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} "
        f"rounds), promised {1 + promised:.3f}: {achieved / promised:.0%} of the gain (target {GAIN:.0%})"
    )
    return met and achieved >= GAIN * promised


def layers_of(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split(","))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="m")
    parser.add_argument("--lengths", choices=list(LENGTHS), default="skew")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--actor-layers", type=layers_of, default=(), help="of its two stages, as 5,3")
    parser.add_argument("--critic-layers", type=layers_of, default=(), help="of its two stages")
    parser.add_argument("--picture", type=Path, help="draw the last round of each order and its prediction")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        layers = {"actor": given.actor_layers, "critic": given.critic_layers}
        run_rank(given.size, given.lengths, given.rounds, layers, given.picture)
        return 0
    work.models(given.size)  # built once, before ranks read them
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "benchmarks.fused_training", *sys.argv[1:], "--rank"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not found:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    return 0 if report(json.loads(found[0].removeprefix("FOUND "))) else 1


if __name__ == "__main__":
    sys.exit(main())
