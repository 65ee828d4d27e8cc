"""Models that read answers: log-probabilities of a policy, scores of a reward model. One model in memory at a time."""

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from inference.chat_format import ChatFormat
from inference.errors import UserError
from training.data.batching import TokenBatch, plan_micro_batches
from training.evaluation.answers import Answers, Row
from training.models.loading import load_causal_lm, load_scorer
from training.models.policy import Policy, Scorer, at_last_token
from training.stage import Stage


class Reader:
    """A language model, loaded: it generates through `policy.model` and reads through `logprobs`."""

    def __init__(self, stage: Stage, directory: Path):
        self.stage = stage
        self.chat_format = ChatFormat.load(directory)
        model = Policy(load_causal_lm(directory, self.chat_format, stage.dtype))
        self.policy = model.to(stage.ranks.device).eval()

    @torch.no_grad()
    def logprobs(self, rows: Sequence[Row], temperature: float = 1.0) -> list[Tensor]:
        """Of each row's response tokens; float32 (response tokens) each."""
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for chosen, batch in batches(self.stage, rows):
            sizes = [len(rows[row][1]) for row in chosen]
            for row, values in zip(chosen, self.policy(batch, temperature)[0].cpu().split(sizes), strict=True):
                found[row] = values
        return found

    def logprobs_of(self, answers: Answers, temperature: float = 1.0) -> list[Tensor]:
        return self.logprobs(answers.rows(self.chat_format, self.stage.config.data), temperature)


@contextmanager
def reading(stage: Stage, directory: Path) -> Iterator[Reader]:
    """A laptop holds no four models: this one is let go at the end."""
    reader = Reader(stage, directory)
    try:
        yield reader
    finally:
        del reader.policy
        gc.collect()


class RewardModel:
    """Scores answers, in whatever tokens they were generated."""

    def __init__(self, stage: Stage, directory: Path):
        self.stage, self.directory = stage, directory
        self.chat_format = ChatFormat.load(directory)
        model = load_scorer(directory, self.chat_format, stage.dtype, trained=True)
        self.scorer = Scorer(model).to(stage.ranks.device).eval()

    @torch.no_grad()
    def scores(self, rows: Sequence[Row]) -> list[float]:
        """Of each row's last token; the same row has the same score, whatever it shared a batch with.

        Raises UserError where a score is no number.
        """
        keys = [(tuple(prompt.tolist()), tuple(response.tolist())) for prompt, response in rows]
        different = dict(zip(keys, rows, strict=True))
        order, found = list(different), dict.fromkeys(different, math.nan)
        for chosen, batch in batches(self.stage, list(different.values())):
            scores = at_last_token(self.scorer(batch), batch).tolist()
            found.update(zip((order[row] for row in chosen), scores, strict=True))
        if not all(map(math.isfinite, found.values())):
            raise UserError(
                f"The reward model in {self.directory} gives scores that are no finite numbers, so nothing can be "
                f"judged by it; try dtype=fp32, or choose another one."
            )
        return [found[key] for key in keys]

    def scores_of_both(self, theirs: Answers, ours: Answers) -> tuple[list[float], list[float]]:
        """Of two models' answers; one that both gave has one score, so it is a tie."""
        first, second = (
            answers.rows(self.chat_format, self.stage.config.data, to_score=True) for answers in (theirs, ours)
        )
        scores = self.scores([*first, *second])
        return scores[: len(first)], scores[len(first) :]


def batches(stage: Stage, rows: Sequence[Row]) -> Iterator[tuple[list[int], TokenBatch]]:
    """Row numbers and their tokens, in micro-batches of rlhf.micro_batch_tokens."""
    if not rows:
        return
    lengths = [len(prompt) + len(response) for prompt, response in rows]
    for micro_batch in plan_micro_batches(lengths, stage.config.rlhf.micro_batch_tokens)[0]:
        chosen = micro_batch.rows
        yield chosen, TokenBatch.of([rows[row] for row in chosen], stage.ranks.device)
