"""Direct preference optimisation (DPO), and KTO for answers with a label each, on top of the shared loop."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from inference.chat_format import ChatFormat
from training.data.batching import plan_micro_batches, sent
from training.data.rows import Epochs, count_updates
from training.data.token_cache import TokenPair, grouped, shares_of, tokens_of
from training.formulas.losses import DPO_LOSSES, Answers, Pairs, implicit_rewards
from training.formulas.own import loaded
from training.hybrid_engine.deepspeed_setup import loads
from training.hybrid_engine.zero_engine import ZeroEngine
from training.models.loading import load_causal_lm
from training.models.policy import Policy
from training.stage import Stage, read_at_once
from training.step2_dpo.reference import (
    Work,
    load_own_reference,
    reference_logprobs,
    response_logprobs,
    row_logprobs,
    score_pairs,
)
from training.steps import ANSWERS, SFT
from training.supervised import Task, batch_of_update, fit, rows_trained_on

KINDS = {"good": True, "bad": False}


@dataclass(frozen=True)
class LabelledAnswer(TokenPair):
    """An answer as `chosen`; `rejected` is the next answer of its batch, a wrong one, or empty without a batch."""

    is_good: bool = True

    @property
    def own_tokens(self) -> int:
        return len(self.prompt) + len(self.chosen)


def labelled_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make rows of answers, with label and the index of their row: first one of every row, then the rejected ones."""
    answers = [
        {
            "prompt": row["prompt"],
            "response": row["chosen"] if "chosen" in row else row["response"],
            "label": row.get("label", True),
            "file_index": index,
        }
        for index, row in enumerate(rows)
    ]
    rejected = [
        {"prompt": row["prompt"], "response": row["rejected"], "label": False, "file_index": index}
        for index, row in enumerate(rows)
        if "rejected" in row
    ]
    return answers + rejected


def labelled_answers(stage: Stage, rows: Sequence[dict[str, Any]], chat_format: ChatFormat) -> list[LabelledAnswer]:
    answers = labelled_rows(rows)
    tokens = stage.tokens(answers, ANSWERS, chat_format)
    nothing = torch.zeros(0, dtype=torch.int64)
    return [
        LabelledAnswer(prompt, response, nothing, file_index=row["file_index"], is_good=row["label"])
        for row, (prompt, response) in zip(answers, tokens, strict=True)
    ]


def in_batches(answers: list[LabelledAnswer], stage: Stage, total: int) -> list[LabelledAnswer]:
    """Put the answers in the order of `total` optimiser steps, each beside the next one of its batch."""
    epochs = Epochs(len(answers), f"{stage.seed}")
    batches = (batch_of_update(epochs, stage.settings, number) for number in range(total))
    return [answer for batch in batches for answer in beside_next([answers[row] for row in batch])]


def beside_next(batch: list[LabelledAnswer]) -> list[LabelledAnswer]:
    """Set each answer beside the next, the last beside the first: the mismatch of arXiv 2402.01306, section 4.1."""
    return [replace(answer, rejected=other.chosen) for answer, other in zip(batch, batch[1:] + batch[:1], strict=True)]


def unpaired_work(stage: Stage, rows: list[dict], held_out: list[dict], chat_format: ChatFormat) -> Work:
    answers = labelled_answers(stage, rows, chat_format)
    evaluated = beside_next(labelled_answers(stage, held_out[: stage.settings.eval_rows], chat_format))
    in_order = in_batches(answers, stage, count_updates(len(answers), stage.settings))
    sets, task = {"train": in_order, "eval": evaluated}, partial(UnpairedTask, answers=answers)
    return Work(sets, grouped(in_order, by_prompt=False), len(answers), comparisons(evaluated), task)


def comparisons(answers: Sequence[LabelledAnswer]) -> int:
    """Count pairs of a good and a bad answer that share none."""
    good = sum(answer.is_good for answer in answers)
    return min(good, len(answers) - good)


class UnpairedTask(Task):
    name = "DPO"

    def __init__(
        self,
        stage: Stage,
        engine: ZeroEngine,
        pairs: dict[str, list[LabelledAnswer]],
        reference_logprobs: dict[str, Tensor],
        answers: list[LabelledAnswer],
    ):
        """`answers` are the training rows; of `pairs` those of `train` stand in the order of the optimiser steps."""
        self.stage, self.engine, self.settings = stage, engine, stage.settings
        self.answers, self.pairs, self.reference_logprobs = answers, pairs, reference_logprobs
        self.of_answers = loaded(DPO_LOSSES, self.settings.loss)
        self.lengths = [answer.own_tokens for answer in answers]
        good = sum(answer.is_good for answer in answers)
        self.bad_weight = self.settings.undesirable_weight or good / max(1, len(answers) - good)
        self.indices: dict[int, int] = {}  # row of the batch -> its index in the order of all optimiser steps
        self.reference_point = 0.0
        self.counts: dict[bool, int] = {}  # good and bad answers of the batch

    def file_index(self, row: int) -> int:
        return self.answers[row].file_index

    def size(self, rows: list[int]) -> int:
        return len(rows)

    @torch.no_grad()
    def look_ahead(self, number: int, batch: list[int]) -> None:
        """Find the batch's reference point, which no micro-batch and no rank sees all of."""
        first = (number - 1) * len(batch)
        self.indices = {row: first + i for i, row in enumerate(batch)}
        self.counts = {kind: sum(self.answers[row].is_good is kind for row in batch) for kind in KINDS.values()}
        ranks, device = self.stage.ranks, self.stage.ranks.device
        beside = self.pairs["train"][first : first + len(batch)]
        wrong = [(answer.prompt, answer.rejected) for answer in beside]
        budget = self.settings.micro_batch_tokens
        wrong_logprobs = torch.zeros(len(batch))
        lengths = [len(prompt) + len(answer) for prompt, answer in wrong]
        for micro_batch in plan_micro_batches(lengths, budget, ranks.size)[ranks.rank]:
            logprobs = row_logprobs(self.engine, [wrong[i] for i in micro_batch.rows], device)
            if micro_batch.weight:
                wrong_logprobs[micro_batch.rows] = logprobs.cpu()
        reference = self.reference_logprobs["train"][1, first : first + len(batch)]
        self.reference_point = self._point(ranks.sum(wrong_logprobs), reference, beside)

    def loss(self, rows: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the loss of the answers, with what the policy thinks of the good and of the bad ones."""
        device = self.stage.ranks.device
        answers = [self.answers[row] for row in rows]
        logprobs = row_logprobs(self.engine, [(answer.prompt, answer.chosen) for answer in answers], device)
        reference = self.reference_logprobs["train"][0, [self.indices[row] for row in rows]]
        reference = reference.to(device, non_blocking=True)
        rewards = self._rewards(logprobs, reference, [len(answer.chosen) for answer in answers])
        losses, _ = self._losses(rewards, answers, self.reference_point)
        batch = sum(self.counts.values())
        kl = self.reference_point / self.settings.beta * len(rows)
        measured = {"kl": torch.full((), kl, dtype=torch.float64, device=device)}
        for name, kind in KINDS.items():
            if count := self.counts[kind]:  # a mean over those of the batch, when divided by its size
                chosen = sent([i for i, answer in enumerate(answers) if answer.is_good is kind], device, torch.int64)
                measured[f"reward/{name}"] = rewards.detach()[chosen].sum().double() * batch / count
                measured[f"logprobs/{name}"] = logprobs.detach()[chosen].sum().double() * batch / count
        return losses.sum(), measured

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure the same on held-out answers as one batch, and how often a good one has the higher reward."""
        held_out = self.pairs["eval"]
        if not held_out:
            return {}
        logprobs = score_pairs(self.stage, self.engine, held_out, grouped(held_out, by_prompt=False), quiet=True)
        reference = self.reference_logprobs["eval"]
        point = self._point(logprobs[1], reference[1], held_out)
        rewards = self._rewards(logprobs[0], reference[0], [len(answer.chosen) for answer in held_out])
        losses, good = self._losses(rewards, held_out, point)
        metrics = {"eval/loss": float(losses.mean()), "eval/kl": point / self.settings.beta}
        if comparisons(held_out):
            margins = rewards[good][:, None] - rewards[~good]
            metrics["eval/accuracy"] = float(((margins > 0).float() + 0.5 * (margins == 0)).mean())
            metrics["eval/margin"] = float(margins.mean())
        for name, kind in KINDS.items():
            if (good == kind).any():
                metrics[f"eval/reward/{name}"] = float(rewards[good == kind].mean())
                metrics[f"eval/logprobs/{name}"] = float(logprobs[0][good == kind].mean())
        return metrics

    def _rewards(self, logprobs: Tensor, reference: Tensor, lengths: list[int]) -> Tensor:
        divided_by = sent(lengths, logprobs.device) if self.settings.length_normalized else None
        return implicit_rewards(logprobs, reference, divided_by, self.settings.beta)

    def _point(self, logprobs: Tensor, reference: Tensor, beside: Sequence[LabelledAnswer]) -> float:
        rewards = self._rewards(logprobs, reference, [len(answer.rejected) for answer in beside])
        return max(0.0, float(rewards.mean()))

    def _losses(self, rewards: Tensor, answers: Sequence[LabelledAnswer], point: float) -> tuple[Tensor, Tensor]:
        """Return the weighted losses, and which answers are good."""
        good = sent([answer.is_good for answer in answers], rewards.device)
        losses = self.of_answers.formula(Answers(rewards, good, point))
        return losses * torch.where(good, 1.0, self.bad_weight), good


HELD_OUT = {
    "loss": "eval/loss",
    "accuracy": "eval/accuracy",
    "margin": "eval/margin",
    "reward/chosen": "eval/reward/chosen",
    "reward/rejected": "eval/reward/rejected",
    "logprobs/chosen": "eval/logprobs/chosen",
    "logprobs/rejected": "eval/logprobs/rejected",
    "nll": "eval/nll",
}
"""Metric of training pairs -> that of held-out pairs."""


def train(stage: Stage) -> None:
    """Run the whole step: set up, ask the reference, fit, save."""
    settings = stage.settings
    source = stage.earlier_model(SFT)
    chat_format = stage.chat_format(source)
    rows, held_out = stage.rows(chat_format)
    work = (unpaired_work if settings.is_unpaired else paired_work)(stage, rows, held_out, chat_format)
    total = count_updates(work.rows, settings)

    if own := stage.own_reference():  # asked, and forgotten, before the policy is there
        reference_logprobs(stage, lambda: load_own_reference(stage, own, chat_format), work.sets, work.needed)
    dtype, with_weights = loads(settings.optimizer.zero_stage, stage.dtype, stage.ranks)
    model = load_causal_lm(source, chat_format, dtype, settings.dropout, with_weights)
    policy = Policy(model, settings.optimizer.lora)
    engine = ZeroEngine(policy, settings.optimizer, stage.dtype, total, stage.ranks, settings.dropout > 0)
    reference = reference_logprobs(stage, lambda: engine, work.sets, work.needed)
    evaluation = fit(stage, work.task(stage, engine, work.sets, reference), settings, total)

    stage.save_trained(engine, lambda: load_causal_lm(source, chat_format, torch.float32), chat_format)
    stage.finish({"optimizer_steps": total, "rows": work.rows, "held_out": work.compared, **evaluation})


def paired_work(stage: Stage, rows: list[dict], held_out: list[dict], chat_format: ChatFormat) -> Work:
    pairs = stage.token_pairs(rows, chat_format)
    evaluated = stage.token_pairs(held_out[: stage.settings.eval_rows], chat_format)
    groups = grouped(pairs, stage.settings.by_prompt)
    needed = [groups[row] for row in rows_trained_on(len(groups), stage.settings, stage.seed)]
    return Work({"train": pairs, "eval": evaluated}, needed, len(groups), len(evaluated), DPOTask)


class DPOTask(Task):
    name = "DPO"

    def __init__(
        self,
        stage: Stage,
        engine: ZeroEngine,
        pairs: dict[str, list[TokenPair]],
        reference_logprobs: dict[str, Tensor],
    ):
        """`pairs` and `reference_logprobs` have a `train` and an `eval` set."""
        self.stage, self.engine, self.settings = stage, engine, stage.settings
        self.pairs, self.reference_logprobs = pairs, reference_logprobs
        self.of_pairs = loaded(DPO_LOSSES, self.settings.loss)
        self.groups = {
            "train": grouped(pairs["train"], self.settings.by_prompt),
            "eval": grouped(pairs["eval"], by_prompt=False),
        }
        self.lengths = [tokens_of([pairs["train"][i] for i in group]) for group in self.groups["train"]]

    def file_index(self, row: int) -> int:
        return self.pairs["train"][self.groups["train"][row][0]].file_index

    def size(self, rows: list[int]) -> int:
        return len(rows)

    def loss(self, rows: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the loss of the pairs, with what the policy thinks of them."""
        return self._losses("train", rows)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure the same on held-out pairs."""
        held_out = self.pairs["eval"]
        if not held_out:
            return {}
        ranks = self.stage.ranks
        plan = plan_micro_batches([pair.tokens for pair in held_out], self.settings.micro_batch_tokens, ranks.size)
        sums: dict[str, float] = {}
        losses = [self._losses("eval", micro_batch.rows) for micro_batch in plan[ranks.rank]]
        values = read_at_once([{"loss": loss, **measured} for loss, measured in losses])
        for micro_batch, measured in zip(plan[ranks.rank], values, strict=True):
            for name, value in measured.items():
                sums[name] = sums.get(name, 0.0) + value * micro_batch.weight
        return {HELD_OUT[name]: value / len(held_out) for name, value in ranks.sum_values(sums).items()}

    def _losses(self, name: str, rows: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the loss of pairs of a set, and statistics of them; by prompt, the means of its pairs."""
        groups, device = [self.groups[name][row] for row in rows], self.stage.ranks.device
        logprobs = response_logprobs(self.engine, [[self.pairs[name][i] for i in group] for group in groups], device)
        indices = [i for group in groups for i in group]
        pairs, shares = [self.pairs[name][i] for i in indices], shares_of(groups, device)
        lengths = sent([[len(p.chosen) for p in pairs], [len(p.rejected) for p in pairs]], device)
        reference = self.reference_logprobs[name][:, indices].to(device, non_blocking=True)
        divided_by = lengths if self.settings.length_normalized else None
        rewards = implicit_rewards(logprobs, reference, divided_by, self.settings.beta)
        loss = self.of_pairs.formula(Pairs(rewards[0], rewards[1], self.settings.beta, self.settings.label_smoothing))
        margins = rewards[0] - rewards[1]
        measured = {
            "accuracy": (margins > 0).float() + 0.5 * (margins == 0),  # a tie counts half
            "margin": margins,
            "reward/chosen": rewards[0],
            "reward/rejected": rewards[1],
            "logprobs/chosen": logprobs[0],
            "logprobs/rejected": logprobs[1],
        }
        if self.settings.sft_coefficient:
            nll = -logprobs[0] / lengths[0]
            loss, measured["nll"] = loss + self.settings.sft_coefficient * nll, nll
        return (loss * shares).sum(), {name: (value * shares).sum().detach() for name, value in measured.items()}
