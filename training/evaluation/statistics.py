"""Measures of a set of replies; pure functions."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from itertools import pairwise

Z = 1.96
"""Of a 95 % interval."""
ENOUGH_GROUPS = 10
"""From so many on, the likeness of answers within a group is estimated."""
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Japanese, Chinese
)
"""Characters of scripts that write words without a space between them."""


def win_rate(
    ours: Sequence[float], theirs: Sequence[float], groups: Sequence[Hashable] | None = None
) -> tuple[float, float, float]:
    """How often ours beats theirs on the same prompt, a tie counting half: rate and its 95 % interval.

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
    """The 95 % interval of wins + ties / 2, from the shares of wins and losses among `size` prompts.

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
    n, found = len(outcomes), by_group.values()
    if len(found) == n:
        return n
    fewest = n * n / sum(len(group) ** 2 for group in found)
    mean = sum(outcomes) / n
    alone = sum((outcome - mean) ** 2 for outcome in outcomes)
    if len(found) < ENOUGH_GROUPS or not alone:
        return fewest
    together = sum(sum(outcome - mean for outcome in group) ** 2 for group in found) * len(found) / (len(found) - 1)
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
    """Of a loss in nats a token; at most e^50, for an untrained model may be off by more than a float holds."""
    return math.exp(min(loss, 50.0))
