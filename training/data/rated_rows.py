"""Answers that have a row each, and a label or a score -> pairs of those to one prompt."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from training.data.rated_answers import RANK, SCORES, ahead, number
from training.data.rows import PairRow

BAD_ALONE = "an answer that is labelled as bad, and its prompt has none that is labelled as good"
BAD_AND_GOOD = "the same answer to the prompt is labelled as bad and as good"
NOT_IN_PAIR = "one of several rated answers to its prompt, of which the best and the worst are the pair"


@dataclass(frozen=True)
class Rating:
    """What is said of an answer that has a row of its own."""

    value: float
    """More is better; of a label 1 or 0."""
    column: str
    is_label: bool

    @property
    def is_bad(self) -> bool:
        """Whether a label says so; of a score alone nobody knows."""
        return self.is_label and not self.value


def rating_of(row: Mapping[str, Any]) -> Rating | None:
    """The score or rank in a row with one answer."""
    for column in (*SCORES, RANK):
        if (value := number(row.get(column))) is not None and not isinstance(row[column], bool):
            return Rating(-value if column == RANK else value, column, is_label=False)
    return None


@dataclass
class Pairing:
    """Which rows of a source become pairs, by their places in the list of its rows."""

    pairs: dict[int, list[PairRow]] = field(default_factory=lambda: defaultdict(list))
    absorbed: set[int] = field(default_factory=set)
    """The answers of the pairs."""
    left_out: dict[int, str] = field(default_factory=dict)
    """With the reason."""

    def add(self, rows: Sequence[Any], better: int, worse: int, margin: float | None = None) -> None:
        """The pair takes the place of the better answer, or, if that has one, of the worse."""
        row = {
            "prompt": rows[better]["prompt"],
            "chosen": rows[better]["response"],
            "rejected": rows[worse]["response"],
        }
        said = {} if margin is None else {"margin": margin}
        self.pairs[worse if better in self.pairs else better].append(cast(PairRow, row | said))
        self.absorbed |= {better, worse}


def pair_rows(rows: Sequence[Any], ratings: Mapping[int, Rating], every: bool = False) -> Pairing:
    """Answers to the same prompt. Each that is labelled as bad is paired with one labelled as good, these in turn, or
    with `every` one; of answers with scores the best and the worst are the pair, or every two with different scores,
    and where all are alike they stay as they are."""
    groups: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for place, rating in ratings.items():
        prompt = [(message["role"], message["content"].strip()) for message in rows[place]["prompt"]]
        groups[json.dumps(prompt), rating.is_label].append(place)
    found = Pairing()
    for (_, is_label), places in groups.items():
        (pair_by_label if is_label else pair_by_score)(found, rows, places, ratings, every)
    return found


def pair_by_label(
    found: Pairing, rows: Sequence[Any], places: list[int], ratings: Mapping[int, Rating], every: bool
) -> None:
    good, bad = ([place for place in places if ratings[place].is_bad == is_bad] for is_bad in (False, True))
    for turn, place in enumerate(bad):
        others = [each for each in good if rows[each]["response"] != rows[place]["response"]]
        for other in others if every else others[turn % max(1, len(others)) :][:1]:
            found.add(rows, other, place)
        if not others:
            found.left_out[place] = BAD_AND_GOOD if good else BAD_ALONE


def pair_by_score(
    found: Pairing, rows: Sequence[Any], places: list[int], ratings: Mapping[int, Rating], every: bool
) -> None:
    scores = {place: ratings[place].value for place in places}
    best, worst = (choose(places, key=lambda place: scores[place]) for choose in (max, min))
    if scores[best] == scores[worst] or rows[best]["response"] == rows[worst]["response"]:
        return
    for better, worse in ahead(scores) if every else [(best, worst)]:
        if rows[better]["response"] != rows[worse]["response"]:
            found.add(rows, better, worse, scores[better] - scores[worse])
    found.left_out |= dict.fromkeys(set(places) - found.absorbed, NOT_IN_PAIR)
