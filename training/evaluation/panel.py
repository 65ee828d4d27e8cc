"""How far a reward model agrees with people who rated texts that it was not trained on.

Of two texts whose mean ratings are at least 1 apart, does it give the higher score to the one that the panel does? A
tie counts half. Beside it stand the lexicon, which the reward never saw, and one person: a rating of each text, drawn
from its 20 to about 100, and held against the means of the others.
"""

import json
import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from inference.chat_format import ChatFormat
from training.data.chitchat import upbeat_score
from training.data.rated_texts import SCORE_GAP
from training.data.rows import PANEL_FILE, read_rows
from training.data_settings import DataSettings
from training.evaluation.candidates import Row, encode
from training.evaluation.statistics import Z, share
from training.run_directory import RunDirectory, write_text


class Rate(TypedDict):
    rate: float
    low: float
    high: float


class Agreement(TypedDict):
    """How far each judge agrees with the panel on texts of one kind."""

    texts: int
    pairs: int
    learned: Rate
    person: Rate
    lexicon: Rate
    over_lexicon: Rate  # learned less lexicon, on the same pairs


@dataclass(frozen=True)
class PairMean:
    """The mean of a value over pairs of texts. Pairs that share a text are not independent."""

    value: float
    pairs: int
    by_text: Tensor  # float64 (texts), what each adds to the error

    @property
    def error(self) -> float:
        """The standard error over draws of texts, not of pairs (Aronow, Samii and Assenova 2015, Political Analysis 23,
        564-577, without their correction for what a pair has in common with itself, so it errs to the wide side)."""
        return float(self.by_text.square().sum().sqrt())

    def rate(self) -> Rate:
        """Return a share, with an interval that stays within [0, 1]."""
        independent = self.value * (1 - self.value) / self.error**2 if self.error else len(self.by_text) / 2
        rate, low, high = share(self.value, 1, min(self.pairs, independent))
        return {"rate": rate, "low": low, "high": high}

    def difference(self) -> Rate:
        return {"rate": self.value, "low": self.value - Z * self.error, "high": self.value + Z * self.error}


def mean_over_pairs(values: Tensor, counted: Tensor) -> PairMean:
    """Average `values` where `counted`; both are (texts, texts), symmetric. Raises ValueError where no pair counts."""
    twice = int(counted.sum())
    if not twice:
        raise ValueError("there is no mean over no pairs")
    mean = float((values * counted).sum() / twice)
    return PairMean(mean, twice // 2, ((values - mean) * counted).sum(1) * 2 / twice)


def ranked_right(first_higher: Tensor, means: Tensor) -> Tensor:
    """(texts, texts), symmetric: of [i, j] how far a judge agrees who puts i higher by `first_higher`, from 0 to 1."""
    return torch.where(means[:, None] > means, first_higher, 1 - first_higher)


def by_score(scores: Sequence[float]) -> Tensor:
    """(texts, texts): 1 where the first has the higher score, 1/2 where both have the same."""
    values = torch.tensor(scores, dtype=torch.float64)
    return (values[:, None] > values).double() + (values[:, None] == values).double() / 2


def one_against_others(ratings: Sequence[Sequence[int]]) -> Tensor:
    """(texts, texts), symmetric: how often a rating of each orders two texts as the means of all other ratings do.

    Over all ratings of both; a tie counts half, and so does a text with a single rating, which leaves no others.
    """
    values = sorted({rating for of_text in ratings for rating in of_text})
    counts = [[list(of_text).count(value) / len(of_text) for value in values] for of_text in ratings]
    shares = torch.tensor(counts, dtype=torch.float64)
    others = torch.tensor([len(of_text) - 1 for of_text in ratings], dtype=torch.float64)
    sums = torch.tensor([sum(of_text) for of_text in ratings], dtype=torch.float64)
    right = torch.zeros(len(ratings), len(ratings), dtype=torch.float64)  # less wrong
    for low, high in combinations(range(len(values)), 2):
        first, second = (sums - values[high])[:, None] * others, (sums - values[low]) * others[:, None]
        right += shares[:, high, None] * shares[:, low] * (first - second).sign()  # the means' order, in whole numbers
    return (1 + right + right.T) / 2


@dataclass(frozen=True)
class Judged:
    """Texts of one kind and what each judge makes of their pairs."""

    pairs: Tensor  # bool (texts, texts), those that count
    learned: Tensor
    person: Tensor
    lexicon: Tensor
    """These are (texts, texts), symmetric: how far the judge agrees with the panel, from 0 to 1."""

    @classmethod
    def of(cls, rows: Sequence[Any], scores: Sequence[float], lexicon: Sequence[float]) -> "Judged":
        means = torch.tensor([row["mean"] for row in rows], dtype=torch.float64)
        learned, by_lexicon = (ranked_right(by_score(of_judge), means) for of_judge in (scores, lexicon))
        person = one_against_others([row["ratings"] for row in rows])
        return cls((means[:, None] - means).abs() >= SCORE_GAP, learned, person, by_lexicon)

    def agreement(self) -> Agreement:
        judges = (self.learned, self.person, self.lexicon)
        learned, person, lexicon = (mean_over_pairs(judge, self.pairs).rate() for judge in judges)
        return {
            "texts": len(self.pairs),
            "pairs": int(self.pairs.sum()) // 2,
            "learned": learned,
            "person": person,
            "lexicon": lexicon,
            "over_lexicon": self.over_lexicon().difference(),
        }

    def over_lexicon(self) -> PairMean:
        return mean_over_pairs(self.learned - self.lexicon, self.pairs)


def panel_agreement(rows: Sequence[Any], scores: Sequence[float]) -> dict[str, Agreement]:
    """Compare the learned `scores`, one a row, with people's ratings; by kind of text, where pairs count."""
    agreement_of: dict[str, Agreement] = {}
    for domain in dict.fromkeys(row["domain"] for row in rows):
        chosen = [i for i, row in enumerate(rows) if row["domain"] == domain]
        texts = [rows[i] for i in chosen]
        judged = Judged.of(texts, [scores[i] for i in chosen], [upbeat_score(row["response"]) for row in texts])
        if judged.pairs.any():
            agreement_of[domain] = judged.agreement()
    return agreement_of


def read_panel(run: RunDirectory) -> list[Any]:
    """Read the run's rated texts; none where its data have no such texts."""
    file = run.data / PANEL_FILE
    return read_rows(file) if file.exists() else []


def write_scores(file: Path, rows: Sequence[Any], scores: Sequence[float]) -> None:
    """Write a line for each text: kind, mean rating, learned score and lexicon's."""
    lines = [
        {
            "domain": row["domain"],
            "response": row["response"],
            "mean": row["mean"],
            "learned": score,
            "lexicon": upbeat_score(row["response"]),
        }
        for row, score in zip(rows, scores, strict=True)
    ]
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def rows_to_score(rows: Sequence[Any], chat_format: ChatFormat, data: DataSettings) -> list[Row]:
    return [encode(chat_format, row["prompt"], row["response"], data) for row in rows]


def pooled(means: Sequence[PairMean], texts: Sequence[Sequence[Hashable]]) -> PairMean:
    """Average several runs' means; `texts` names those of each run, for one text's errors go together."""
    by_text: dict[Hashable, float] = defaultdict(float)
    for mean, names in zip(means, texts, strict=True):
        for name, error in zip(names, mean.by_text.tolist(), strict=True):
            by_text[name] += error / len(means)
    value = math.fsum(mean.value for mean in means) / len(means)
    return PairMean(value, sum(mean.pairs for mean in means), torch.tensor(list(by_text.values()), dtype=torch.float64))
