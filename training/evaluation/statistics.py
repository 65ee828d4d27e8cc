"""Measures of a set of replies; pure functions."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Z = 1.96  # of a 95 % interval
ENOUGH_GROUPS = 10  # from so many on, the likeness of answers within a group is estimated
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Japanese, Chinese
)
"""Characters of scripts that write words without a space between them."""


def win_rate(
    ours: Sequence[float], theirs: Sequence[float], groups: Sequence[Hashable] | None = None
) -> tuple[float, float, float]:
    """Return how often ours beats theirs on the same prompt, a tie counting half, with its 95 % interval.

    `groups` names what each prompt belongs to, see `effective_size`. Raises ValueError without prompts.
    """
    outcomes = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True)]
    n = len(outcomes)
    if not n:
        raise ValueError("there is no win rate of no prompts")
    size = effective_size(outcomes, range(n) if groups is None else groups)
    low, high = win_interval(outcomes.count(1.0) / n, outcomes.count(0.0) / n, size)
    return sum(outcomes) / n, low, high


def win_interval(wins: float, losses: float, size: float) -> tuple[float, float]:
    """Return the 95 % interval of wins + ties / 2, from the shares of wins and losses among `size` prompts.

    It is the score interval for a difference of paired proportions (here wins less losses) by Tango (1998, Statistics
    in Medicine 17, 891-908): all differences whose own standard error, not that of the estimate, explains what was
    seen. Without ties it is Wilson's. It stays in [0, 1], and is not empty where all outcomes are the same.
    """

    def explains(difference: float) -> bool:
        # the likeliest share of losses, were this the difference in truth: the larger root of a quadratic
        a, c = 2.0, -losses * difference * (1 - difference)
        b = -wins - losses + (2 - wins + losses) * difference
        expected_losses = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = max(0.0, 2 * expected_losses + difference * (1 - difference))
        return size * (wins - losses - difference) ** 2 <= Z * Z * variance

    def last_that_explains(difference: float, end: float) -> float:
        for _ in range(40):  # halves the gap to below 1e-11
            middle = (difference + end) / 2
            difference, end = (middle, end) if explains(middle) else (difference, middle)
        return end if explains(end) else difference

    low, high = (last_that_explains(wins - losses, end) for end in (-1.0, 1.0))
    return (1 + low) / 2, (1 + high) / 2


def share(count: float, of: int, size: float | None = None) -> tuple[float, float, float]:
    """count / of with its 95 % interval by Wilson (1927), which stays in [0, 1] for few and extreme outcomes.

    `size` is how many independent outcomes they are worth, see `effective_size`; all, where it is left out.
    """
    rate, n = count / of, of if size is None else size
    centre = (rate + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(rate * (1 - rate) / n + Z * Z / (4 * n * n))
    return rate, max(0.0, centre - half), min(1.0, centre + half)


def effective_size(outcomes: Sequence[float], groups: Sequence[Hashable]) -> float:
    """How many independent outcomes say as much as these, where those of one group are alike.

    Outcomes are divided by the design effect: the variance of their mean by the sums of the groups over that by the
    outcomes alone (Kish 1965; Korn and Graubard 1998, Survey Methodology 24, 193-201). Of few groups, or where all
    outcomes are the same, nothing can be estimated: there a group counts as one outcome, weighted by its size.
    """
    by_group: dict[Hashable, list[float]] = defaultdict(list)
    for outcome, group in zip(outcomes, groups, strict=True):
        by_group[group].append(outcome)
    n, count = len(outcomes), len(by_group)
    if count == n:
        return n
    fewest = n * n / sum(len(group) ** 2 for group in by_group.values())
    mean = sum(outcomes) / n
    alone = sum((outcome - mean) ** 2 for outcome in outcomes)
    if count < ENOUGH_GROUPS or not alone:
        return fewest
    sums = [sum(outcome - mean for outcome in group) for group in by_group.values()]
    together = sum(value**2 for value in sums) * count / (count - 1)
    return min(n, max(fewest, n * alone / together if together else n))


def words(text: str) -> list[str]:
    """Lower-case words, marks apart; of scripts without spaces between words each character."""
    return re.findall(rf"[^\W{UNSPACED}]+|[{UNSPACED}]|[^\w\s]", text.lower())


def distinct_bigrams(replies: Sequence[str]) -> float:
    """Different word pairs over all word pairs of all replies (distinct-2 of Li et al. 2016, arXiv 1510.03055).

    0 where no reply has two words.
    """
    pairs = [pair for reply in map(words, replies) for pair in pairwise(reply)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def most_frequent_share(replies: Sequence[str]) -> float:
    """Share of the most frequent reply, case and outer space aside."""
    return Counter(reply.strip().lower() for reply in replies).most_common(1)[0][1] / len(replies)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def perplexity(loss: float) -> float:
    """Compute the perplexity of a loss in nats a token; at most e^50, as an untrained model may exceed a float."""
    return math.exp(min(loss, 50.0))


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

    key: str  # of the measure in evaluation.json
    name: str
    measured_on: str
    unit: str  # what follows a value; {against} is the other model
    low: float = -math.inf
    high: float = math.inf
    is_ratio: bool = True
    is_share: bool = False
    least_high: Callable[[Measures, int], float] = lambda ours, prompts: 0.0
    """A higher bound that follows from the model's measures and the number of prompts."""

    def sign(self, evaluation: Measures, against: str, model: str) -> Sign | None:
        """Judge the models with these keys; None where the measure is missing."""
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
    "the demo, 3 seeds: 1.4 to 2.1 nats a reply of about 15 tokens",
    "nats a reply from {against}",
    high=6.0,
    is_ratio=False,
    least_high=lambda ours, prompts: 6.0 / SHORT_REPLY * ours.get("length", 0.0),
)
LENGTH = GuardRail(
    "length",
    "Length of answers",
    "the demo, 3 seeds: 0.89 to 1.07",
    "times that of {against}",
    low=0.7,
    high=1.3,
)
VARIETY = GuardRail(
    "distinct_bigrams",
    "Variety (distinct bigrams)",
    "the demo, 3 seeds: 0.86 to 0.89",
    "times that of {against}",
    low=0.8,
)
PERPLEXITY = GuardRail(
    "perplexity_untouched",
    "Perplexity under the untouched model",
    "the demo, 3 seeds: 0.83 to 1.10",
    "times that of {against}",
    high=1.3,
)
DEMONSTRATIONS = GuardRail(
    "perplexity_demonstrations",
    "Perplexity of demonstrations",
    "the demo, seed 1: 1.05",
    "times that of {against}",
    high=1.5,
)
MOST_FREQUENT = GuardRail(
    "most_frequent_share",
    "Most frequent answer",
    "the demo, 3 seeds, 600 prompts: 0.3 % to 0.5 %; an answer that is given once is not too often",
    "of all",
    high=0.03,
    is_ratio=False,
    is_share=True,
    least_high=lambda ours, prompts: 1 / prompts,
)
GUARD_RAILS = (KL, LENGTH, VARIETY, PERPLEXITY, DEMONSTRATIONS, MOST_FREQUENT)


def guard_signs(evaluation: Measures, against: str, model: str) -> list[Sign]:
    """Ask each guard rail that was measured about a model. None says anything of one that is compared with the base
    model: fine-tuning is meant to leave that one."""
    if against == "base":
        return []
    return [sign for rail in GUARD_RAILS if (sign := rail.sign(evaluation, against, model)) is not None]


def ratio(ours: float, theirs: float) -> float:
    """Divide; 0 / 0 is 1."""
    return ours / theirs if theirs else (math.inf if ours else 1.0)


def verdict(win: Measures, theirs: str, ours: str) -> str:
    """Say what a win rate shows: `RLHF beats SFT in 73.2% of ...` only where its interval excludes one half."""
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
