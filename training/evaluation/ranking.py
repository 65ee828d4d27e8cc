"""How often a reward model ranks held-out pairs as people did, by the length of the longer answer."""

from collections.abc import Hashable, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any, TypedDict

from training.config import DataSettings
from training.data.split import choose_groups
from training.data.token_cache import LENGTH_BUCKETS, TokenPair, left_out, length_bucket, rows_of
from training.evaluation.candidates import encode
from training.evaluation.statistics import effective_size, share

if TYPE_CHECKING:
    from training.evaluation.candidates import RewardModel


class Accuracy(TypedDict):
    pairs: int
    questions: int
    """Different ones; pairs under one are not independent, and the interval knows it."""
    rate: float
    low: float
    high: float


def reward_accuracy(model: "RewardModel", rows: Sequence[Any], data: DataSettings) -> dict[str, Accuracy]:
    """`all`, `up_to_N_tokens` for each length that occurs, `unseen_questions` where the data know them.

    As in step 2, pairs whose answers are the same within data.max_response_tokens are left out: there is nothing to
    rank. Empty where no pair is left.
    """
    found = [(row, token_pair(model, row, data)) for row in rows]
    kept = [(row, pair) for row, pair in found if pair.differs]
    if len(kept) < len(found):
        model.stage.display.say(left_out(len(found) - len(kept), len(found), data.max_response_tokens))
    pairs = [pair for _, pair in kept]
    scores = model.scores(rows_of(pairs))
    right = [a > b for a, b in zip(scores[: len(pairs)], scores[len(pairs) :], strict=True)]
    lengths, unseen = [pair.longer for pair in pairs], [pair.is_unseen for pair in pairs]
    return accuracy_by_length(right, lengths, unseen, groups_of([row for row, _ in kept]))


def groups_of(rows: Sequence[Any]) -> Sequence[Hashable]:
    """The question of each pair. Where all have the same one, a pair stands for itself: what is drawn are answers."""
    groups = list(map(choose_groups(rows), rows))
    return groups if len(set(groups)) > 1 else range(len(rows))


def token_pair(model: "RewardModel", row: Any, data: DataSettings) -> TokenPair:
    """A row of pairs as `model` reads it, within the limits that training has too."""
    prompt, chosen = encode(model.chat_format, row["prompt"], row["chosen"], data)
    _, rejected = encode(model.chat_format, row["prompt"], row["rejected"], data)
    return TokenPair.of(row, (prompt, chosen, rejected))


def accuracy_by_length(
    right: Sequence[bool],
    lengths: Sequence[int],
    unseen: Sequence[bool],
    questions: Sequence[Hashable] | None = None,
) -> dict[str, Accuracy]:
    """One entry a pair in each: ranked right, tokens of the longer answer, question not trained on, question (all are
    different where it is left out)."""
    questions = range(len(right)) if questions is None else questions
    buckets = [length_bucket(length) for length in lengths]
    members = {"all": [True] * len(right)}
    for bucket in LENGTH_BUCKETS:
        members[f"up_to_{bucket}_tokens"] = [each == bucket for each in buckets]
    members["unseen_questions"] = list(unseen)
    found = {}
    for name, belongs in members.items():
        if any(belongs):
            found[name] = accuracy(list(compress(right, belongs)), list(compress(questions, belongs)))
    return found


def accuracy(right: Sequence[bool], questions: Sequence[Hashable]) -> Accuracy:
    rate, low, high = share(sum(right), len(right), effective_size(right, questions))
    return {"pairs": len(right), "questions": len(set(questions)), "rate": rate, "low": low, "high": high}
