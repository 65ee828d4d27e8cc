"""Preferences of people, made up."""

from inference.preferences import Answer, BlindPair, Preference


def preference(
    by: str,
    winner: str,
    prompt: str = "Hi?",
    one: tuple[str, str] = ("demo/sft", "No."),
    other: tuple[str, str] = ("demo/rlhf", "Yes!"),
    swapped: bool = False,
) -> Preference:
    """`one` and `other` are label and text; `winner` is one, other, tie or both bad."""
    sides = (other, one) if swapped else (one, other)
    left, right = (Answer(label, text, seed) for seed, (label, text) in enumerate(sides))
    pair = BlindPair([{"role": "user", "content": prompt}], left, right, 0.7, 24)
    named = {"one": "b" if swapped else "a", "other": "a" if swapped else "b"}
    return pair.judged(named.get(winner, winner), by)
