"""What tells a policy that improved from one that went astray: every bound, its name, and what it was measured on."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

DOUBTFUL_ACCURACY = 0.55
"""Share of held-out pairs ranked right below which a reward model is hardly better than a coin: on 200 pairs the 95 %
interval of 0.55 still holds one half."""
SHORT_REPLY = 16
"""Tokens of a reply in the demo, where the bound of the KL was measured; longer ones may have more, token by token."""

Measures = Mapping[str, Any]


@dataclass(frozen=True)
class Sign:
    is_good: bool
    text: str


@dataclass(frozen=True)
class GuardRail:
    """Bounds of a measure of the model, or of its ratio to that of the model it is compared with."""

    key: str
    """Of the measure in evaluation.json."""
    name: str
    measured_on: str
    unit: str
    """What follows a value; {against} is the other model."""
    low: float = -math.inf
    high: float = math.inf
    is_ratio: bool = True
    is_share: bool = False
    least_high: Callable[[Measures, int], float] = lambda ours, prompts: 0.0
    """A higher bound that follows from the model's measures and the number of prompts."""

    def sign(self, evaluation: Measures, against: str, model: str) -> Sign | None:
        """Of the models with these keys; None where it was not measured."""
        theirs, ours = evaluation[against], evaluation[model]
        if self.key not in ours or (self.is_ratio and self.key not in theirs):
            return None
        value = ratio(ours[self.key], theirs[self.key]) if self.is_ratio else ours[self.key]
        high = max(self.high, self.least_high(ours, evaluation["prompts"]))
        name = evaluation.get("pair", {}).get(against, against.upper())
        text = f"{self.name}: {self.shown(value)} {self.unit.format(against=name)} ({self.bounds(high)})"
        return Sign(self.low <= value <= high, text)

    def shown(self, value: float) -> str:
        if self.is_share:
            return f"{value:.1%}"
        return f"{value:z.2f}" if abs(value) < 1e4 else f"{value:.1e}"

    def bounds(self, high: float | None = None) -> str:
        """`0.7 to 1.3`, `at most 3%`."""
        unit = "{:.0%}" if self.is_share else "{:.3g}"
        low, top = unit.format(self.low), unit.format(self.high if high is None else high)
        if self.low == -math.inf:
            return f"at most {top}"
        return f"at least {low}" if self.high == math.inf else f"{low} to {top}"


KL = GuardRail(
    "kl",
    "KL",
    "the demo, 3 seeds: 1.9 to 2.9 nats a reply of about 16 tokens",
    "nats a reply from {against}",
    high=6.0,
    is_ratio=False,
    least_high=lambda ours, prompts: 6.0 / SHORT_REPLY * ours.get("length", 0.0),
)
LENGTH = GuardRail(
    "length",
    "Length of answers",
    "the demo, 3 seeds: 0.78 to 1.09",
    "times that of {against}",
    low=0.7,
    high=1.3,
)
VARIETY = GuardRail(
    "distinct_bigrams",
    "Variety (distinct bigrams)",
    "the demo, 3 seeds: 0.85 to 0.97",
    "times that of {against}",
    low=0.8,
)
PERPLEXITY = GuardRail(
    "perplexity_untouched",
    "Perplexity under the untouched model",
    "the demo, 3 seeds: 0.88 to 1.28",
    "times that of {against}",
    high=1.3,
)
DEMONSTRATIONS = GuardRail(
    "perplexity_demonstrations",
    "Perplexity of demonstrations",
    "the demo, seed 1: 1.09",
    "times that of {against}",
    high=1.5,
)
MOST_FREQUENT = GuardRail(
    "most_frequent_share",
    "Most frequent answer",
    "the demo, 3 seeds, 200 prompts: 0.5 % to 1.5 %; an answer that is given once is not too often",
    "of all",
    high=0.03,
    is_ratio=False,
    is_share=True,
    least_high=lambda ours, prompts: 1 / prompts,
)
GUARD_RAILS = (KL, LENGTH, VARIETY, PERPLEXITY, DEMONSTRATIONS, MOST_FREQUENT)


def guard_signs(evaluation: Measures, against: str, model: str) -> list[Sign]:
    """What each guard rail that was measured says of a model. Nothing of one that is compared with the base model:
    fine-tuning is meant to leave that one.
    """
    if against == "base":
        return []
    return [sign for rail in GUARD_RAILS if (sign := rail.sign(evaluation, against, model)) is not None]


def ratio(ours: float, theirs: float) -> float:
    """1 where both are 0."""
    return ours / theirs if theirs else (math.inf if ours else 1.0)


def verdict(win: Measures, theirs: str, ours: str) -> str:
    """What a win rate shows: `RLHF beats SFT in 73.2% of prompts by ...` only where its interval excludes one half."""
    by = f"by {win['judge']}"
    if win.get("ties") is not None and win["ties"] == win["prompts"]:
        return f"All {win['prompts']} answers tie {by}: it tells {ours} and {theirs} apart nowhere, so nothing is shown"
    interval = f"(95 % interval {win['low']:.1%} to {win['high']:.1%}; a tie counts half{openings(win)})"
    share = f"in {win['rate']:.1%} of prompts {by} {interval}"
    if win["low"] > 0.5:
        return f"{ours} beats {theirs} {share}"
    if win["high"] < 0.5:
        return f"{ours} is worse than {theirs}: it wins {share}"
    return f"No difference is shown: {ours} wins against {theirs} {share}"


def openings(win: Measures) -> str:
    """Says that prompts open alike, where some do: the interval is wider for it."""
    alike = "questions" in win and win["questions"] < win["prompts"]
    return f"; {win['questions']} different openings" if alike else ""
