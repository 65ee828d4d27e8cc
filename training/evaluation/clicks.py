"""What the verdicts of people say: which of two models they prefer, how far they agree, and what else moves them."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Any

from inference.preferences import Preference
from training.data.split import choose_groups
from training.evaluation import statistics
from training.steps import WRITING

Clicks = Sequence[Preference]


def newest(clicks: Clicks) -> list[Preference]:
    """Each person's last word on each pair of answers."""
    return list({(click.by, click.pair): click for click in clicks}.values())


def meaning(click: Preference) -> tuple[str, ...]:
    """The verdict, whichever side each answer stood on."""
    better = {"a": click.response_a, "b": click.response_b}.get(click.winner)
    return (click.winner,) if better is None else ("better", better)


def people(clicks: Clicks) -> list[str]:
    """Who has clicked most comes first."""
    return [name for name, _ in Counter(click.by for click in clicks).most_common()]


# Models


def compared(clicks: Clicks) -> list[tuple[str, str]]:
    """The pairs of different models that there are verdicts on, those with most first; names in alphabetical order."""
    pairs = ((click.model_a, click.model_b) for click in clicks if click.model_a != click.model_b)
    found = Counter((min(pair), max(pair)) for pair in pairs)
    return [pair for pair, _ in found.most_common()]


def in_order(pair: tuple[str, str], home: str) -> tuple[str, str]:
    """The model that is measured and what it is measured against: one of the run `home` before others, and of these the
    one of the later step."""
    steps = ["base", *(step.command for step in WRITING)]

    def lateness(label: str) -> tuple[bool, int]:
        run, _, step = label.rpartition("/")
        return run == home, steps.index(step) if step in steps else -1

    return pair if lateness(pair[0]) > lateness(pair[1]) else (pair[1], pair[0])


def between(clicks: Clicks, model: str, against: str) -> list[Preference]:
    """The last words on an answer of each."""
    return newest([click for click in clicks if {click.model_a, click.model_b} == {model, against} != {model}])


def win_rates(clicks: Clicks, model: str, against: str) -> dict[str, Any] | None:
    """How often people prefer `model`, together and one by one, and how far they agree; None without a verdict."""
    found = between(clicks, model, against)
    if not found:
        return None
    by = {name: [click for click in found if click.by == name] for name in people(found)}
    return {
        "model": model,
        "against": against,
        "together": win_rate(found, model),
        "by": {name: win_rate(theirs, model) for name, theirs in by.items()},
        "agreement": agreements(found),
    }


def win_rate(clicks: Clicks, model: str) -> dict[str, Any]:
    """Of `model`; where neither answer is better that counts half. Verdicts on one question are not independent."""
    ours, theirs = [0.0] * len(clicks), [0.0] * len(clicks)
    for i, click in enumerate(clicks):
        if click.winner in ("a", "b"):
            better = click.model_a if click.winner == "a" else click.model_b
            (ours if better == model else theirs)[i] = 1.0
    groups = questions(clicks)
    rate, low, high = statistics.win_rate(ours, theirs, groups)
    verdicts = Counter(click.winner for click in clicks)
    return {
        "clicks": len(clicks),
        "questions": len(set(groups)),
        "ties": verdicts["tie"],
        "both_bad": verdicts["both bad"],
        "rate": rate,
        "low": low,
        "high": high,
    }


def questions(clicks: Clicks) -> list[str]:
    """Of each verdict the question that it belongs to."""
    rows: list[Any] = [{"prompt": click.prompt} for click in clicks]
    return list(map(choose_groups(rows), rows))


# People


def agreements(clicks: Clicks) -> list[dict[str, Any]]:
    """Of each two people who have judged the same answers."""
    last: dict[str, dict[Hashable, Preference]] = defaultdict(dict)
    for click in newest(clicks):
        last[click.by][click.pair] = click
    found = []
    for one, other in combinations(people(clicks), 2):
        both = [(click, last[other][pair]) for pair, click in last[one].items() if pair in last[other]]
        if both:
            found.append({"people": [one, other], **agreement(both)})
    return found


def repeated(clicks: Clicks) -> dict[str, dict[str, Any]]:
    """How far each person who has judged the same answers more than once says the same, the first time and the last."""
    verdicts: dict[str, dict[Hashable, list[Preference]]] = defaultdict(lambda: defaultdict(list))
    for click in clicks:
        verdicts[click.by][click.pair].append(click)
    twice = {by: [(v[0], v[-1]) for v in of_pair.values() if len(v) > 1] for by, of_pair in verdicts.items()}
    return {by: agreement(both) for by, both in twice.items() if both}


def agreement(both: Sequence[tuple[Preference, Preference]]) -> dict[str, Any]:
    """The share of pairs with the same verdict (`same`), and Cohen's kappa: 1 is always the same and 0 as often as by
    chance; None where chance alone gives always the same. Each has its 95 % interval, kappa the one of its author
    (1960, Educational and Psychological Measurement 20, 37-46), for whom the share of chance is known.

    Which of two answers comes first means nothing, so of those who prefer one half prefer the same by chance.
    """
    same = [meaning(one) == meaning(other) for one, other in both]
    size = statistics.effective_size(same, questions([one for one, _ in both]))
    share, low, high = statistics.share(sum(same), len(same), size)
    first, second = (Counter(meaning(click)[0] for click in clicks) for clicks in zip(*both, strict=True))
    chance = sum(first[kind] * second[kind] / (2 if kind == "better" else 1) for kind in first) / len(both) ** 2
    kappas = [None if chance == 1 else (each - chance) / (1 - chance) for each in (share, low, high)]
    names = ("pairs", "same", "low", "high", "kappa", "kappa_low", "kappa_high")
    return dict(zip(names, (len(both), share, low, high, *kappas), strict=True))


# What else moves them


def overview(clicks: Clicks) -> dict[str, Any]:
    """Who has clicked how often, verdicts for neither answer, the side that is preferred, and who agrees with whom."""
    verdicts = Counter(click.winner for click in clicks)
    return {
        "clicks": len(clicks),
        "by": {name: sum(click.by == name for click in clicks) for name in people(clicks)},
        "ties": verdicts["tie"],
        "both_bad": verdicts["both bad"],
        "left": left(clicks),
        "repeated": repeated(clicks),
        "agreement": agreements(clicks),
    }


def left(clicks: Clicks) -> dict[str, dict[str, float]]:
    """How often each person prefers the left of two answers: by chance, since sides are drawn, half of the time."""
    found = {}
    for name in people(clicks):
        sides = [click.winner == "a" for click in clicks if click.by == name and click.winner in ("a", "b")]
        if sides:
            rate, low, high = statistics.share(sum(sides), len(sides))
            found[name] = {"clicks": len(sides), "rate": rate, "low": low, "high": high}
    return found
