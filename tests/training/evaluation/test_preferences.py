"""What the preferences of people say, worked out by hand."""

import pytest

from inference.preferences import Preference
from tests.training.evaluation.preferences import preference
from training.evaluation import preferences, statistics

ROUND2 = ("round2/rlhf", "Certainly!")


def test_the_win_rate_is_of_the_pair_alone_and_a_tie_counts_half():
    found = [
        *(preference("ann", "other", f"question {i}", swapped=i % 2 == 0) for i in range(6)),
        preference("ben", "one", "question 6"),
        preference("ben", "tie", "question 7"),
        preference("ben", "both bad", "question 8"),
        *(preference("ann", "one", f"question {i}", other=ROUND2) for i in range(20)),
        preference("ann", "one", "question 9", one=("demo/rlhf", "No."), other=("demo/rlhf", "Yes!")),
    ]
    result = preferences.win_rates(found, "demo/rlhf", "demo/sft")
    assert result is not None
    together = result["together"]
    assert (together["preferences"], together["ties"], together["both_bad"], together["questions"]) == (9, 1, 1, 9)
    assert together["rate"] == pytest.approx(7 / 9)
    low, high = statistics.win_interval(6 / 9, 1 / 9, 9)
    assert (together["low"], together["high"]) == pytest.approx((low, high))
    assert {name: each["rate"] for name, each in result["by"].items()} == {"ann": 1.0, "ben": pytest.approx(1 / 3)}
    turned = preferences.win_rates(found, "demo/sft", "demo/rlhf")
    assert turned is not None and turned["together"]["rate"] == pytest.approx(2 / 9)
    assert preferences.win_rates(found, "demo/rlhf", "demo/rlhf") is None
    assert preferences.compared(found) == [("demo/sft", "round2/rlhf"), ("demo/rlhf", "demo/sft")]


def test_preferences_on_one_question_are_not_independent():
    apart = preferences.win_rate(
        [preference("ann", "other", f"question {i}", other=("demo/rlhf", f"{i}")) for i in range(8)], "demo/rlhf"
    )
    alike = [preference("ann", "other", f"question {i % 2}", other=("demo/rlhf", f"{i}")) for i in range(8)]
    together = preferences.win_rate(alike, "demo/rlhf")
    assert (apart["questions"], together["questions"]) == (8, 2)
    assert together["high"] - together["low"] > apart["high"] - apart["low"]


def test_the_last_word_of_a_person_on_a_pair_counts_whatever_its_sides():
    found = [preference("ann", "one"), preference("ben", "one"), preference("ann", "other", swapped=True)]
    result = preferences.win_rates(found, "demo/rlhf", "demo/sft")
    assert result is not None
    assert (
        result["together"]["preferences"] == 2
        and result["by"]["ann"]["rate"] == 1.0
        and result["by"]["ben"]["rate"] == 0.0
    )


def test_the_same_words_of_another_model_are_another_pair():
    found = [preference("ann", "other"), preference("ann", "one", other=("round2/rlhf", "Yes!"))]
    result = preferences.win_rates(found, "demo/rlhf", "demo/sft")
    assert result is not None and result["together"]["rate"] == 1.0


def judged(by: str, said: str, swapped: bool = False) -> list[Preference]:
    """A letter a question: o(ne), O(ther), t(ie), b(oth bad)."""
    words = {"o": "one", "O": "other", "t": "tie", "b": "both bad"}
    return [preference(by, words[letter], f"question {i}", swapped=swapped) for i, letter in enumerate(said)]


def test_agreement_of_two_people():
    """9 of 10 alike; ann finds one of the two better in 7 of 10, ben in 6, and by chance half of these are the same."""
    (of_both,) = preferences.agreements([*judged("ann", "oooOOOOttb"), *judged("ben", "oooOOOtttb", swapped=True)])
    assert of_both["people"] == ["ann", "ben"] and of_both["pairs"] == 10 and of_both["same"] == pytest.approx(0.9)
    chance = 0.7 * 0.6 / 2 + 0.2 * 0.3 + 0.1 * 0.1
    assert of_both["kappa"] == pytest.approx((0.9 - chance) / (1 - chance))
    _, low, high = statistics.share(9, 10)
    assert (of_both["low"], of_both["high"]) == pytest.approx((low, high))
    assert of_both["kappa_low"] == pytest.approx((low - chance) / (1 - chance))


def test_agreement_by_chance_alone_is_none():
    found = [*judged("ann", "oOoO" * 5), *judged("ben", "ooOO" * 5, swapped=True)]
    (of_both,) = preferences.agreements(found)
    assert of_both["same"] == 0.5 and of_both["kappa"] == pytest.approx(0.0)
    (never_better,) = preferences.agreements([*judged("ann", "ttt"), *judged("ben", "ttt")])
    assert never_better["same"] == 1.0 and never_better["kappa"] is None
    assert preferences.agreements([*judged("ann", "oo"), preference("ben", "one", "another question")]) == []


def test_agreement_with_oneself_is_of_the_first_and_the_last_time():
    found = [
        *judged("ann", "oOt"),
        *judged("ben", "o"),
        *judged("ann", "ooO", swapped=True),
        *judged("ann", "oO"),
    ]
    ((name, of_ann),) = preferences.repeated(found).items()
    assert (name, of_ann["pairs"], of_ann["same"]) == ("ann", 3, pytest.approx(2 / 3))


def test_the_side_that_each_person_prefers():
    found = [preference("ann", "one", f"{i}") for i in range(30)] + [
        preference("ann", "tie", "t"),
        preference("ben", "tie"),
    ]
    assert preferences.left(found) == {
        "ann": {"preferences": 30, "rate": 1.0, "low": pytest.approx(30 / (30 + 1.96**2)), "high": 1.0}
    }
    even = preferences.left([preference("ann", "one", f"{i}", swapped=i % 2 == 0) for i in range(30)])
    assert even["ann"]["rate"] == 0.5 and even["ann"]["low"] < 0.5 < even["ann"]["high"]


def test_an_overview_counts_everything():
    found = [*judged("ben", "oOtb"), *judged("ann", "oo"), *judged("ben", "o")]
    seen = preferences.overview(found)
    assert (
        seen["preferences"] == 7 and seen["by"] == {"ben": 5, "ann": 2} and (seen["ties"], seen["both_bad"]) == (1, 1)
    )
    assert list(seen["left"]) == ["ben", "ann"] and seen["repeated"]["ben"]["pairs"] == 1
    assert seen["agreement"][0]["people"] == ["ben", "ann"] and seen["agreement"][0]["pairs"] == 2
