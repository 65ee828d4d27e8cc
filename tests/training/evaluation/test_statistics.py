"""Measures of sets of replies; expected values by hand."""

import math
import random
from collections.abc import Iterator
from functools import cache

import pytest

from training.evaluation.statistics import (
    distinct_bigrams,
    effective_size,
    mean,
    most_frequent_share,
    perplexity,
    share,
    win_interval,
    win_rate,
    words,
)


def test_a_tie_counts_half():
    assert win_rate([3.0, 1.0, 2.0, 0.0], [1.0, 2.0, 2.0, 0.0])[0] == 0.5
    assert win_rate([1, 1, 1, 0], [0, 0, 1, 1])[0] == 0.625


def test_the_interval_is_that_of_tango_for_paired_proportions():
    """Its ends are the differences whose own variance explains what was seen: z is 1.96 there, and no more inside."""
    for wins, losses, n in ((20, 5, 40), (3, 0, 10), (1, 7, 9), (0, 2, 30)):
        for end in win_interval(wins / n, losses / n, n):
            assert abs(tango_z(wins, losses, n, 2 * end - 1)) == pytest.approx(1.96, abs=1e-3)
        low, high = win_interval(wins / n, losses / n, n)
        assert abs(tango_z(wins, losses, n, low + high - 1)) < 1.96


def tango_z(wins: int, losses: int, n: int, difference: float) -> float:
    """The score, with the likeliest rate of losses under `difference` searched for."""

    def likelihood(loss: float) -> float:
        seen = ((wins, loss + difference), (losses, loss), (n - wins - losses, 1 - difference - 2 * loss))
        return sum(count * math.log(chance) for count, chance in seen if count)

    low, high = max(0.0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12
    for _ in range(200):  # ternary search: the likelihood has one peak
        first, second = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, second) if likelihood(first) > likelihood(second) else (first, high)
    return (wins - losses - n * difference) / math.sqrt(n * (2 * low + difference - difference**2))


def test_without_ties_the_interval_is_that_of_wilson():
    for wins, n in ((3, 3), (0, 5), (1, 1), (0, 1), (7, 10), (157, 200)):
        ours = [1.0] * wins + [0.0] * (n - wins)
        assert win_rate(ours, [0.5] * n) == pytest.approx(share(wins, n), abs=1e-9)


def test_few_prompts_and_equal_outcomes_leave_an_interval():
    # all won: from n / (n + z^2), as by Wilson
    assert win_rate([1.0] * 3, [0.0] * 3) == pytest.approx((1.0, 3 / (3 + 1.96**2), 1.0), abs=1e-4)
    assert win_rate([2.0], [1.0]) == pytest.approx((1.0, 1 / (1 + 1.96**2), 1.0), abs=1e-4)
    # all tied: differences d with n d^2 = z^2 d (1 - d), d = z^2 / (n + z^2)
    reach = 1.96**2 / (10 + 1.96**2) / 2
    assert win_rate([1.0] * 10, [1.0] * 10) == pytest.approx((0.5, 0.5 - reach, 0.5 + reach), abs=1e-4)
    with pytest.raises(ValueError, match="no prompts"):
        win_rate([], [])


def test_turned_round_the_interval_is_the_mirror_image():
    ours, theirs = [3, 1, 2, 5, 4, 4], [1, 2, 2, 1, 1, 1]
    rate, low, high = win_rate(ours, theirs)
    assert win_rate(theirs, ours) == pytest.approx((1 - rate, 1 - high, 1 - low))


CELLS = [(p, t) for t in (0.0, 0.05, 0.1, 0.2, 0.4) for p in (0.5, 0.785, 0.9, 0.97) if p <= 1 - t / 2]


@pytest.mark.parametrize("n", [10, 30, 200])
def test_the_interval_covers_the_true_rate(n):
    """Summed over all outcomes that matter, not simulated."""
    for p, ties in CELLS:
        covered = seen = 0.0
        for wins, losses, chance in outcomes(n, p - ties / 2, 1 - p - ties / 2):
            low, high = interval_of(wins, losses, n)
            covered += chance * (low <= p <= high)
            seen += chance
        assert seen > 0.997
        assert covered >= 0.92 and covered + 1 - seen <= (0.97 if n == 200 else 1), (p, ties, covered)


interval_of = cache(lambda wins, losses, n: win_interval(wins / n, losses / n, n))


def outcomes(n: int, win: float, loss: float) -> Iterator[tuple[int, int, float]]:
    """Numbers of wins and losses of n prompts and how likely they are; the unlikely ones are left out."""
    chances = (win, loss, 1 - win - loss)
    for wins in range(n + 1):
        for losses in range(n + 1 - wins):
            counts = (wins, losses, n - wins - losses)
            if any(count and chance < 1e-9 for count, chance in zip(counts, chances, strict=True)):
                continue
            logs = (c * math.log(max(p, 1e-9)) - math.lgamma(c + 1) for c, p in zip(counts, chances, strict=True))
            chance = math.exp(math.lgamma(n + 1) + sum(logs))
            if chance > 1e-5:
                yield wins, losses, chance


def test_prompts_of_one_question_do_not_count_as_independent():
    # two questions, fifteen prompts each, all won: two outcomes
    questions = ["a"] * 15 + ["b"] * 15
    assert win_rate([1.0] * 30, [0.0] * 30, questions) == pytest.approx(win_rate([1.0] * 2, [0.0] * 2))
    assert win_rate([1.0] * 30, [0.0] * 30, range(30)) == win_rate([1.0] * 30, [0.0] * 30)
    # and two that do not differ: how alike answers under one question are cannot be told from two
    assert effective_size(([1.0] * 8 + [0.0] * 7) * 2, questions) == 2


def test_outcomes_are_worth_less_as_far_as_those_of_a_group_are_alike():
    # 20 groups of 3, half of them right altogether: one outcome a group, but for the 20 / 19 of an estimate
    alike = [1.0] * 30 + [0.0] * 30
    assert effective_size(alike, [i // 3 for i in range(60)]) == pytest.approx(20)
    # every group 1, 0 and 1: the groups tell nothing apart, and no more than all outcomes count
    assert effective_size([1.0, 0.0, 1.0] * 20, [i // 3 for i in range(60)]) == 60
    # groups of sizes 3 and 1 that say the same: 16 / (9 + 1)
    assert effective_size([1.0] * 4, ["a", "a", "a", "b"]) == 1.6
    assert effective_size([1.0], ["a"]) == 1


def test_the_interval_covers_where_groups_are_alike():
    """40 questions of 5 pairs; each question has a chance of its own."""
    draw, covered = random.Random(1), 0
    for _ in range(400):
        chances = [draw.betavariate(2, 0.5) for _ in range(40)]  # 0.8 in the mean
        right = [draw.random() < chances[i // 5] for i in range(200)]
        _, low, high = share(sum(right), 200, effective_size(right, [i // 5 for i in range(200)]))
        covered += low <= 0.8 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_win_rate_needs_both_answers_to_every_prompt():
    with pytest.raises(ValueError):
        win_rate([1.0, 2.0], [1.0])


def test_words_are_lower_case_and_marks_stand_alone():
    assert words("Well, I CAN'T...  Ça va?") == ["well", ",", "i", "can", "'", "t", ".", ".", ".", "ça", "va", "?"]


def test_scripts_without_spaces_have_a_word_a_character():
    assert words("你好吗?") == ["你", "好", "吗", "?"]
    assert words("I love 東京 too") == ["i", "love", "東", "京", "too"]
    assert distinct_bigrams(["好的好的好的"]) == 2 / 5  # 好的 的好


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


def test_perplexity_is_a_number_however_bad_the_model():
    assert perplexity(math.log(8)) == pytest.approx(8)
    assert perplexity(1000.0) == math.exp(50)


def test_a_share_has_the_interval_of_wilson():
    # 81 of 263: the worked example of Newcombe (1998), Statistics in Medicine 17, table I: 0.2553 to 0.3662
    rate, low, high = share(81, 263)
    assert (rate, low, high) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=1e-4)
    # 20 of 20: low end n / (n + z^2)
    assert share(20, 20) == pytest.approx((1.0, 20 / (20 + 1.96**2), 1.0))
    assert share(0, 20) == pytest.approx((0.0, 0.0, 1.96**2 / (20 + 1.96**2)))
