"""What the preferences of people say: which of two models they prefer, how far they agree, and what else moves them."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Any

from inference.preferences import Preference
from training.data.split import choose_groups
from training.evaluation import statistics
from training.steps import WRITING

Preferences = Sequence[Preference]


def newest(preferences: Preferences) -> list[Preference]:
    """Keep each person's last word on each pair of answers."""
    return list({(preference.by, preference.pair): preference for preference in preferences}.values())


def meaning(preference: Preference) -> tuple[str, ...]:
    """Return what a preference says, whichever side each answer stood on."""
    better = {"a": preference.response_a, "b": preference.response_b}.get(preference.winner)
    return (preference.winner,) if better is None else ("better", better)


def people(preferences: Preferences) -> list[str]:
    """Name the people, those who have judged most first."""
    return [name for name, _ in Counter(preference.by for preference in preferences).most_common()]


# Models


def compared(preferences: Preferences) -> list[tuple[str, str]]:
    """List the pairs of different models that were compared, the most frequent first; names in alphabetical order."""
    pairs = ((preference.model_a, preference.model_b) for preference in preferences)
    counts = Counter((min(pair), max(pair)) for pair in pairs if pair[0] != pair[1])
    return [pair for pair, _ in counts.most_common()]


def in_order(pair: tuple[str, str], home: str) -> tuple[str, str]:
    """Put first the model that is measured: one of the run `home` before others, of these that of the later step."""
    steps = ["base", *(step.command for step in WRITING)]

    def lateness(label: str) -> tuple[bool, int]:
        run, _, step = label.rpartition("/")
        return run == home, steps.index(step) if step in steps else -1

    return pair if lateness(pair[0]) > lateness(pair[1]) else (pair[1], pair[0])


def between(preferences: Preferences, model: str, against: str) -> list[Preference]:
    """Keep the last words on an answer of each of two models."""
    pair = {model, against}
    both = [preference for preference in preferences if {preference.model_a, preference.model_b} == pair]
    return newest(both) if model != against else []


def win_rates(preferences: Preferences, model: str, against: str) -> dict[str, Any] | None:
    """How often people prefer `model`, together and one by one, and how far they agree; None where there is none."""
    judged = between(preferences, model, against)
    if not judged:
        return None
    by = {name: [preference for preference in judged if preference.by == name] for name in people(judged)}
    return {
        "model": model,
        "against": against,
        "together": win_rate(judged, model),
        "by": {name: win_rate(theirs, model) for name, theirs in by.items()},
        "agreement": agreements(judged),
    }


def win_rate(preferences: Preferences, model: str) -> dict[str, Any]:
    """Measure how often `model` is preferred; neither counts half. Answers to one question are not independent."""
    ours, theirs = [0.0] * len(preferences), [0.0] * len(preferences)
    for i, preference in enumerate(preferences):
        if preference.winner in ("a", "b"):
            better = preference.model_a if preference.winner == "a" else preference.model_b
            (ours if better == model else theirs)[i] = 1.0
    groups = questions(preferences)
    rate, low, high = statistics.win_rate(ours, theirs, groups)
    winners = Counter(preference.winner for preference in preferences)
    return {
        "preferences": len(preferences),
        "questions": len(set(groups)),
        "ties": winners["tie"],
        "both_bad": winners["both bad"],
        "rate": rate,
        "low": low,
        "high": high,
    }


def questions(preferences: Preferences) -> list[str]:
    rows: list[Any] = [{"prompt": preference.prompt} for preference in preferences]
    return list(map(choose_groups(rows), rows))


# People


def agreements(preferences: Preferences) -> list[dict[str, Any]]:
    """Measure the agreement of any two people who have judged the same answers."""
    last: dict[str, dict[Hashable, Preference]] = defaultdict(dict)
    for preference in newest(preferences):
        last[preference.by][preference.pair] = preference
    result = []
    for one, other in combinations(people(preferences), 2):
        both = [(preference, last[other][pair]) for pair, preference in last[one].items() if pair in last[other]]
        if both:
            result.append({"people": [one, other], **agreement(both)})
    return result


def repeated(preferences: Preferences) -> dict[str, dict[str, Any]]:
    """How far each person who has judged the same answers more than once says the same, the first time and the last."""
    judged: dict[str, dict[Hashable, list[Preference]]] = defaultdict(lambda: defaultdict(list))
    for preference in preferences:
        judged[preference.by][preference.pair].append(preference)
    twice = {by: [(v[0], v[-1]) for v in of_pair.values() if len(v) > 1] for by, of_pair in judged.items()}
    return {by: agreement(both) for by, both in twice.items() if both}


def agreement(both: Sequence[tuple[Preference, Preference]]) -> dict[str, Any]:
    """Return the share of pairs with the same preference (`same`), and Cohen's kappa: 1 is always the same and 0 as
    often as by chance; None where chance alone gives always the same. Both have 95 % intervals, kappa the one of its
    author (1960, Educational and Psychological Measurement 20, 37-46), for whom the share of chance is known.

    Which of two answers comes first means nothing, so of those who prefer one half prefer the same by chance.
    """
    same = [meaning(one) == meaning(other) for one, other in both]
    size = statistics.effective_size(same, questions([one for one, _ in both]))
    share, low, high = statistics.share(sum(same), len(same), size)
    first, second = (Counter(meaning(preference)[0] for preference in theirs) for theirs in zip(*both, strict=True))
    chance = sum(first[kind] * second[kind] / (2 if kind == "better" else 1) for kind in first) / len(both) ** 2
    kappas = [None if chance == 1 else (value - chance) / (1 - chance) for value in (share, low, high)]
    names = ("pairs", "same", "low", "high", "kappa", "kappa_low", "kappa_high")
    return dict(zip(names, (len(both), share, low, high, *kappas), strict=True))


# What else moves them


def overview(preferences: Preferences) -> dict[str, Any]:
    """Who has judged how often, how many for neither answer, the side that is preferred, and who agrees with whom."""
    winners = Counter(preference.winner for preference in preferences)
    return {
        "preferences": len(preferences),
        "by": {name: sum(preference.by == name for preference in preferences) for name in people(preferences)},
        "ties": winners["tie"],
        "both_bad": winners["both bad"],
        "left": left(preferences),
        "repeated": repeated(preferences),
        "agreement": agreements(preferences),
    }


def left(preferences: Preferences) -> dict[str, dict[str, float]]:
    """How often each person prefers the left of two answers: by chance, since sides are drawn, half of the time."""
    shares = {}
    for name in people(preferences):
        winners = [preference.winner for preference in preferences if preference.by == name]
        sides = [winner == "a" for winner in winners if winner in ("a", "b")]
        if sides:
            rate, low, high = statistics.share(sum(sides), len(sides))
            shares[name] = {"preferences": len(sides), "rate": rate, "low": low, "high": high}
    return shares
