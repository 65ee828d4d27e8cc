"""Measures of sets of replies; expected values by hand."""

import math

import pytest

from training.evaluation.statistics import distinct_bigrams, mean, most_frequent_share, share, win_rate, words


def test_a_tie_counts_half_and_the_interval_is_that_of_a_mean():
    # a win, a loss, two ties: 1 0 0.5 0.5, mean 0.5, squared errors 0.25 + 0.25 over 3, 1.96 * sqrt(1/6 / 4)
    rate, low, high = win_rate([3.0, 1.0, 2.0, 0.0], [1.0, 2.0, 2.0, 0.0])
    assert rate == 0.5
    assert (low, high) == pytest.approx((0.5 - 1.96 * math.sqrt(1 / 24), 0.5 + 1.96 * math.sqrt(1 / 24)))


def test_the_interval_ends_at_0_and_1():
    # 1 1 1 0: mean 0.75, squared errors 3 * 0.0625 + 0.5625 = 0.75 over 3, 1.96 * sqrt(0.25 / 4) = 0.49
    assert win_rate([1, 1, 1, 0], [0, 0, 0, 1]) == pytest.approx((0.75, 0.26, 1.0))
    assert win_rate([0, 0, 0, 1], [1, 1, 1, 0]) == pytest.approx((0.25, 0.0, 0.74))


def test_the_interval_shrinks_with_the_root_of_the_number_of_prompts():
    # 50 wins and 50 losses: variance 100 * 0.25 / 99
    rate, low, high = win_rate([1, 0] * 50, [0, 1] * 50)
    assert (rate, high - low) == pytest.approx((0.5, 2 * 1.96 * math.sqrt(25 / 99 / 100)))


def test_one_prompt_has_a_win_rate():
    assert win_rate([2.0], [1.0]) == (1.0, 1.0, 1.0)


def test_win_rate_needs_both_answers_to_every_prompt():
    with pytest.raises(ValueError):
        win_rate([1.0, 2.0], [1.0])


def test_words_are_lower_case_and_marks_stand_alone():
    assert words("Well, I CAN'T...  Ça va?") == ["well", ",", "i", "can", "'", "t", ".", ".", ".", "ça", "va", "?"]


def test_distinct_bigrams():
    # i am, am ., . i, i am: three kinds of four
    assert distinct_bigrams(["I am. I am"]) == 0.75
    assert distinct_bigrams(["good day", "Good day", "good night"]) == pytest.approx(2 / 3)  # counted over all replies
    assert distinct_bigrams(["a b", "b a"]) == 1.0  # no pair reaches from one reply into the next: (b, b) is none
    assert distinct_bigrams(["hello", ""]) == 0.0


def test_most_frequent_share_leaves_case_and_outer_space_aside():
    assert most_frequent_share(["Yes", " yes\n", "Yes.", "no"]) == 0.5
    assert most_frequent_share(["", "", "no"]) == pytest.approx(2 / 3)
    assert most_frequent_share(["only"]) == 1.0


def test_mean():
    assert mean([1.0, 2.0, 6.0]) == 3.0


def test_a_share_has_the_interval_of_wilson():
    # 81 of 263: the worked example of Newcombe (1998), Statistics in Medicine 17, table I: 0.2553 to 0.3662
    rate, low, high = share(81, 263)
    assert (rate, low, high) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=1e-4)
    # 20 of 20: low end n / (n + z^2)
    assert share(20, 20) == pytest.approx((1.0, 20 / (20 + 1.96**2), 1.0))
    assert share(0, 20) == pytest.approx((0.0, 0.0, 1.96**2 / (20 + 1.96**2)))
