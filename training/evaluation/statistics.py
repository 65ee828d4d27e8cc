"""Measures of a set of replies; pure functions."""

import math
import re
from collections import Counter
from collections.abc import Sequence


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """How often ours beats theirs on the same prompt, a tie counting half: rate and its 95 % interval.

    The interval is the normal one of a mean of paired outcomes, cut to [0, 1].
    """
    outcomes = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True)]
    n = len(outcomes)
    rate = sum(outcomes) / n
    variance = sum((outcome - rate) ** 2 for outcome in outcomes) / max(1, n - 1)
    half = 1.96 * math.sqrt(variance / n)
    return rate, max(0.0, rate - half), min(1.0, rate + half)


def share(count: int, of: int) -> tuple[float, float, float]:
    """count / of with its 95 % interval by Wilson (1927), which stays in [0, 1] for few and extreme outcomes."""
    rate, z = count / of, 1.96
    centre = (rate + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(rate * (1 - rate) / of + z * z / (4 * of * of))
    return rate, max(0.0, centre - half), min(1.0, centre + half)


def words(text: str) -> list[str]:
    """Lower-case words, marks apart."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def distinct_bigrams(replies: Sequence[str]) -> float:
    """Different word pairs over all word pairs of all replies (distinct-2 of Li et al. 2016, arXiv 1510.03055)."""
    pairs = [pair for reply in replies for pair in zip(words(reply), words(reply)[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def most_frequent_share(replies: Sequence[str]) -> float:
    """Share of the most frequent reply, case and outer space aside."""
    return Counter(reply.strip().lower() for reply in replies).most_common(1)[0][1] / len(replies)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
