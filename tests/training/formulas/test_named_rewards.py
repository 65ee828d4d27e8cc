"""Rewards by name: what each gives, answer by answer."""

import pytest

from training.reward_specs import RewardSpec, last_number

DEEP = "[" * 100_000
LONG = "9" * 10_000


@pytest.mark.parametrize(
    ("spec", "response", "expected"),
    [
        ("length:3", "one two three", 0),
        ("length:3", " one  two\nthree four five", -2),
        ("length:3", "", -3),
        ("length:..3", "", 0),
        ("length:..3", "a b c d", -1),
        ("length:3..", "a b c d e", 0),
        ("length:3..", "a", -2),
        ("length:2..4", "a", -1),
        ("length:2..4", "a b c", 0),
        ("length:2..4", "a b c d e f", -2),
        (r"regex:\?$", "Why?", 1),
        (r"regex:\?$", "Why? No.", 0),
        ("regex:(?i)sea", "The SEA.", 1),
        ("regex:a:b=2=1", "a:b=2", 1),
        ("regex:a:b=2=1", "a:b", 0),
        ("json", ' {"a": [1, null]}\n', 1),
        ("json", "42", 1),
        ("json", "{'a': 1}", 0),
        ("json", '{"a": 1} and more', 0),
        ("json", "NaN", 0),
        ("json", DEEP, 0),
        ("json", LONG, 0),
        ("json:a, b", '{"a": 1, "b": 2, "c": 3}', 1),
        ("json:a,b", '{"a": 1}', 0),
        ("json:a", '["a"]', 0),
    ],
)
def test_what_a_reward_by_name_gives(spec, response, expected):
    assert RewardSpec.of(spec).named().score(response, {}) == expected


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("It is 3, no, 42.", 42, 1),
        ("It is 42, no, 3.", 42, 0),
        ("42 apples, 7 pears", "so it is\n#### 7", 1),
        ("$1,234.50", "1234.5", 1),
        (r"\boxed{-5}", -5, 1),
        ("x = 7-5", "5", 1),
        ("−5", -5, 1),
        ("(3) - 4", -4, 0),
        ("0.10", 0.1, 1),
        (".5", "1/2", 1),
        ("2/4", 0.5, 1),
        ("1/0", 0, 1),
        ("2, 3", 3, 1),
        ("12,34", 34, 1),
        ("about 1e-7", 1e-7, 0),
        ("none", 0, 0),
        ("", 1, 0),
        (LONG, 9, 0),
    ],
)
def test_math_compares_the_last_number_with_the_row_s(response, answer, expected):
    assert RewardSpec.of("math").named().score(response, {"answer": answer}) == expected
    assert RewardSpec.of("math:gold").named().score(response, {"gold": answer, "answer": "x"}) == expected


@pytest.mark.parametrize("answer", [None, "none", True, float("nan"), float("inf"), [4], LONG])
def test_a_row_without_a_number_does_not_suit_math(answer):
    reward = RewardSpec.of("math").named()
    assert reward.score("none", {"answer": answer}) == 0
    assert not reward.suits({"answer": answer}) and not reward.suits({}) and reward.suits({"answer": "4"})
    assert last_number(answer) is None
