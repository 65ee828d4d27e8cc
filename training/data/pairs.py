"""Preference pairs of the embedded default: of two people's replies under one question, the more upbeat is chosen.

Nothing but the replies may tell which was chosen, so lengths are alike, the longer one is chosen as often as the
shorter one, and the context is that of either with equal chances.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from inference.chat_template import Message
from training.data.rows import PairRow

SCORE_GAP = 0.3
LENGTH_RATIO = 0.75
LENGTH_SLACK = 2
"""Tokens by which two short replies may differ all the same."""
USES = 3
"""How often a reply may be used."""


@dataclass(frozen=True)
class Sample:
    """A person's reply in its context."""

    dialogue: str
    question: str
    prompt: list[Message]
    reply: str
    tokens: int
    """Of the reply, without the end of turn."""
    score: float
    """How upbeat the reply is."""


def make_pairs(samples: Sequence[Sample], per_question: int, rng: random.Random) -> list[PairRow]:
    """At most `per_question` pairs for each question, in random order."""
    by_question: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_question[sample.question].append(sample)
    pairs = [pair for group in by_question.values() for pair in pairs_of_question(group, per_question, rng)]
    rng.shuffle(pairs)
    return pairs


def pairs_of_question(samples: Sequence[Sample], count: int, rng: random.Random) -> list[PairRow]:
    pairs: list[PairRow] = []
    uses: Counter[int] = Counter()
    met: set[frozenset[int]] = set()
    longer_chosen = 0  # pairs whose chosen reply is the longer one, less those whose rejected reply is
    waiting = [i for i in range(len(samples)) for _ in range(USES)]
    rng.shuffle(waiting)
    for i in waiting:
        if len(pairs) == count:
            break
        if uses[i] == USES:
            continue
        partners = [j for j in range(len(samples)) if uses[j] < USES and fit_together(samples[i], samples[j])]
        rng.shuffle(partners)
        for j in partners:
            chosen, rejected = sorted((samples[i], samples[j]), key=lambda sample: -sample.score)
            longer = (chosen.tokens > rejected.tokens) - (chosen.tokens < rejected.tokens)
            if frozenset((i, j)) in met or abs(longer_chosen + longer) > 1:
                continue
            longer_chosen += longer
            met.add(frozenset((i, j)))
            uses.update((i, j))
            pairs.append(pair_row(chosen, rejected, rng))
            break
    return pairs


def fit_together(first: Sample, second: Sample) -> bool:
    """Another dialogue (else one reply could stand in the other's context), like lengths, scores far enough apart."""
    short, long = sorted((first.tokens, second.tokens))
    return (
        first.dialogue != second.dialogue
        and (long - short <= LENGTH_SLACK or short >= LENGTH_RATIO * long)
        and abs(first.score - second.score) >= SCORE_GAP
    )


def pair_row(chosen: Sample, rejected: Sample, rng: random.Random) -> PairRow:
    return {
        "prompt": rng.choice((chosen, rejected)).prompt,
        "chosen": chosen.reply,
        "rejected": rejected.reply,
        "chosen_score": chosen.score,
        "rejected_score": rejected.score,
    }
