"""Agreement with people, against sums by hand and against draws."""

import random
from dataclasses import replace
from fractions import Fraction
from itertools import combinations

import pytest
import torch

from training.data.chitchat import upbeat_score
from training.evaluation.comparison import groups_of
from training.evaluation.panel import Judged, mean_over_pairs, panel_agreement, pooled

RATINGS = [[4, 3, 4], [1, 1, 1], [-1, 0, 1], [4, 2, -1, -1], [-4, -3, -2]]
TEXTS = ["What a great and lovely day", "It is a table", "Not good", "A fine thing", "Awful, I hate it"]
SCORES = [1.5, -0.2, 0.3, 0.3, -0.1]


def rows(domain="tweets"):
    return [
        {"domain": domain, "response": text, "mean": sum(ratings) / len(ratings), "ratings": ratings}
        for text, ratings in zip(TEXTS, RATINGS, strict=True)
    ]


def half(a, b):
    return 1.0 if a > b else 0.5 if a == b else 0.0


def of_each(ratings):
    """Each rating and the mean of the others."""
    return [(rating, Fraction(sum(ratings) - rating, len(ratings) - 1)) for rating in ratings]


def one_alone(first, second):
    (rating, others), (other_rating, others_of_other) = first, second
    same, judged = half(rating, other_rating), half(others, others_of_other)
    return 0.5 if 0.5 in (same, judged) else float(same == judged)


def test_agreement_is_that_of_each_pair_by_hand():
    found = panel_agreement([*rows(), *rows("reviews")], [*SCORES, *[-score for score in SCORES]])
    expected = {"learned": [], "person": [], "lexicon": []}
    for i, j in combinations(range(5), 2):
        means = [sum(RATINGS[k]) / len(RATINGS[k]) for k in (i, j)]
        if abs(means[0] - means[1]) < 1:
            continue
        i, j = (i, j) if means[0] > means[1] else (j, i)
        expected["learned"].append(half(SCORES[i], SCORES[j]))
        expected["lexicon"].append(half(upbeat_score(TEXTS[i]), upbeat_score(TEXTS[j])))
        alone = [one_alone(a, b) for a in of_each(RATINGS[i]) for b in of_each(RATINGS[j])]
        expected["person"].append(sum(alone) / len(alone))
    assert len(expected["learned"]) == 9  # the texts of means 1 and 1 are not 1 apart
    without_one = [mean for _, mean in of_each(RATINGS[3])], [mean for _, mean in of_each(RATINGS[2])]
    assert min(without_one[0]) < max(without_one[1])  # the panel's order hangs on one rating of each
    rates = {judge: sum(values) / 9 for judge, values in expected.items()}
    tweets, reviews = found["tweets"], found["reviews"]
    assert tweets["texts"] == 5 and tweets["pairs"] == 9
    for judge, rate in rates.items():
        assert tweets[judge]["rate"] == pytest.approx(rate)
        assert 0 <= tweets[judge]["low"] < tweets[judge]["rate"] <= tweets[judge]["high"] <= 1
    assert tweets["over_lexicon"]["rate"] == pytest.approx(rates["learned"] - rates["lexicon"])
    assert reviews["learned"]["rate"] == pytest.approx(1 - rates["learned"])


def test_pairs_under_one_prompt_stand_for_themselves():
    def pair(question, answer):
        return {"prompt": [{"role": "user", "content": question}], "chosen": answer, "rejected": "no"}

    assert len(set(groups_of([pair("Say something.", answer) for answer in "abc"]))) == 3
    assert len(set(groups_of([pair("One?", "a"), pair("One?", "b"), pair("Two?", "c")]))) == 2


def test_a_kind_of_text_without_pairs_far_enough_apart_is_left_out():
    assert panel_agreement(rows()[1:2] * 3, [1.0, 2.0, 3.0]) == {}
    with pytest.raises(ValueError, match="no pairs"):
        mean_over_pairs(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool))


def draw(texts, rng):
    """Texts whose scores err by as much as a text is hard."""
    found = []
    for _ in range(texts):
        mean = rng.uniform(-3, 3)
        found.append(({"mean": mean, "ratings": [0]}, mean + rng.gauss(0, 1.2), mean + rng.gauss(0, 1.5)))
    return Judged.of(*map(list, zip(*found, strict=True)))


def test_the_interval_is_that_of_draws_of_texts():
    """95 % of draws hold what a large one finds; pairs as if independent would hold it in far fewer."""
    rng = random.Random(5)
    judged = draw(1500, rng)
    truth = mean_over_pairs(judged.learned, judged.pairs).value, judged.over_lexicon().value
    held, too_narrow = [0, 0], 0
    for _ in range(120):
        judged = draw(60, rng)
        learned, difference = mean_over_pairs(judged.learned, judged.pairs), judged.over_lexicon()
        for place, (interval, value) in enumerate(((learned.rate(), truth[0]), (difference.difference(), truth[1]))):
            held[place] += interval["low"] <= value <= interval["high"]
        too_narrow += abs(learned.value - truth[0]) <= 1.96 * (truth[0] * (1 - truth[0]) / learned.pairs) ** 0.5
    assert all(108 <= count <= 119 for count in held), held
    assert too_narrow < 96


def test_all_pairs_right_are_worth_half_as_many_as_there_are_texts():
    judged = Judged.of([{"mean": mean, "ratings": [0]} for mean in range(20)], list(range(20)), list(range(20)))
    found = judged.agreement()["learned"]
    assert found["rate"] == 1 and found["low"] == pytest.approx(10 / (10 + 1.96**2))  # Wilson's, of 10


def test_pooled_over_runs_a_text_of_several_runs_counts_once():
    rng = random.Random(2)
    first, second = (draw(50, rng).over_lexicon() for _ in range(2))
    names = [f"text {i}" for i in range(50)]
    same, apart = (
        pooled([first, replace(first)], [names, names]),
        pooled([first, second], [names, [f"other {n}" for n in names]]),
    )
    assert (same.value, same.error) == pytest.approx((first.value, first.error))
    assert apart.value == pytest.approx((first.value + second.value) / 2)
    assert apart.error == pytest.approx((first.error**2 + second.error**2) ** 0.5 / 2)
