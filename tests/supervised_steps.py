"""Steps 1 and 2 on the tiny model in this process, and the parts of a second implementation that they share."""

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.config import StepSettings
from training.config_files import load_config
from training.data.batching import MicroBatch
from training.data.rows import Epochs, updates_per_epoch
from training.distributed import Ranks
from training.run_directory import RunDirectory
from training.stage import Stage, make_stage
from training.steps import Step
from training.supervised import batch_of_update

RATE, DECAY, CLIPPING, WARMUP = 1e-3, 0.5, 0.5, 0.5
BATCH, EPOCHS, SEED = 4, 2, 3
LONGEST = 12
WORDS = "I you like rice sea story very good bad day tell me about the world today please sleep walk".split()
CLOCK = ("time/", "tokens_per_second")


def batches_of_epoch(rows: int, settings: StepSettings, seed: int, epoch: int) -> list[list[int]]:
    """Return the rows of each optimiser step of one epoch."""
    epochs, per_epoch = Epochs(rows, f"{seed}"), updates_per_epoch(rows, settings)
    return [batch_of_update(epochs, settings, number) for number in range(epoch * per_epoch, (epoch + 1) * per_epoch)]


def settings_of(step: str) -> list[str]:
    """Everything that the loop does is at work: warm-up, decay, clipping, several epochs, evaluations between."""
    return [
        f"seed={SEED}",
        "dtype=fp32",
        "data.max_prompt_tokens=24",
        f"data.max_response_tokens={LONGEST}",
        f"{step}.batch_size={BATCH}",
        f"{step}.epochs={EPOCHS}",
        f"{step}.eval_every=2",
        f"{step}.checkpoint_every=0",
        f"{step}.optimizer.learning_rate={RATE}",
        f"{step}.optimizer.weight_decay={DECAY}",
        f"{step}.optimizer.gradient_clipping={CLIPPING}",
        f"{step}.optimizer.warmup={WARMUP}",
        f"{step}.optimizer.epsilon=1e-5",
    ]


def text(draw: random.Random, longest: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))


def prompt(draw: random.Random) -> list[dict]:
    return [{"role": "user", "content": text(draw, 9)}]


def make_run(directory: Path, kind: str, train: list[dict], held_out: list[dict]) -> RunDirectory:
    """A run whose data are prepared."""
    run = RunDirectory(directory)
    run.data.mkdir(parents=True)
    for name, rows in (("train", train), ("eval", held_out)):
        (run.data / f"{kind}_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.data / "counts.json").write_text("{}")
    return run


def stage_of(run: RunDirectory, step: Step, settings: list[str], ranks: Ranks) -> Stage:
    """A quiet one."""
    run.step(step).path.mkdir(parents=True, exist_ok=True)
    stage = make_stage(run, step, load_config([], settings), ranks)
    stage.display.quiet = True
    return stage


def metrics_of(run: RunDirectory, step: Step) -> tuple[list[dict], list[dict]]:
    """What optimiser steps found, and what evaluations found, without what a clock says. Each has one line."""
    lines = [json.loads(line) for line in run.step(step).metrics_file.read_text().splitlines()]
    lines = [{name: value for name, value in line.items() if not name.startswith(CLOCK)} for line in lines]
    assert [line["number"] for line in lines] == list(range(len(lines)))
    trained = [{k: v for k, v in line.items() if not k.startswith("eval/")} for line in lines if "loss" in line]
    evaluated = [line for line in lines if "eval/loss" in line]
    return trained, [{k: v for k, v in line.items() if k.startswith(("number", "eval/"))} for line in evaluated]


def result_of(run: RunDirectory, step: Step) -> dict[str, Any]:
    return json.loads(run.step(step).result_file.read_text())


def train_by_hand(
    model: nn.Module, rows: int, loss_of: Callable[[list[int]], Tensor], evaluate: Callable[[], dict[str, float]]
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Plain torch: decay on matrices, a rate that rises and then falls to 0, the whole gradient clipped.

    `loss_of` a batch of rows is what is made smaller. What it found: of optimiser steps, and of evaluations.
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    assert matrices and vectors
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, RATE, (0.9, 0.95), 1e-5)
    settings = StepSettings(batch_size=BATCH)
    batches = [batch for epoch in range(EPOCHS) for batch in batches_of_epoch(rows, settings, SEED, epoch)]
    rising = round(WARMUP * len(batches))
    steps, evaluations = [], [evaluate()]
    for number, batch in enumerate(batches):
        share = (number + 1) / rising if number < rising else 1 - (number - rising) / (len(batches) - rising)
        for group in optimizer.param_groups:
            group["lr"] = RATE * share
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad *= min(1.0, CLIPPING / float(norm))
        optimizer.step()
        steps.append({"loss": float(loss.detach()), "grad_norm": float(norm), "lr": RATE * share})
        if number % 2:
            evaluations.append(evaluate())
    return steps, evaluations


def require_same_weights(saved: nn.Module, trained: nn.Module) -> None:
    theirs = dict(trained.named_parameters())
    for name, weight in saved.named_parameters():
        assert torch.allclose(weight, theirs[name], atol=2e-5), name


def on_two_ranks(task: Any, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What `task` measures on two ranks, which are played one after the other; their sums meet in a third round."""
    stage, shares = task.stage, []

    class Played(Ranks):
        def sum_values(self, values: dict[str, float]) -> dict[str, float]:
            shares.append(values)
            return {name: sum(share[name] for share in shares[:2]) for name in values}

        def gather(self, value: Any, phase: str = "") -> list[Any]:
            shares.append(value)
            return shares[:2]

    for rank in (0, 1, 0):
        task.stage = dataclasses.replace(stage, ranks=Played(rank, 2, stage.ranks.device))
        with suppress(KeyError):  # of one that meets nobody yet
            found = measure()
    task.stage = stage
    return found


def with_idle_micro_batch(plan: Callable) -> Callable:
    """`plan_micro_batches` for a rank that runs short: it goes through rows, here all of them, with weight 0."""

    def planned(lengths: Sequence[int], *arguments: Any) -> list[list[MicroBatch]]:
        idle = MicroBatch(list(range(len(lengths))), weight=0.0)
        return [[*micro_batches, idle] for micro_batches in plan(lengths, *arguments)]

    return planned
