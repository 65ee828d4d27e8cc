"""DPO's work on answers with a label each (KTO): its rows, the reference point of a whole batch, what it measures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from inference.chat_format import ChatFormat
from training.data.batching import plan_micro_batches, sent
from training.data.rows import Epochs, count_updates
from training.data.token_cache import TokenPair, grouped
from training.formulas.losses import DPO_LOSSES, Answers, implicit_rewards
from training.formulas.own import loaded
from training.hybrid_engine.zero_engine import ZeroEngine
from training.stage import Stage
from training.step2_dpo.reference import Work, row_logprobs, score_pairs
from training.steps import ANSWERS
from training.supervised import Task, batch_of_update

KINDS = {"good": True, "bad": False}


@dataclass(frozen=True)
class LabelledAnswer(TokenPair):
    """An answer in the place of the chosen one; in that of the rejected one a wrong answer to its prompt: the next
    answer of its batch, empty where there is no batch yet."""

    is_good: bool = True

    @property
    def own_tokens(self) -> int:
        return len(self.prompt) + len(self.chosen)


def labelled_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of answers, each with its label and the place of its row: first one of each row, then the rejected ones."""
    answers = [
        {
            "prompt": row["prompt"],
            "response": row["chosen"] if "chosen" in row else row["response"],
            "label": row.get("label", True),
            "place": place,
        }
        for place, row in enumerate(rows)
    ]
    rejected = [
        {"prompt": row["prompt"], "response": row["rejected"], "label": False, "place": place}
        for place, row in enumerate(rows)
        if "rejected" in row
    ]
    return answers + rejected


def labelled_answers(stage: Stage, rows: Sequence[dict[str, Any]], chat_format: ChatFormat) -> list[LabelledAnswer]:
    answers = labelled_rows(rows)
    tokens = stage.tokens(answers, ANSWERS, chat_format)
    nothing = torch.zeros(0, dtype=torch.int64)
    return [
        LabelledAnswer(prompt, response, nothing, place=row["place"], is_good=row["label"])
        for row, (prompt, response) in zip(answers, tokens, strict=True)
    ]


def in_batches(answers: list[LabelledAnswer], stage: Stage, total: int) -> list[LabelledAnswer]:
    """The answers in the order of `total` optimiser steps, each beside the next one of its batch."""
    epochs = Epochs(len(answers), f"{stage.seed}")
    batches = (batch_of_update(epochs, stage.settings, number) for number in range(total))
    return [each for batch in batches for each in beside_next([answers[row] for row in batch])]


def beside_next(batch: list[LabelledAnswer]) -> list[LabelledAnswer]:
    """Each beside the next one's answer, the last beside the first one's: the mismatch of section 4.1 (arXiv
    2402.01306)."""
    return [replace(each, rejected=other.chosen) for each, other in zip(batch, batch[1:] + batch[:1], strict=True)]


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
        self.seats: dict[int, int] = {}  # row of the batch -> its index in the order of all optimiser steps
        self.reference_point = 0.0
        self.counts: dict[bool, int] = {}  # good and bad answers of the batch

    def place(self, row: int) -> int:
        return self.answers[row].place

    def size(self, rows: list[int]) -> int:
        """Count answers."""
        return len(rows)

    @torch.no_grad()
    def look_ahead(self, number: int, batch: list[int]) -> None:
        """Find the batch's reference point, which no micro-batch and no rank sees all of."""
        first = (number - 1) * len(batch)
        self.seats = {row: first + seat for seat, row in enumerate(batch)}
        self.counts = {kind: sum(self.answers[row].is_good is kind for row in batch) for kind in KINDS.values()}
        ranks, device = self.stage.ranks, self.stage.ranks.device
        beside = self.pairs["train"][first : first + len(batch)]
        wrong = [(each.prompt, each.rejected) for each in beside]
        budget = self.settings.micro_batch_tokens
        wrong_logprobs = torch.zeros(len(batch))
        lengths = [len(prompt) + len(answer) for prompt, answer in wrong]
        for micro_batch in plan_micro_batches(lengths, budget, ranks.size)[ranks.rank]:
            logprobs = row_logprobs(self.engine, [wrong[seat] for seat in micro_batch.rows], device)
            if micro_batch.weight:
                wrong_logprobs[micro_batch.rows] = logprobs.cpu()
        reference = self.reference_logprobs["train"][1, first : first + len(batch)]
        self.reference_point = self._point(ranks.sum(wrong_logprobs), reference, beside)

    def loss(self, rows: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss of the answers, and what the policy thinks of the good and of the bad ones."""
        device = self.stage.ranks.device
        answers = [self.answers[row] for row in rows]
        logprobs = row_logprobs(self.engine, [(each.prompt, each.chosen) for each in answers], device)
        reference = self.reference_logprobs["train"][0, [self.seats[row] for row in rows]]
        reference = reference.to(device, non_blocking=True)
        rewards = self._rewards(logprobs, reference, [len(each.chosen) for each in answers])
        losses, _ = self._losses(rewards, answers, self.reference_point)
        batch = sum(self.counts.values())
        kl = self.reference_point / self.settings.beta * len(rows)
        measured = {"kl": torch.full((), kl, dtype=torch.float64, device=device)}
        for name, kind in KINDS.items():
            if count := self.counts[kind]:  # a mean over those of the batch, when divided by its size
                places = sent([i for i, answer in enumerate(answers) if answer.is_good is kind], device, torch.int64)
                measured[f"reward/{name}"] = rewards.detach()[places].sum().double() * batch / count
                measured[f"logprobs/{name}"] = logprobs.detach()[places].sum().double() * batch / count
        return losses.sum(), measured

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The same measures on held-out answers as one batch, and how often a good one has the higher reward."""
        held_out = self.pairs["eval"]
        if not held_out:
            return {}
        logprobs = score_pairs(self.stage, self.engine, held_out, grouped(held_out, by_prompt=False), quiet=True)
        reference = self.reference_logprobs["eval"]
        point = self._point(logprobs[1], reference[1], held_out)
        rewards = self._rewards(logprobs[0], reference[0], [len(each.chosen) for each in held_out])
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
        rewards = self._rewards(logprobs, reference, [len(each.rejected) for each in beside])
        return max(0.0, float(rewards.mean()))

    def _losses(self, rewards: Tensor, answers: Sequence[LabelledAnswer], point: float) -> tuple[Tensor, Tensor]:
        """Weighted, and which answers are good."""
        good = sent([each.is_good for each in answers], rewards.device)
        losses = self.of_answers.formula(Answers(rewards, good, point))
        return losses * torch.where(good, 1.0, self.bad_weight), good
