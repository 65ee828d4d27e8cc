"""The reward model on top of the shared loop."""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from training.data.batching import TokenBatch, plan_micro_batches
from training.data.split import choose_groups
from training.data.token_pairs import TokenPair, length_bucket, rows_of
from training.evaluation.ranking import Accuracy, accuracy_by_length
from training.hybrid_engine.dividing import loads
from training.hybrid_engine.zero_engine import ZeroEngine
from training.models.loading import load_scorer
from training.models.scorer import Scorer, at_last_token
from training.stage import Stage
from training.steps import SFT
from training.supervised import count_updates, fit

ACCURACY_UP_TO = {
    8: "eval/accuracy_up_to_8_tokens",
    16: "eval/accuracy_up_to_16_tokens",
    32: "eval/accuracy_up_to_32_tokens",
    64: "eval/accuracy_up_to_64_tokens",
    128: "eval/accuracy_up_to_128_tokens",
    256: "eval/accuracy_up_to_256_tokens",
}
"""The metric of pairs whose longer answer has up to so many tokens, from the bucket before on."""


def train(stage: Stage) -> None:
    """The whole step: set up, fit, measure the scale of the scores, save."""
    config, settings = stage.config, stage.config.reward
    source = initial_model(stage)
    chat_format = stage.chat_format(stage.model_directory(config.sft_model or config.model), source)
    rows, held_out = stage.rows(chat_format)
    pairs = stage.token_pairs(rows, chat_format)
    total = count_updates(len(pairs), settings)

    dtype, with_weights = loads(settings.optimizer.zero_stage, stage.dtype, stage.ranks)
    model = load_scorer(source, chat_format, dtype, settings.layers, settings.dropout, with_weights)
    scorer = Scorer(model, settings.optimizer.lora)
    scorer.shift, scorer.scale = 0.0, 1.0
    engine = ZeroEngine(scorer, settings.optimizer, stage.dtype, total, stage.ranks, settings.dropout > 0)
    evaluated = stage.token_pairs(held_out[: settings.eval_rows], chat_format)
    task = RewardTask(stage, engine, pairs, evaluated)
    evaluation = fit(stage, task, settings, total)

    scale = task.score_scale() if settings.normalize else {"score_shift": 0.0, "score_scale": 1.0}
    stage.save_trained(
        engine, lambda: load_scorer(source, chat_format, torch.float32, settings.layers), chat_format, scale
    )
    counted = {"optimizer_steps": total, "rows": len(pairs), "held_out": len(evaluated)}
    rows_of_pairs: list[Any] = [held_out[pair.place] for pair in evaluated]
    ranking = task.ranking([*map(choose_groups(rows_of_pairs), rows_of_pairs)])
    stage.finish({**counted, **evaluation, **scale, "reward_accuracy": ranking})


def initial_model(stage: Stage) -> Path:
    if stage.config.reward.initialize_from == "base":
        return stage.model_directory(stage.config.reward_model_source)
    return stage.earlier_model(SFT)


class RewardTask:
    name = "Reward model"

    def __init__(self, stage: Stage, engine: ZeroEngine, pairs: list[TokenPair], held_out: list[TokenPair]):
        self.stage, self.engine, self.pairs, self.held_out = stage, engine, pairs, held_out
        self.lengths = [pair.tokens for pair in pairs]

    def place(self, row: int) -> int:
        return self.pairs[row].place

    def size(self, rows: list[int]) -> int:
        """Pairs."""
        return len(rows)

    def loss(self, rows: list[int]) -> tuple[Tensor, dict[str, float]]:
        """Summed loss of the pairs, how many are ranked right, and their margins."""
        chosen, rejected = self._scores([self.pairs[row] for row in rows])
        margin = (chosen - rejected).detach()
        statistics = {"accuracy": float((margin > 0).sum()), "margin": float(margin.sum())}
        return -logsigmoid(chosen - rejected).sum(), statistics

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Accuracy (also by length of the longer answer), margin and mean scores on held-out pairs."""
        if not self.held_out:
            return {}
        ranks = self.stage.ranks
        lengths = [pair.tokens for pair in self.held_out]
        sums = dict.fromkeys(("eval/loss", "eval/margin", "eval/chosen", "eval/rejected"), 0.0)
        right = dict.fromkeys(("eval/accuracy", *ACCURACY_UP_TO.values(), "eval/accuracy_unseen_questions"), 0.0)
        counts = dict.fromkeys(right, 0.0)
        plan = plan_micro_batches(lengths, self.stage.config.reward.micro_batch_tokens, ranks.size)
        for micro_batch in plan[ranks.rank]:
            pairs, weight = [self.held_out[row] for row in micro_batch.rows], micro_batch.weight
            chosen, rejected = self._scores(pairs)
            for pair, ranked in zip(pairs, (chosen > rejected).tolist(), strict=True):
                for name in accuracies_of(pair):
                    right[name] += ranked * weight
                    counts[name] += weight
            sums["eval/loss"] -= float(logsigmoid(chosen - rejected).sum()) * weight
            sums["eval/margin"] += float((chosen - rejected).sum()) * weight
            sums["eval/chosen"] += float(chosen.sum()) * weight
            sums["eval/rejected"] += float(rejected.sum()) * weight
        found = ranks.sum_values(sums | right | {f"pairs of {name}": count for name, count in counts.items()})
        counts = {name: found[f"pairs of {name}"] for name in right}
        means = {name: found[name] / counts["eval/accuracy"] for name in sums}
        return means | {name: found[name] / count for name, count in counts.items() if count}

    @torch.no_grad()
    def ranking(self, questions: Sequence[Hashable]) -> dict[str, Accuracy]:
        """Held-out pairs ranked right, with intervals: what evaluation and report say of this reward model.

        `questions` are those of the pairs. All ranks call it and get the same.
        """
        ranks, found = self.stage.ranks, dict[int, bool]()
        lengths = [pair.tokens for pair in self.held_out]
        plan = plan_micro_batches(lengths, self.stage.config.reward.micro_batch_tokens, ranks.size)
        for micro_batch in plan[ranks.rank] if lengths else []:
            chosen, rejected = self._scores([self.held_out[row] for row in micro_batch.rows])
            found.update(zip(micro_batch.rows, (chosen > rejected).tolist(), strict=True))
        right = {row: ranked for share in ranks.gather(found) for row, ranked in share.items()}
        longest, unseen = [pair.longer for pair in self.held_out], [pair.is_unseen for pair in self.held_out]
        return accuracy_by_length([right[row] for row in range(len(lengths))], longest, unseen, questions)

    @torch.no_grad()
    def score_scale(self) -> dict[str, float]:
        """Mean and standard deviation of the scores of held-out human replies, chosen and rejected alike."""
        ranks = self.stage.ranks
        pairs = self.held_out or self.pairs[: self.stage.config.reward.eval_rows]
        lengths = [pair.tokens for pair in pairs]
        plan = plan_micro_batches(lengths, self.stage.config.reward.micro_batch_tokens, ranks.size)
        sums = {"count": 0.0, "sum": 0.0, "squares": 0.0}
        for micro_batch in plan[ranks.rank]:
            scores = torch.cat(self._scores([pairs[row] for row in micro_batch.rows])).double()
            sums["count"] += len(scores) * micro_batch.weight
            sums["sum"] += float(scores.sum()) * micro_batch.weight
            sums["squares"] += float(scores.square().sum()) * micro_batch.weight
        sums = ranks.sum_values(sums)
        mean = sums["sum"] / sums["count"]
        variance = max(sums["squares"] / sums["count"] - mean**2, 0.0)
        return {"score_shift": mean, "score_scale": max(variance**0.5, 1e-6)}

    def _scores(self, pairs: list[TokenPair]) -> tuple[Tensor, Tensor]:
        """Scores of chosen and rejected, float32 (pairs) each, from one forward pass."""
        batch = TokenBatch.of(rows_of(pairs), self.stage.ranks.device)
        chosen, rejected = at_last_token(self.engine(batch), batch).chunk(2)
        return chosen, rejected


def accuracies_of(pair: TokenPair) -> list[str]:
    """The metrics that a held-out pair counts in."""
    names = ["eval/accuracy", ACCURACY_UP_TO[length_bucket(pair.longer)]]
    return [*names, "eval/accuracy_unseen_questions"] if pair.is_unseen else names
