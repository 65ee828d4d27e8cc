"""The bounds of a policy, and what a win rate shows; each bound stands in docs/runs.md as the code has it."""

import math
from pathlib import Path

import pytest

from training.evaluation.comparison import win_rate
from training.evaluation.statistics import GUARD_RAILS, guard_signs, verdict

MEASURES = {
    "kl": 2.0,
    "length": 16.0,
    "distinct_bigrams": 0.5,
    "perplexity_untouched": 30.0,
    "perplexity_demonstrations": 50.0,
    "most_frequent_share": 0.01,
}


def bad(prompts: int = 200, against: str = "sft", theirs: dict | None = None, **ours: float) -> list[str]:
    """The names of the rails that are out of bounds."""
    evaluation = {"prompts": prompts, against: {**MEASURES, "kl": 0.0, **(theirs or {})}, "dpo": {**MEASURES, **ours}}
    return [sign.text.partition(":")[0] for sign in guard_signs(evaluation, against, "dpo") if not sign.is_good]


@pytest.mark.parametrize(
    ("measures", "named"),
    [
        ({"kl": 6.0}, []),
        ({"kl": 6.1}, ["KL"]),
        ({"kl": 37.0, "length": 100.0}, ["Length of answers"]),  # 6 nats for each 16 tokens
        ({"kl": 38.0, "length": 100.0}, ["KL", "Length of answers"]),
        ({"length": 11.0}, ["Length of answers"]),
        ({"distinct_bigrams": 0.39}, ["Variety (distinct bigrams)"]),
        ({"perplexity_untouched": 39.1}, ["Perplexity under the untouched model"]),
        ({"perplexity_untouched": math.nan}, ["Perplexity under the untouched model"]),
        ({"perplexity_demonstrations": 76.0}, ["Perplexity of demonstrations"]),
        ({"most_frequent_share": 0.035}, ["Most frequent answer"]),
        ({"most_frequent_share": 0.1, "prompts": 10}, []),
        ({"theirs": {"distinct_bigrams": 0.0}}, []),
    ],
)
def test_what_is_out_of_bounds_is_named(measures, named):
    assert bad(**measures) == named


def test_what_was_not_measured_has_no_sign_and_the_base_model_may_be_left():
    evaluation = {"prompts": 10, "sft": {"length": 8.0}, "rlhf": {"length": 8.0}}
    assert [sign.text for sign in guard_signs(evaluation, "sft", "rlhf")] == [
        "Length of answers: 1.00 times that of SFT (0.7 to 1.3)"
    ]
    assert bad(against="base", kl=500.0) == []


@pytest.mark.parametrize(
    ("ours", "begins"),
    [
        ([1.0] * 20, "RLHF beats SFT in 100.0% of prompts by a rule (95 % interval "),
        ([-1.0] * 20, "RLHF is worse than SFT: it wins in 0.0% of prompts by a rule ("),
        ([1.0, -1.0] * 10, "No difference is shown: RLHF wins against SFT in 50.0% of prompts by a rule ("),
        ([1.0] + [0.0] * 19, "No difference is shown: RLHF wins against SFT in 52.5% of prompts by a rule ("),
        ([0.0] * 20, "All 20 answers tie by a rule: "),
    ],
)
def test_beats_is_said_only_where_the_interval_excludes_one_half(ours, begins):
    win = win_rate(([0.0] * 20, ours), [str(i) for i in range(20)], range(20)) | {"judge": "a rule"}
    assert verdict(win, "SFT", "RLHF").startswith(begins)
    assert win["ties"] == ours.count(0.0)


def test_the_documentation_has_these_bounds():
    page = (Path(__file__).parents[3] / "docs/runs.md").read_text(encoding="utf-8")
    for rail in GUARD_RAILS:
        assert f"| {rail.name} | {rail.bounds()}" in page and rail.measured_on in page
