"""The reward model on top of the shared loop."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.data.batching import TokenBatch, plan_micro_batches, sent
from training.data.rows import count_updates, require_margins
from training.data.token_cache import TokenPair, answers_of, grouped, length_bucket, shares_of, tokens_of
from training.evaluation.candidates import Row
from training.evaluation.comparison import Accuracy, accuracy_by_length, groups_of
from training.evaluation.panel import panel_agreement, read_panel, rows_to_score, write_scores
from training.formulas.losses import preference_losses
from training.hybrid_engine.deepspeed_setup import loads
from training.hybrid_engine.zero_engine import ZeroEngine
from training.models.loading import load_scorer
from training.models.policy import Scorer, at_last_token, runs_packed
from training.stage import Stage
from training.steps import SFT
from training.supervised import Task, fit

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
    """Run the whole step: set up, fit, measure the scale of the scores, save."""
    config, settings = stage.config, stage.config.reward
    source = initial_model(stage)
    chat_format = stage.chat_format(stage.model_directory(config.sft_model or config.model), source)
    rows, held_out = stage.rows(chat_format)
    if settings.margin and (sentence := require_margins(rows)):
        stage.display.say(sentence)
    pairs = stage.token_pairs(rows, chat_format)
    units = len(grouped(pairs, settings.by_prompt))
    total = count_updates(units, settings)

    dtype, with_weights = loads(settings.optimizer.zero_stage, stage.dtype, stage.ranks)
    model = load_scorer(source, chat_format, dtype, settings.layers, settings.dropout, with_weights)
    scorer = Scorer(model, settings.optimizer.lora)
    scorer.shift, scorer.scale = 0.0, 1.0
    engine = ZeroEngine(scorer, settings.optimizer, stage.dtype, total, stage.ranks, settings.dropout > 0)
    evaluated = stage.token_pairs(held_out[: settings.eval_rows], chat_format)
    is_cheap = runs_packed(model) and stage.ranks.device.type == "cpu"  # a GPU may fill rows up to the longest
    task = RewardTask(stage, engine, pairs, evaluated, scores_by_prompt=is_cheap)
    evaluation = fit(stage, task, settings, total)

    scale = task.score_scale() if settings.normalize else {"score_shift": 0.0, "score_scale": 1.0}
    stage.save_trained(
        engine, lambda: load_scorer(source, chat_format, torch.float32, settings.layers), chat_format, scale
    )
    counted = {"optimizer_steps": total, "rows": units, "held_out": len(evaluated)}
    ranking = task.ranking(groups_of([held_out[pair.file_index] for pair in evaluated]))
    measured: dict[str, Any] = {"reward_accuracy": ranking}
    if panel := stage.ranks.tell(read_panel(stage.run), "the texts that people rated"):
        scores = task.scores_of_texts(rows_to_score(panel, chat_format, config.data)).tolist()
        measured["panel"] = panel_agreement(panel, scores)
        if stage.ranks.is_first:
            write_scores(stage.directory.panel_file, panel, scores)
    stage.finish({**counted, **evaluation, **scale, **measured})


def initial_model(stage: Stage) -> Path:
    if stage.config.reward.initialize_from == "base":
        return stage.model_directory(stage.config.reward_model_source)
    return stage.earlier_model(SFT)


class RewardTask(Task):
    name = "Reward model"

    def __init__(
        self,
        stage: Stage,
        engine: ZeroEngine,
        pairs: list[TokenPair],
        held_out: list[TokenPair],
        scores_by_prompt: bool = False,
    ):
        """`scores_by_prompt`: answers to prompts that begin alike are scored together."""
        self.stage, self.engine, self.pairs, self.held_out = stage, engine, pairs, held_out
        self.scores_by_prompt = scores_by_prompt
        self.settings = stage.config.reward
        self.groups = grouped(pairs, self.settings.by_prompt)
        self.lengths = [tokens_of(group) for group in self._pairs(range(len(self.groups)))]
        self.held_out_scores: Tensor | None = None  # float64 (2, pairs), of the last evaluation

    def file_index(self, row: int) -> int:
        return self.pairs[self.groups[row][0]].file_index

    def size(self, rows: list[int]) -> int:
        return len(rows)

    def loss(self, rows: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the loss of the pairs, pairs ranked right, and margins; by prompt, the means over its pairs."""
        groups = self._pairs(rows)
        chosen, rejected = self._scores(groups)
        shares, margin = shares_of(groups, chosen.device), (chosen - rejected).detach()
        statistics = {"accuracy": ((margin > 0) * shares).sum(), "margin": (margin * shares).sum()}
        return (self._losses(chosen, rejected, [pair for group in groups for pair in group]) * shares).sum(), statistics

    def evaluate(self) -> dict[str, float]:
        """Measure accuracy (also by length of the longer answer), margin and mean scores on held-out pairs."""
        if not self.held_out:
            return {}
        chosen, rejected = self.held_out_scores = self.scores(self.held_out)
        ranked_right: dict[str, list[bool]] = {name: [] for name in ("eval/accuracy", *ACCURACY_UP_TO.values())}
        ranked_right["eval/accuracy_unseen_questions"] = []
        for pair, ranked in zip(self.held_out, (chosen > rejected).tolist(), strict=True):
            for name in accuracies_of(pair):
                ranked_right[name].append(ranked)
        means = {
            "eval/loss": self._losses(chosen, rejected, self.held_out),
            "eval/margin": chosen - rejected,
            "eval/chosen": chosen,
            "eval/rejected": rejected,
        }
        accuracies = {name: sum(ranked) / len(ranked) for name, ranked in ranked_right.items() if ranked}
        return {name: float(values.mean()) for name, values in means.items()} | accuracies

    def ranking(self, questions: Sequence[Hashable]) -> dict[str, Accuracy]:
        """Count held-out pairs ranked right in the last evaluation, with intervals: what evaluation and report say of
        this reward model. `questions` are those of the pairs."""
        if not self.held_out:
            return {}
        chosen, rejected = self.last_scores()
        longest, unseen = [pair.longer for pair in self.held_out], [pair.is_unseen for pair in self.held_out]
        return accuracy_by_length((chosen > rejected).tolist(), longest, unseen, questions)

    def score_scale(self) -> dict[str, float]:
        """Measure mean and standard deviation of the scores of held-out human replies, chosen and rejected alike."""
        scores = self.last_scores() if self.held_out else self.scores(self.pairs[: self.stage.config.reward.eval_rows])
        return {"score_shift": float(scores.mean()), "score_scale": max(float(scores.std(correction=0)), 1e-6)}

    def last_scores(self) -> Tensor:
        """Return the held-out pairs' scores in the last evaluation, or now in a run that goes on after its end."""
        if self.held_out_scores is None:
            self.held_out_scores = self.scores(self.held_out)
        return self.held_out_scores

    def scores(self, pairs: list[TokenPair]) -> Tensor:
        """Score chosen and rejected answers, float64 (2, pairs). All ranks call it and get the same."""
        return self._on_all_ranks(
            [pair.tokens for pair in pairs],
            [pair.prompt.tolist() for pair in pairs],
            lambda chosen: torch.stack(self._scores([[pairs[row]] for row in chosen]), dim=1),
        ).T

    def scores_of_texts(self, rows: list[Row]) -> Tensor:
        """Score single answers, float64 (rows). All ranks call it and get the same."""
        return self._on_all_ranks(
            [len(prompt) + len(response) for prompt, response in rows],
            [prompt.tolist() for prompt, _ in rows],
            lambda chosen: self._last([rows[row] for row in chosen]),
        )

    @torch.no_grad()
    def _on_all_ranks(
        self, lengths: list[int], prompts: list[list[int]], score: Callable[[list[int]], Tensor]
    ) -> Tensor:
        """Return what `score` gives for rows of these lengths, (rows, ...) as float64; each rank takes a share."""
        ranks, score_of = self.stage.ranks, dict[int, Any]()
        beginnings = prompts if self.scores_by_prompt else None
        plan = plan_micro_batches(lengths, self.stage.config.reward.micro_batch_tokens, ranks.size, beginnings)
        for micro_batch in plan[ranks.rank]:
            scores = score(micro_batch.rows)
            if micro_batch.weight:
                score_of.update(zip(micro_batch.rows, scores.tolist(), strict=True))
        every = {row: scores for share in ranks.gather(score_of) for row, scores in share.items()}
        return torch.tensor([every[row] for row in range(len(lengths))], dtype=torch.float64)

    def _pairs(self, rows: Iterable[int]) -> list[list[TokenPair]]:
        return [[self.pairs[i] for i in self.groups[row]] for row in rows]

    def _losses(self, chosen: Tensor, rejected: Tensor, pairs: list[TokenPair]) -> Tensor:
        """Return the loss of each pair: (pairs)."""
        margins = self.settings.margin * sent([pair.margin for pair in pairs], chosen.device, chosen.dtype)
        return preference_losses(chosen, rejected, margins if self.settings.margin else None, self.settings.centering)

    def _scores(self, groups: list[list[TokenPair]]) -> tuple[Tensor, Tensor]:
        """Score chosen and rejected answers, float32 (pairs) each, in one forward pass."""
        rows, indices = answers_of(groups)
        chosen, rejected = self._last(rows)[indices.to(self.stage.ranks.device, non_blocking=True)]
        return chosen, rejected

    def _last(self, rows: Sequence[Row]) -> Tensor:
        """Score each row at its last token; float32 (rows)."""
        batch = TokenBatch.of(rows, self.stage.ranks.device)
        return at_last_token(self.engine(batch), batch)


def accuracies_of(pair: TokenPair) -> list[str]:
    names = ["eval/accuracy", ACCURACY_UP_TO[length_bucket(pair.longer)]]
    return [*names, "eval/accuracy_unseen_questions"] if pair.is_unseen else names
