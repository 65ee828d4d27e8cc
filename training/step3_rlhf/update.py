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
from training.step3_rlhf.positions import CallPosition
from training.step3_rlhf.roles import Roles, response_values

Encoded = tuple[Tensor, Tensor]  # prompt ids, response ids: int64 (length) each


@dataclass(frozen=True)
class DrawnDemonstrations:
    """Holds the demonstrations of one optimiser step, over all ranks."""

    rows: list[Encoded]

    @property
    def lengths(self) -> list[int]:
        return [len(prompt) + len(response) for prompt, response in self.rows]

    @property
    def tokens(self) -> int:
        """Tokens of all responses."""
        return sum(len(response) for _, response in self.rows)

    def batch(self, micro_batch: MicroBatch, device: torch.device) -> TokenBatch:
        return TokenBatch.of([self.rows[row] for row in micro_batch.rows], device)


class Demonstrations:
    """Draws rows in epochs, each shuffled by (seed, epoch): no row comes again before all others have come."""

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

    def draw(self, first: int, count: int) -> DrawnDemonstrations:
        """Draw `count` rows from number `first` on, counted from 0 through all epochs."""
        return DrawnDemonstrations([self.rows[row] for row in self.order.rows(first, count)])


@dataclass(frozen=True)
class Batch:
    """Holds what one iteration learns from; every rank has all of it."""

    number: int
    """The number of the iteration."""
    experience: list[Experience]
    targets: Targets
    prompt_rows: list[int]
    """The rows of the samples' prompts in the data."""
    kl_coefficient: float


def learned_rows(experience: Sequence[Experience], settings: RLHFSettings) -> list[int]:
    """Return the rows that mini-batches are made of: all, or with rlhf.mask_truncated the samples that ended."""
    return [row for row, e in enumerate(experience) if e.ended or not settings.mask_truncated]


@dataclass(frozen=True)
class MiniBatch:
    """Holds what one optimiser step of each trained role sees, over all ranks."""

    batch: Batch
    rows: list[int]
    """Its samples, as rows of the batch."""
    update: int
    """Number of the optimiser step, counted from 0 through the run."""

    @property
    def lengths(self) -> list[int]:
        return [self.batch.experience[row].length for row in self.rows]

    @property
    def tokens(self) -> int:
        """Tokens of all responses."""
        return sum(len(self.batch.experience[row].response) for row in self.rows)

    def rows_of(self, micro_batch: MicroBatch) -> list[int]:
        """Return the micro-batch's samples as rows of the batch."""
        return [self.rows[i] for i in micro_batch.rows]

    def read(self, rows: list[int], device: torch.device) -> TokenBatch:
        """Return these samples as the models read them."""
        return token_batch([self.batch.experience[row] for row in rows], device)


@dataclass(frozen=True)
class MicroBatchLoss:
    """Holds the loss and the metrics of a micro-batch, scalars on the device."""

    name: str
    rows: list[int]
    """Its samples, as rows of the batch; empty for demonstrations."""
    weight: float
    total: Tensor
    sums: dict[str, Tensor]
    largest: dict[str, Tensor]


@dataclass(frozen=True)
class Statistics:
    """Holds the statistics of losses by the names of the metrics: sums over response tokens, and largest values."""

    sums: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    unread: list[MicroBatchLoss] = field(default_factory=list)

    def note(self, name: str, loss: ppo_math.Loss, micro_batch: MicroBatch, rows: list[int]) -> None:
        """Note the loss of a micro-batch; `read` counts it in."""
        sums = {name: value.detach().sum() for name, value in loss.sums.items()}
        largest = {name: value.detach().max() for name, value in loss.largest.items()}
        self.unread.append(MicroBatchLoss(name, rows, micro_batch.weight, loss.total.detach(), sums, largest))

    def read(self) -> list[MicroBatchLoss]:
        """Wait for the device once and count in all losses; returns those of samples that are not finite."""
        losses = list(self.unread)
        self.unread.clear()
        numbers = read_at_once([{"": loss.total, **loss.sums, **loss.largest} for loss in losses])
        not_finite = []
        for loss, values in zip(losses, numbers, strict=True):
            for name in loss.sums:
                self.sums[name] = self.sums.get(name, 0.0) + values[name] * loss.weight
            for name in loss.largest:
                self.largest[name] = max(self.largest.get(name, 0.0), values[name])
            if loss.rows and not math.isfinite(values[""]):
                not_finite.append(loss)
        return not_finite

    def means(self, tokens: int) -> dict[str, float]:
        """Return means over so many response tokens; the largest values as they are."""
        return {name: value / tokens for name, value in self.sums.items()} | self.largest


def pooled(parts: Sequence[Statistics]) -> Statistics:
    """Join those of ranks or mini-batches; each has the names of what it trained."""
    sums = dict.fromkeys(name for part in parts for name in part.sums)
    largest = dict.fromkeys(name for part in parts for name in part.largest)
    return Statistics(
        {name: sum(part.sums.get(name, 0.0) for part in parts) for name in sums},
        {name: max(part.largest.get(name, 0.0) for part in parts) for name in largest},
    )


@dataclass(frozen=True)
class Update:
    """Holds the metrics of an iteration's updates; none where no update was made."""

    metrics: dict[str, float] = field(default_factory=dict)
    mini_batches: list[dict[str, float]] = field(default_factory=list)
    """The metrics of the mini-batches."""


@dataclass(frozen=True)
class MiniBatchResult:
    """Holds the results of a mini-batch's updates: those of a rank, and then those of all ranks."""

    epoch: int
    index: int
    tokens: int
    statistics: Statistics = field(default_factory=Statistics)
    step: dict[str, float] = field(default_factory=dict)
    """The metrics of the optimiser steps themselves, by name."""

    @classmethod
    def together(cls, parts: Sequence["MiniBatchResult"]) -> "MiniBatchResult":
        """Join those of the ranks, in their order: ranks that train a role have the same of its steps."""
        step = {name: value for part in reversed(parts) for name, value in part.step.items()}
        first = parts[0]
        return cls(first.epoch, first.index, first.tokens, pooled([part.statistics for part in parts]), step)

    @property
    def metrics(self) -> dict[str, float]:
        means = self.statistics.means(self.tokens)
        return {"epoch": self.epoch, "mini_batch": self.index, **means, **self.step}


class Updates:
    """Makes the updates of a run. The losses themselves are in `ppo_math`."""

    def __init__(self, stage: Stage, roles: Roles, ptx: Demonstrations | None):
        self.stage, self.settings, self.ranks, self.roles = stage, stage.config.rlhf, stage.ranks, roles
        self.ptx = ptx
        self.calls = Timeline()
        """When this rank trained each role."""
        self.steps_together = stage.dtype == torch.float16 and self.settings.align_overflow
        """Whether all roles make an optimiser step, or none."""

    def run(self, batch: Batch, calls: Timeline | None = None) -> Update:
        """Run every PPO epoch: mini-batches of shuffled samples, an optimiser step of actor and critic on each.

        Ranks that train different roles go at their own pace, and tell each other in the end. With rlhf.ppo_kl_stop
        they do so after every mini-batch, and end before their time where one shows that the policy has left the old
        one so far. With rlhf.mask_truncated samples that did not end are in no mini-batch, and one that has no others
        makes no step.
        """
        self.calls = calls or Timeline()
        settings, stops = self.settings, self.settings.ppo_kl_stop > 0
        learned = learned_rows(batch.experience, settings)
        ours: list[MiniBatchResult] = []
        results: list[MiniBatchResult] = []
        for epoch, index in itertools.product(range(settings.ppo_epochs), range(settings.mini_batches)):
            order = list(learned)
            random.Random(f"{self.stage.seed}/samples/{batch.number}/{epoch}").shuffle(order)
            update = ((batch.number - 1) * settings.ppo_epochs + epoch) * settings.mini_batches + index
            mini_batch = MiniBatch(batch, order[index :: settings.mini_batches], update)
            if not mini_batch.rows:
                continue
            ours.append(self.mini_batch(mini_batch, MiniBatchResult(epoch, index, mini_batch.tokens)))
            if stops:
                results += self.gathered([ours.pop()])
                if settings.ppo_kl_stop < results[-1].metrics.get("kl/old_k3", 0.0):
                    break
        results += self.gathered(ours)
        of_stages = self.roles.staged.learn()
        mini_batches = [result.metrics for result in results]
        tokens = sum(result.tokens for result in results)
        metrics = pooled([result.statistics for result in results]).means(tokens) | of_stages
        metrics |= results[-1].step if results else {}
        metrics["update/mini_batches"] = len(results)
        if "kl/old_k3" in metrics:  # not in the critic's warm-up
            metrics["kl/old_k3_max"] = max(of_one["kl/old_k3"] for of_one in mini_batches)
        return Update(metrics, mini_batches)

    def gathered(self, ours: list[MiniBatchResult]) -> list[MiniBatchResult]:
        """Join this rank's results with those of the other ranks."""
        of_ranks = self.ranks.gather(ours, "what updates gave")
        return [MiniBatchResult.together(parts) for parts in zip(*of_ranks, strict=True)]

    def passes(self, mini_batch: MiniBatch, statistics: Statistics) -> dict[str, list[Pass]]:
        """Return this rank's passes, by role."""
        kinds = {"actor": self.actor_pass, "critic": self.critic_pass}
        if mini_batch.batch.number <= self.settings.critic_warmup:
            del kinds["actor"]
        passes: dict[str, list[Pass]] = {}
        for role, make in kinds.items():
            if (position := self.roles.positions.get(f"{role}_train")) is not None:
                micro_batches = position.micro_batches(mini_batch.lengths)
                passes[role] = [make(mini_batch, statistics, micro_batch) for micro_batch in micro_batches]
                if role == "actor" and self.ptx is not None:
                    passes[role] += self.ptx_passes(self.ptx, position, mini_batch, statistics)
        return passes

    def mini_batch(self, mini_batch: MiniBatch, result: MiniBatchResult) -> MiniBatchResult:
        """Make an optimiser step of each role that this rank trains, and add its metrics to `result`."""
        require_finite = partial(self.require_finite, result.statistics, mini_batch.batch)
        steps, stepped = self.step(self.passes(mini_batch, result.statistics), require_finite)
        if actor := steps.get("actor"):
            result.step.update({"policy/grad_norm": actor["grad_norm"], "policy/lr": actor["lr"]})
        if critic := steps.get("critic"):
            result.step.update({"value/grad_norm": critic["grad_norm"], "value/lr": critic["lr"]})
        finite = all(math.isfinite(step["grad_norm"]) for step in steps.values())
        if self.stage.dtype != torch.float16 and not finite:  # fp16 skips such steps by itself
            raise self.diverged("The gradient is not finite", mini_batch.batch, mini_batch.rows)
        if self.roles.ema is not None and stepped and "actor" in steps:
            self.roles.ema.update()
        return result

    def actor_pass(self, mini_batch: MiniBatch, statistics: Statistics, micro_batch: MicroBatch) -> Pass:
        """Return the pass of a micro-batch, whose loss is its share of the actor's mean loss."""
        settings, batch, rows = self.settings, mini_batch.batch, mini_batch.rows_of(micro_batch)
        lengths = [len(batch.experience[row].response) for row in rows]
        average, longest = mini_batch.tokens / len(mini_batch.rows), self.stage.config.data.max_response_tokens

        def loss_of(outputs: tuple[Tensor, Tensor], _: TokenBatch) -> Tensor:
            targets = batch.targets.of_tokens(rows, self.ranks.device)
            weights = ppo_math.token_weights(lengths, settings.loss_mean, average, longest)
            loss = ppo_math.actor_loss(
                *outputs,
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
        """Return the pass of a micro-batch, whose loss is its share of the critic's mean loss a token."""
        batch, rows = mini_batch.batch, mini_batch.rows_of(micro_batch)

        def loss_of(scores: Tensor, tokens: TokenBatch) -> Tensor:
            targets = batch.targets.of_tokens(rows, self.ranks.device)
            values = response_values(scores, tokens)
            loss = ppo_math.critic_loss(values, targets.values, targets.returns, self.settings.value_clip)
            statistics.note("The value loss", loss, micro_batch, rows)
            return loss.total / mini_batch.tokens

        return Pass(partial(mini_batch.read, rows, self.ranks.device), loss_of, micro_batch.weight)

    def ptx_pass(
        self, drawn: DrawnDemonstrations, mini_batch: MiniBatch, statistics: Statistics, micro_batch: MicroBatch
    ) -> Pass:
        """Return the pass of a micro-batch, whose loss is its share of the demonstrations' mean loss, weighted."""

        def loss_of(outputs: tuple[Tensor, Tensor], _: TokenBatch) -> Tensor:
            loss = ppo_math.ptx_loss(outputs[0], drawn.tokens, mini_batch.tokens)
            statistics.note("The loss of demonstrations", loss, micro_batch, [])
            return self.settings.ptx.coefficient * loss.total

        return Pass(partial(drawn.batch, micro_batch, self.ranks.device), loss_of, micro_batch.weight)

    def ptx_passes(
        self, ptx: Demonstrations, position: CallPosition, mini_batch: MiniBatch, statistics: Statistics
    ) -> list[Pass]:
        """Return this rank's passes over the demonstrations of an optimiser step."""
        drawn = ptx.draw(*self.demonstrations_of(mini_batch.update, len(mini_batch.batch.experience)))
        micro_batches = position.micro_batches(drawn.lengths)
        return [self.ptx_pass(drawn, mini_batch, statistics, micro_batch) for micro_batch in micro_batches]

    def demonstrations_of(self, update: int, samples: int) -> tuple[int, int]:
        """Return the number of an optimiser step's first demonstration, counted through all updates of the run, and how
        many it has: each step begins where the one before ends, also where `samples` do not divide evenly."""
        if self.settings.ptx.rows:
            return update * self.settings.ptx.rows, self.settings.ptx.rows
        epochs, index = divmod(update, self.settings.mini_batches)
        sizes = [len(range(first, samples, self.settings.mini_batches)) for first in range(index + 1)]
        return epochs * samples + sum(sizes[:-1]), sizes[-1]

    def step(
        self, passes: dict[str, list[Pass]], require_finite: Callable[[], None]
    ) -> tuple[dict[str, dict[str, float]], bool]:
        """Make an optimiser step of each role on the sum of its passes; returns their metrics, and whether they were
        made.

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
        for loss in statistics.read():
            raise self.diverged(f"{loss.name} is not a finite number", batch, loss.rows)

    def diverged(self, what: str, batch: Batch, rows: list[int]) -> Diverged:
        """Return the error that names the prompts of these samples."""
        return self.stage.diverged(batch.number, what, sorted({batch.prompt_rows[row] for row in rows}))
