"""Names that somebody may have meant."""

import difflib
from collections.abc import Iterable, Sequence


def did_you_mean(names: Sequence[str], otherwise: str) -> str:
    """`did you mean 'a', 'b' or 'c'?`; `otherwise` where there are none."""
    if not names:
        return otherwise
    *others, last = [f"'{name}'" for name in names]
    return f"did you mean {', '.join(others)} or {last}?" if others else f"did you mean {last}?"


def likeness(given: str, name: str) -> float:
    """0 to 1; an abbreviation (`coef`, or `lr` for `learning_rate`) is as good as the word with a slip."""
    initials = "".join(word[:1] for word in name.split("_"))
    if given != name and (given == initials or (len(given) > 2 and name.startswith(given))):
        return 0.9
    return difflib.SequenceMatcher(None, given, name).ratio()


def near_keys(given: str, keys: Iterable[str]) -> list[str]:
    """Dotted keys that end like `given`: those in the groups that it names, by the shortest way down."""
    *groups, name = given.lower().split(".")
    likely: dict[str, float] = {}
    for key in keys:
        *above, last = key.split(".")
        like = max(likeness(name, "_".join([*above[start:], last])) for start in range(len(above) + 1))
        if like > 0.65:
            named = sum(group in above for group in groups)
            place = named or 0.2 * likeness(".".join(groups), ".".join(above))
            likely[key] = place + like - 0.1 * len(above)
    return [key for key, score in likely.items() if score == max(likely.values())]
