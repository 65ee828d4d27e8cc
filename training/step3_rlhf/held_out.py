"""What the policy answers to held-out prompts while it learns, measured; nothing is learned from it."""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from inference.chat_format import ChatFormat
from inference.generation.sampler import SamplingKey
from training.data.split import once
from training.evaluation.comparison import EVALUATION_ITERATION
from training.evaluation.statistics import distinct_bigrams, mean
from training.rewards import Rewards
from training.stage import Stage
from training.step3_rlhf.experience import Experience
from training.step3_rlhf.ppo_math import kl_k3
from training.step3_rlhf.rollout import Rollouts

ITERATION = EVALUATION_ITERATION + 1
"""Draws of its own: apart from every iteration's and from the comparison's at the end."""


class HeldOut:
    """The prompts of rlhf.eval_every, the same in every evaluation, answered with the same random numbers.

    They are the last of the run's held-out prompts; the comparison at the end takes the first ones.
    """

    def __init__(
        self, stage: Stage, rollouts: Rollouts, rewards: Rewards, chat_format: ChatFormat, rows: Sequence[dict]
    ):
        self.stage, self.rollouts, self.rewards, self.chat_format = stage, rollouts, rewards, chat_format
        settings, limit = stage.config.rlhf, stage.config.data.max_prompt_tokens
        self.rows = once(rows, evaluation=True)[-settings.eval_prompts :] if settings.eval_every else []
        self.prompts = [encode_prompt(row, chat_format, limit) for row in self.rows]

    def measure(self) -> dict[str, float]:
        """The present policy's metrics. All ranks call it and get the same. Raises RewardFailed."""
        begun = time.perf_counter()
        experience = self.rollouts.answers(self.prompts, SamplingKey(self.stage.seed, ITERATION))
        texts = [self.chat_format.decode(e.response.tolist()) for e in experience]
        prompts, extras = zip(*((row["prompt"], row.get("extra", {})) for row in self.rows), strict=True)
        totals, means = self.rewards.total([e.score for e in experience], list(prompts), texts, list(extras), group=1)
        kl = {"eval/kl": mean_kl(experience)} if self.stage.config.rlhf.has_reference else {}
        return {
            "eval/reward": mean(totals),
            **{f"eval/reward/{name}": value for name, value in means.items() if len(means) > 1},
            **kl,
            "eval/length": mean([len(e.response) for e in experience]),
            "eval/ended_fraction": mean([e.ended for e in experience]),
            "eval/distinct_bigrams": distinct_bigrams(texts),
            "time/evaluate": time.perf_counter() - begun,
        }


def encode_prompt(row: dict, chat_format: ChatFormat, max_tokens: int) -> Tensor:
    return torch.tensor(chat_format.prompt_ids(row["prompt"], max_tokens))


def rank_within(bound: float, evaluation: Mapping[str, float]) -> tuple[float] | None:
    """For keep=best: by reward, none where the KL is over the bound. Without a reference it is not measured."""
    return (evaluation["eval/reward"],) if evaluation.get("eval/kl", 0.0) <= bound else None


def mean_kl(experience: list[Experience]) -> float:
    """To the reference, nats a response (k3)."""
    return mean([float(kl_k3(e.logprobs, e.reference_logprobs).sum()) for e in experience])
