"""How often a reward model ranks held-out pairs as people did, by the length of the longer answer."""

from collections.abc import Sequence
from typing import TypedDict

from training.config import DataSettings
from training.evaluation.answers import encode
from training.evaluation.scoring import RewardModel
from training.evaluation.statistics import share
from training.step2_reward.reward import LENGTH_BUCKETS, length_bucket


class Accuracy(TypedDict):
    pairs: int
    rate: float
    low: float
    high: float


def reward_accuracy(model: RewardModel, pairs: Sequence[dict], data: DataSettings) -> dict[str, Accuracy]:
    """`all`, `up_to_N_tokens` for each length that occurs, `unseen_questions` where the data know them."""
    rows = [
        encode(model.chat_format, pair["prompt"], pair[side], data) for side in ("chosen", "rejected") for pair in pairs
    ]
    scores = model.scores(rows)
    right = [a > b for a, b in zip(scores[: len(pairs)], scores[len(pairs) :], strict=True)]
    lengths = [max(len(rows[i][1]), len(rows[i + len(pairs)][1])) for i in range(len(pairs))]
    unseen = [bool(pair.get("held_out_question")) for pair in pairs]
    return accuracy_by_length(right, lengths, unseen)


def accuracy_by_length(right: Sequence[bool], lengths: Sequence[int], unseen: Sequence[bool]) -> dict[str, Accuracy]:
    """One entry a pair in each: ranked right, tokens of the longer answer, question not trained on."""
    groups = {"all": list(right)}
    buckets = [length_bucket(length) for length in lengths]
    for bucket in LENGTH_BUCKETS:
        groups[f"up_to_{bucket}_tokens"] = [r for r, b in zip(right, buckets, strict=True) if b == bucket]
    groups["unseen_questions"] = [r for r, u in zip(right, unseen, strict=True) if u]
    return {name: accuracy(group) for name, group in groups.items() if group}


def accuracy(right: Sequence[bool]) -> Accuracy:
    rate, low, high = share(sum(right), len(right))
    return {"pairs": len(right), "rate": rate, "low": low, "high": high}
