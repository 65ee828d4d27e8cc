"""The updates of one iteration: mini-batches of its samples, an optimiser step of each trained role on each of them."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from inference.chat_format import ChatFormat
from training.data.batching import MicroBatch, TokenBatch
from training.data.prepare import demonstrations
from training.data.rows import DEMONSTRATIONS_FILE, Epochs
from training.fusion.board import Timeline
from training.hybrid_engine.zero_engine import step_together
from training.pipelines.stage_engine import Pass, StageEngine
from training.rlhf_settings import RLHFSettings
from training.stage import Diverged, Stage, read_at_once
from training.step3_rlhf import ppo_math
from training.step3_rlhf.experience import Experience, Targets, token_batch
from training.step3_rlhf.places import CallPlace
from training.step3_rlhf.roles import Roles, response_values

Encoded = tuple[Tensor, Tensor]  # prompt ids, response ids: int64 (length) each


@dataclass(frozen=True)
class Drawn:
    """The demonstrations of one optimiser step, over all ranks."""

    rows: list[Encoded]

    @property
    def lengths(self) -> list[int]:
        return [len(prompt) + len(response) for prompt, response in self.rows]

    @property
    def tokens(self) -> int:
        """Of all responses."""
        return sum(len(response) for _, response in self.rows)

    def batch(self, micro_batch: MicroBatch, device: torch.device) -> TokenBatch:
        return TokenBatch.of([self.rows[row] for row in micro_batch.rows], device)


class Demonstrations:
    """Rows in epochs, each shuffled by (seed, epoch): no row comes again before all others have come."""

    def __init__(self, stage: Stage, chat_format: ChatFormat):
        data = stage.config.data
        stage.ranks.see(stage.run.data / DEMONSTRATIONS_FILE)
        self.rows: list[Encoded] = [
            (
                torch.tensor(chat_format.prompt_ids(row["prompt"], data.max_prompt_tokens)),
                torch.tensor(chat_format.response_ids(row["response"], data.max_response_tokens)),
            )
            for row in demonstrations(stage.config, stage.run.data, chat_format)
        ]
        self.order = Epochs(len(self.rows), f"{stage.seed}/demonstrations")

    def draw(self, first: int, count: int) -> Drawn:
        """`count` rows from place `first` on, counted from 0 through all epochs."""
        return Drawn([self.rows[row] for row in self.order.rows(first, count)])


@dataclass(frozen=True)
class Batch:
    """What one iteration learns from; every rank has all of it."""

    number: int
    """Of the iteration."""
    experience: list[Experience]
    targets: Targets
    seats: list[int]
    """Places in the data of the samples' prompts."""
    kl_coefficient: float


def learned_rows(experience: Sequence[Experience], settings: RLHFSettings) -> list[int]:
    """Places of the samples that mini-batches are cut from: all, or with rlhf.mask_truncated those that ended."""
    return [row for row, each in enumerate(experience) if each.ended or not settings.mask_truncated]


@dataclass(frozen=True)
class MiniBatch:
    """What one optimiser step of each trained role sees, over all ranks."""

    batch: Batch
    rows: list[int]
    """Its samples, by their places in the batch."""
    update: int
    """Number of the optimiser step, counted from 0 through the run."""

    @property
    def lengths(self) -> list[int]:
        return [self.batch.experience[row].length for row in self.rows]

    @property
    def tokens(self) -> int:
        """Of all responses."""
        return sum(len(self.batch.experience[row].response) for row in self.rows)

    def rows_of(self, micro_batch: MicroBatch) -> list[int]:
        """Its samples' places in the batch."""
        return [self.rows[i] for i in micro_batch.rows]

    def read(self, rows: list[int], device: torch.device) -> TokenBatch:
        """What the models read of these samples."""
        return token_batch([self.batch.experience[row] for row in rows], device)


@dataclass(frozen=True)
class Noted:
    """What a micro-batch gave, scalars on the device."""

    loss: str
    rows: list[int]
    """Its samples' places in the batch; empty for demonstrations."""
    weight: float
    total: Tensor
    sums: dict[str, Tensor]
    largest: dict[str, Tensor]


@dataclass(frozen=True)
class Statistics:
    """Of losses, by the names of the metrics: sums over response tokens, and largest values."""

    sums: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    noted: list[Noted] = field(default_factory=list)
    """Not read yet."""

    def note(self, name: str, loss: ppo_math.Loss, micro_batch: MicroBatch, rows: list[int]) -> None:
        """Those of a micro-batch; `read` counts them in."""
        sums = {name: value.detach().sum() for name, value in loss.sums.items()}
        largest = {name: value.detach().max() for name, value in loss.largest.items()}
        self.noted.append(Noted(name, rows, micro_batch.weight, loss.total.detach(), sums, largest))

    def read(self) -> list[Noted]:
        """Wait for the device once and count in all that was noted; those of samples whose loss is not finite."""
        noted = list(self.noted)
        self.noted.clear()
        found = read_at_once([{"": each.total, **each.sums, **each.largest} for each in noted])
        for each, values in zip(noted, found, strict=True):
            for name in each.sums:
                self.sums[name] = self.sums.get(name, 0.0) + values[name] * each.weight
            for name in each.largest:
                self.largest[name] = max(self.largest.get(name, 0.0), values[name])
        return [each for each, values in zip(noted, found, strict=True) if each.rows and not math.isfinite(values[""])]

    def means(self, tokens: int) -> dict[str, float]:
        """A response token, of so many; the largest values as they are."""
        return {name: value / tokens for name, value in self.sums.items()} | self.largest


def pooled(parts: Sequence[Statistics]) -> Statistics:
    """Of ranks or mini-batches; each has the names of what it trained."""
    sums = dict.fromkeys(name for part in parts for name in part.sums)
    largest = dict.fromkeys(name for part in parts for name in part.largest)
    return Statistics(
        {name: sum(part.sums.get(name, 0.0) for part in parts) for name in sums},
        {name: max(part.largest.get(name, 0.0) for part in parts) for name in largest},
    )


@dataclass(frozen=True)
class Update:
    """What the updates of an iteration gave; nothing where there were none."""

    metrics: dict[str, float] = field(default_factory=dict)
    mini_batches: list[dict[str, float]] = field(default_factory=list)
    """The metrics of each one."""


@dataclass(frozen=True)
class Done:
    """What is known of a mini-batch after its updates: on a rank, and then of all of them."""

    epoch: int
    place: int
    tokens: int
    statistics: Statistics = field(default_factory=Statistics)
    step: dict[str, float] = field(default_factory=dict)
    """What the optimiser steps themselves gave, by the names of the metrics."""

    @classmethod
    def together(cls, parts: Sequence["Done"]) -> "Done":
        """Of the ranks, in their order: those that train a role say the same of its steps."""
        step = {name: value for part in reversed(parts) for name, value in part.step.items()}
        first = parts[0]
        return cls(first.epoch, first.place, first.tokens, pooled([part.statistics for part in parts]), step)

    @property
    def row(self) -> dict[str, float]:
        return {
            "epoch": self.epoch,
            "mini_batch": self.place,
            **self.statistics.means(self.tokens),
            **self.step,
        }


class Updates:
    """Those of a run. The losses themselves are in `ppo_math`."""

    def __init__(self, stage: Stage, roles: Roles, ptx: Demonstrations | None):
        self.stage, self.settings, self.ranks, self.roles = stage, stage.config.rlhf, stage.ranks, roles
        self.ptx = ptx
        self.calls = Timeline()
        """When this rank trained each role."""
        self.steps_together = stage.dtype == torch.float16 and self.settings.align_overflow
        """Whether all roles make an optimiser step, or none."""

    def run(self, batch: Batch, calls: Timeline | None = None) -> Update:
        """Every PPO epoch: mini-batches of shuffled samples, an optimiser step of actor and critic on each.

        Ranks that train different roles go at their own pace, and tell each other in the end. With rlhf.ppo_kl_stop
        they do so after every mini-batch, and end before their time where one shows that the policy has left the old
        one so far. With rlhf.mask_truncated samples that did not end are in no mini-batch, and one that has no others
        makes no step.
        """
        self.calls = calls or Timeline()
        settings, stops = self.settings, self.settings.ppo_kl_stop > 0
        learned = learned_rows(batch.experience, settings)
        ours: list[Done] = []
        done: list[Done] = []
        for epoch, place in itertools.product(range(settings.ppo_epochs), range(settings.mini_batches)):
            order = list(learned)
            random.Random(f"{self.stage.seed}/samples/{batch.number}/{epoch}").shuffle(order)
            update = ((batch.number - 1) * settings.ppo_epochs + epoch) * settings.mini_batches + place
            mini_batch = MiniBatch(batch, order[place :: settings.mini_batches], update)
            if not mini_batch.rows:
                continue
            ours.append(self.mini_batch(mini_batch, Done(epoch, place, mini_batch.tokens)))
            if stops:
                done += self.told([ours.pop()])
                if settings.ppo_kl_stop < done[-1].row.get("kl/old_k3", 0.0):
                    break
        done += self.told(ours)
        of_stages = self.roles.staged.learn()
        rows = [each.row for each in done]
        tokens = sum(each.tokens for each in done)
        metrics = pooled([each.statistics for each in done]).means(tokens) | of_stages
        metrics |= done[-1].step if done else {}
        metrics["update/mini_batches"] = len(done)
        if "kl/old_k3" in metrics:  # not in the critic's warm-up
            metrics["kl/old_k3_max"] = max(row["kl/old_k3"] for row in rows)
        return Update(metrics, rows)

    def told(self, ours: list[Done]) -> list[Done]:
        """Mini-batches as all ranks together know them; each tells what it has found."""
        return [Done.together(parts) for parts in zip(*self.ranks.gather(ours, "what updates gave"), strict=True)]

    def passes(self, mini_batch: MiniBatch, statistics: Statistics) -> dict[str, list[Pass]]:
        """This rank's, by role."""
        kinds = {"actor": self.actor_pass, "critic": self.critic_pass}
        if mini_batch.batch.number <= self.settings.critic_warmup:
            del kinds["actor"]
        passes: dict[str, list[Pass]] = {}
        for role, make in kinds.items():
            if (place := self.roles.places.get(f"{role}_train")) is not None:
                passes[role] = [make(mini_batch, statistics, each) for each in place.micro_batches(mini_batch.lengths)]
                if role == "actor" and self.ptx is not None:
                    passes[role] += self.ptx_passes(self.ptx, place, mini_batch, statistics)
        return passes

    def mini_batch(self, mini_batch: MiniBatch, done: Done) -> Done:
        """One optimiser step of each role that this rank trains, noted in `done`."""
        require_finite = partial(self.require_finite, done.statistics, mini_batch.batch)
        steps, stepped = self.step(self.passes(mini_batch, done.statistics), require_finite)
        found = done.step
        if actor := steps.get("actor"):
            found |= {"policy/grad_norm": actor["grad_norm"], "policy/lr": actor["lr"]}
        if critic := steps.get("critic"):
            found |= {"value/grad_norm": critic["grad_norm"], "value/lr": critic["lr"]}
        finite = all(math.isfinite(step["grad_norm"]) for step in steps.values())
        if self.stage.dtype != torch.float16 and not finite:  # fp16 skips such steps by itself
            raise self.diverged("The gradient is not finite", mini_batch.batch, mini_batch.rows)
        if self.roles.ema is not None and stepped and "actor" in steps:
            self.roles.ema.update()
        return done

    def actor_pass(self, mini_batch: MiniBatch, statistics: Statistics, micro_batch: MicroBatch) -> Pass:
        """A micro-batch's share of the actor's mean loss."""
        settings, batch, rows = self.settings, mini_batch.batch, mini_batch.rows_of(micro_batch)
        lengths = [len(batch.experience[row].response) for row in rows]
        average, longest = mini_batch.tokens / len(mini_batch.rows), self.stage.config.data.max_response_tokens

        def loss_of(said: tuple[Tensor, Tensor], _: TokenBatch) -> Tensor:
            targets = batch.targets.of_tokens(rows, self.ranks.device)
            weights = ppo_math.token_weights(lengths, settings.loss_mean, average, longest)
            loss = ppo_math.actor_loss(
                *said,
                targets.logprobs,
                targets.reference_logprobs,
                targets.advantages,
                weights.to(self.ranks.device, non_blocking=True),
                settings.clip,
                settings.clip_high or settings.clip,
                batch.kl_coefficient if settings.kl_in_loss else None,
                lengths if settings.ratio == "sequence" else None,
            )
            statistics.note("The policy loss", loss, micro_batch, rows)
            return loss.total / mini_batch.tokens

        read = partial(mini_batch.read, rows, self.ranks.device)
        return Pass(read, loss_of, micro_batch.weight, (settings.temperature,))

    def critic_pass(self, mini_batch: MiniBatch, statistics: Statistics, micro_batch: MicroBatch) -> Pass:
        """A micro-batch's share of the critic's mean loss a token."""
        batch, rows = mini_batch.batch, mini_batch.rows_of(micro_batch)

        def loss_of(scores: Tensor, tokens: TokenBatch) -> Tensor:
            targets = batch.targets.of_tokens(rows, self.ranks.device)
            values = response_values(scores, tokens)
            loss = ppo_math.critic_loss(values, targets.values, targets.returns, self.settings.value_clip)
            statistics.note("The value loss", loss, micro_batch, rows)
            return loss.total / mini_batch.tokens

        return Pass(partial(mini_batch.read, rows, self.ranks.device), loss_of, micro_batch.weight)

    def ptx_pass(self, drawn: Drawn, mini_batch: MiniBatch, statistics: Statistics, micro_batch: MicroBatch) -> Pass:
        """A micro-batch's share of the mean loss of the demonstrations, weighed."""

        def loss_of(said: tuple[Tensor, Tensor], _: TokenBatch) -> Tensor:
            loss = ppo_math.ptx_loss(said[0], drawn.tokens, mini_batch.tokens)
            statistics.note("The loss of demonstrations", loss, micro_batch, [])
            return self.settings.ptx.coefficient * loss.total

        return Pass(partial(drawn.batch, micro_batch, self.ranks.device), loss_of, micro_batch.weight)

    def ptx_passes(
        self, ptx: Demonstrations, place: CallPlace, mini_batch: MiniBatch, statistics: Statistics
    ) -> list[Pass]:
        """This rank's, over the demonstrations of an optimiser step."""
        drawn = ptx.draw(*self.demonstrations_of(mini_batch.update, len(mini_batch.batch.experience)))
        return [self.ptx_pass(drawn, mini_batch, statistics, each) for each in place.micro_batches(drawn.lengths)]

    def demonstrations_of(self, update: int, samples: int) -> tuple[int, int]:
        """Where those of an optimiser step begin, counted through all updates of the run, and how many they are: each
        begins where the one before ends, also where `samples` do not divide evenly."""
        if self.settings.ptx.rows:
            return update * self.settings.ptx.rows, self.settings.ptx.rows
        passes, place = divmod(update, self.settings.mini_batches)
        sizes = [len(range(each, samples, self.settings.mini_batches)) for each in range(place + 1)]
        return passes * samples + sum(sizes[:-1]), sizes[-1]

    def step(
        self, passes: dict[str, list[Pass]], require_finite: Callable[[], None]
    ) -> tuple[dict[str, dict[str, float]], bool]:
        """An optimiser step of each role on the sum of its passes: what each gave, and whether it was made.

        `require_finite` looks at the losses before weights change. In fp16 with rlhf.align_overflow all roles step, or
        none.
        """
        engines = {role: self.roles.critic if role == "critic" else self.roles.actor for role in passes}
        staged = {role: engine for role, engine in engines.items() if isinstance(engine, StageEngine)}
        if staged:
            works = {role: engine.work(passes[role]) for role, engine in staged.items()}
            self.roles.staged.train(works, self.calls)
        steps: Any = {}
        for role, engine in engines.items():
            with self.calls.span(f"{role}_train"):
                if role not in staged:
                    engine.accumulate(passes[role], partial(Pass.of_whole, model=engine))
                require_finite()
                if not self.steps_together:
                    steps[role] = engine.step()
        if not self.steps_together:
            return steps, True
        steps, stepped = step_together(list(engines.values()), self.ranks)
        return dict(zip(engines, steps, strict=True)), stepped

    def require_finite(self, statistics: Statistics, batch: Batch) -> None:
        for each in statistics.read():
            raise self.diverged(f"{each.loss} is not a finite number", batch, each.rows)

    def diverged(self, what: str, batch: Batch, rows: list[int]) -> Diverged:
        """Of samples of an iteration: their prompts' rows are named."""
        return self.stage.diverged(batch.number, what, sorted({batch.seats[row] for row in rows}))
