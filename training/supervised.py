"""The loop of steps 1 and 2: epochs of shuffled rows, one optimiser step a batch, evaluation, checkpoints, resume."""

import math
import random
import time
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from training.checkpoints import Best
from training.config import StepSettings
from training.data.batching import MicroBatch, plan_micro_batches
from training.data.rows import Epochs, count_updates, updates_per_epoch
from training.evaluation.statistics import DOUBTFUL_ACCURACY
from training.hybrid_engine.stored_weights import WeightsBackup
from training.hybrid_engine.zero_engine import ZeroEngine
from training.launchers import processes_option
from training.metrics import WARNING, held_out_line
from training.stage import Stage, read_at_once
from training.steps import Step


class Task(Protocol):
    """What differs between supervised fine-tuning, the reward model and DPO."""

    name: str
    engine: ZeroEngine
    lengths: list[int]  # tokens that each training row takes in a forward pass

    def file_index(self, row: int) -> int:
        """Return the index in its file of a training row, from 0: rows that cannot be learned from may be left out."""
        ...

    def look_ahead(self, number: int, batch: list[int]) -> None:
        """Find out, with the weights as they are, what optimiser step `number` (from 1) needs of its whole batch."""
        return

    def size(self, rows: list[int]) -> int:
        """Count the units (tokens or pairs) that the loss of these rows is a mean over."""
        ...

    def loss(self, rows: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the loss and statistics of training rows, to be divided by `size`; scalars that stay on the device."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Measure on held-out rows; all ranks call it and get the same."""
        ...


def batch_of_update(epochs: Epochs, settings: StepSettings, number: int) -> list[int]:
    """Return the rows of optimiser step `number`, counted from 0 through all epochs. The last short batch of an epoch
    is left out, unless it is the only one."""
    epoch, update = divmod(number, updates_per_epoch(epochs.size, settings))
    begin = update * settings.batch_size
    return epochs.order(epoch)[begin : begin + settings.batch_size].tolist()


def rows_trained_on(rows: int, settings: StepSettings, seed: int) -> list[int]:
    """Return the rows that any optimiser step of the whole step sees, in order."""
    epochs, updates = Epochs(rows, f"{seed}"), range(count_updates(rows, settings))
    return sorted({row for number in updates for row in batch_of_update(epochs, settings, number)})


def fit(stage: Stage, task: Task, settings: StepSettings, total: int) -> dict[str, float]:
    """Train for `total` optimiser steps, from the newest checkpoint if there is one. Returns the last evaluation."""
    rows, ranks, step = len(task.lengths), stage.ranks.size, stage.directory.step
    if rows < ranks:
        idle = f"{rows} rows leave {ranks - rows} of {ranks} ranks idle"
        stage.display.say(f"Warning: {idle}: use {processes_option(rows)}")
    epochs = Epochs(rows, f"{stage.seed}")
    best = Best(stage, WeightsBackup(task.engine), rank_of, "optimiser step") if settings.keep == "best" else None
    number, evaluation = resume(stage, task, best)
    before = next((row for row in stage.metrics.read() if "eval/loss" in row), None)  # others than the first rank: None
    stage.expect_checkpoints("optimiser step")
    with stage.display.progress(task.name, total, number) as bar:
        while number < total:
            batch = batch_of_update(epochs, settings, number)
            number += 1
            if settings.dropout:
                seed_dropout(stage, number)
            metrics = train_batch(stage, task, batch, settings.micro_batch_tokens, number)
            bar.advance(f"loss {metrics['loss']:.3f}")
            if number == total or (settings.eval_every and number % settings.eval_every == 0):
                evaluation = validate(stage, task, best, number, metrics)
                if before is not None and (sentence := nothing_learned(step, before, evaluation, number == total)):
                    stage.display.say(f"{WARNING}{task.name} {number}: {sentence}")
                    before = None  # once is enough
            else:
                stage.metrics.write(number, metrics)
            ended = stage.told_to_end()
            if ended or (settings.checkpoint_every and (number == total or number % settings.checkpoint_every == 0)):
                stage.checkpoints.save(number, task.engine.save, {"evaluation": evaluation})
            if ended:
                raise stage.terminated(number)
    if best is None:
        return evaluation
    best.put_back(total)
    return task.evaluate() | {"kept": best.number}


def seed_dropout(stage: Stage, number: int) -> None:
    """What an optimiser step drops is a function of (seed, step, rank) alone, so resuming needs no generator state."""
    torch.manual_seed(random.Random(f"dropout/{stage.seed}/{number}/{stage.ranks.rank}").getrandbits(63))


def rank_of(evaluation: Mapping[str, float]) -> tuple[float, float] | None:
    """Rank an evaluation for keep=best: of pairs by accuracy, and then, as all else, by loss."""
    if not evaluation:
        return None
    return evaluation.get("eval/accuracy", 0.0), -evaluation["eval/loss"]


def resume(stage: Stage, task: Task, best: Best | None) -> tuple[int, dict[str, float]]:
    """Return the optimiser steps done and the last evaluation, and rewind the journals. New runs are evaluated."""
    checkpoint = stage.checkpoints.newest()
    if best is not None:
        best.go_on_after(checkpoint[1]["number"] if checkpoint else -1)
    if checkpoint is None:
        stage.metrics.rewind(-1)
        stage.samples.rewind(-1)
        return 0, validate(stage, task, best, 0)
    directory, state = checkpoint
    with stage.checkpoints.reading(directory):
        task.engine.load(directory)
    stage.metrics.rewind(state["number"])
    stage.samples.rewind(state["number"])
    stage.say_goes_on(task.name, "optimiser step", state)
    return state["number"], state["evaluation"]


def nothing_learned(step: Step, before: Mapping[str, float], now: Mapping[str, float], is_end: bool) -> str:
    """Say what held-out rows tell against the training, from the evaluations before it and now.

    Pairs may be ranked at chance on the way, but not in the end; a loss is lower from the first evaluation on.
    """
    rate = f"{step.command}.optimizer.learning_rate"
    if (accuracy := now.get("eval/accuracy")) is not None:
        if not is_end or accuracy >= DOUBTFUL_ACCURACY:
            return ""
        return (
            f"{accuracy:.1%} of the held-out pairs are ranked right, a coin 50%: next to nothing was learned; try more "
            f"pairs or epochs, or another {rate}"
        )
    loss, was = now["eval/loss"], before["eval/loss"]
    if loss < was:
        return ""
    return (
        f"the held-out loss is {loss:.3f}, before training it was {was:.3f}: nothing was learned that holds for "
        f"other rows; try another {rate}, and see what the rows teach (rlhf-chat data show)"
    )


def validate(
    stage: Stage, task: Task, best: Best | None, number: int, metrics: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Evaluate, write it down in one row with the `metrics` of the optimiser step, say it, save the best so far."""
    evaluation = task.evaluate()
    stage.metrics.write(number, {**(metrics or {}), **evaluation})
    is_best = best is not None and best.look(number, evaluation)
    stage.display.say(held_out_line(task.name, number, evaluation, is_best))
    return evaluation


def train_batch(stage: Stage, task: Task, batch: list[int], token_budget: int, number: int) -> dict[str, float]:
    """Take one optimiser step over a global batch. Raises Diverged, the weights unchanged, if a loss is not finite."""
    begun = time.perf_counter()
    plan = plan_micro_batches([task.lengths[row] for row in batch], token_budget, stage.ranks.size)
    size = task.size(batch)
    task.look_ahead(number, batch)
    micro_batches, measured, sums = plan[stage.ranks.rank], list[dict[str, Tensor]](), dict[str, float]()

    def loss(micro_batch: MicroBatch) -> Tensor:
        total, statistics = task.loss([batch[i] for i in micro_batch.rows])
        measured.append({"loss": total.detach(), **statistics})
        return total / size

    task.engine.accumulate(micro_batches, loss)
    for micro_batch, values in zip(micro_batches, read_at_once(measured), strict=True):
        if not math.isfinite(values["loss"]):
            rows = [task.file_index(batch[i]) for i in micro_batch.rows]
            raise stage.diverged(number, "The loss is not a finite number", rows)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value * micro_batch.weight
    update = task.engine.step()
    if stage.dtype != torch.float16 and not math.isfinite(update["grad_norm"]):  # fp16 skips such steps by itself
        raise stage.diverged(number, "The gradient is not finite", [task.file_index(row) for row in batch])
    means = {name: value / size for name, value in stage.ranks.sum_values(sums).items()}
    seconds = time.perf_counter() - begun
    tokens = sum(task.lengths[row] for row in batch)
    return {**means, **update, "time/train": seconds, "tokens_per_second": tokens / seconds}
