"""What is known of response lengths, and the shares dealt out by it."""

import json

import pytest

from training.fusion.costs import MOST_RECENT, LengthStatistics, deal


def statistics(lengths, longest=10):
    made = LengthStatistics(longest)
    made.add(lengths)
    return made


def test_what_is_still_to_come_is_the_mean_over_all_longer_ones():
    """Of 2, 4, 6, 8: at 0 tokens all four are longer, at 4 only 6 and 8, at 8 none: half of what the limit leaves."""
    known = statistics({0: [8, 2], 1: [6, 4]})
    assert [known.remaining(tokens) for tokens in (0, 2, 3, 4, 7)] == [5, 4, 3, 3, 1]
    assert [known.remaining(tokens) for tokens in (8, 9)] == [1, 1]
    assert statistics({0: [2]}).remaining(4) == 3


def test_before_anything_is_known_half_of_the_limit():
    known = LengthStatistics(10)
    assert (known.mean, known.expected(3), known.remaining(0), known.remaining(6)) == (5, 5, 5, 2)


def test_a_prompt_is_expected_to_be_answered_as_it_was_last_time():
    known = statistics({7: [2, 5], 8: [9]})
    assert known.mean == pytest.approx(16 / 3)
    assert [known.expected(prompt) for prompt in (7, 8, 9)] == [4, 9, known.mean]  # 3.5 is rounded to even
    known.add({8: [1, 2]})
    assert known.expected(8) == 2  # 1.5 too


def test_only_the_newest_lengths_count():
    known = statistics({0: [9] * 10})
    known.add({1: [2] * MOST_RECENT})
    assert known.mean == 2
    assert known.remaining(0) == 2


def test_restored_statistics_say_the_same():
    known = statistics({7: [2, 5], 12: [9, 9]})
    restored = LengthStatistics(10)
    restored.restore(json.loads(json.dumps(known.as_dict())))
    assert restored.as_dict() == known.as_dict()
    assert [restored.remaining(tokens) for tokens in range(10)] == [known.remaining(tokens) for tokens in range(10)]
    assert [restored.expected(prompt) for prompt in (7, 12, 1)] == [4, 9, 6.25]
    for each in (known, restored):
        each.add({7: [3]})
    assert restored.as_dict() == known.as_dict()


def test_longest_first_each_to_the_instance_with_the_least_work():
    """5 to the first, 4 and 3 to the second (4 < 5, then 4 < 5 again), 2 to the first (5 < 7), 1 to the first (7 each,
    two samples each)."""
    assert deal([5, 1, 4, 2, 3], 2) == [[0, 3, 1], [2, 4]]


def test_alike_samples_are_dealt_out_one_by_one():
    assert deal([6, 6, 6, 6, 6], 2) == [[0, 2, 4], [1, 3]]
    assert deal([0, 0, 0, 0], 2) == [[0, 2], [1, 3]], "expected lengths may be 0"
    assert deal([6], 3) == [[0], [], []]
