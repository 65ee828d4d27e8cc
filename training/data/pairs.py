"""Preference pairs of the embedded default: of two texts that people rated, the one rated as more positive is chosen.

Nothing but the texts may tell which was chosen, so lengths are alike, and the longer one is chosen as often as the
shorter one.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from inference.chat_template import Message
from training.data.rows import PairRow

SCORE_GAP = 1.0
"""On the scale of -4 to 4; closer ones people do not tell apart."""
LENGTH_RATIO = 0.75
LENGTH_SLACK = 2
"""Tokens by which two short texts may differ all the same."""
USES = 3
"""How often a text may be used."""
TRIES = 100
"""Partners that are drawn for a text before it goes without."""


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    score: float
    """The mean of its ratings."""


def make_pairs(
    answers: Sequence[Answer], prompts: Sequence[list[Message]], rng: random.Random, uses: int = USES
) -> list[PairRow]:
    """All that `uses` of each answer give, in random order, each under one of the prompts; no pair twice."""
    pairs: list[PairRow] = []
    used: Counter[int] = Counter()
    met: set[frozenset[int]] = set()
    longer_chosen = 0  # pairs whose chosen text is the longer one, less those whose rejected text is
    waiting = [i for i in range(len(answers)) for _ in range(uses)]
    rng.shuffle(waiting)
    for i in waiting:
        for j in rng.sample(range(len(answers)), min(TRIES, len(answers))) if used[i] < uses else ():
            if i == j or used[j] == uses or frozenset((i, j)) in met or not fit_together(answers[i], answers[j]):
                continue
            chosen, rejected = sorted((answers[i], answers[j]), key=lambda answer: -answer.score)
            longer = (chosen.tokens > rejected.tokens) - (chosen.tokens < rejected.tokens)
            if abs(longer_chosen + longer) > 1:
                continue
            longer_chosen += longer
            met.add(frozenset((i, j)))
            used.update((i, j))
            pairs.append(
                {
                    "prompt": rng.choice(prompts),
                    "chosen": chosen.text,
                    "rejected": rejected.text,
                    "chosen_score": chosen.score,
                    "rejected_score": rejected.score,
                }
            )
            break
    rng.shuffle(pairs)
    return pairs


def fit_together(first: Answer, second: Answer) -> bool:
    """Like lengths, scores far enough apart."""
    short, long = sorted((first.tokens, second.tokens))
    alike = long - short <= LENGTH_SLACK or short >= LENGTH_RATIO * long
    return alike and abs(first.score - second.score) >= SCORE_GAP
