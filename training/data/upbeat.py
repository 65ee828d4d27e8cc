"""How upbeat a text is by a lexicon that people rated: the known rule behind the demonstration's preference."""

import functools
from typing import Any


def upbeat_score(text: str) -> float:
    """The compound score of vaderSentiment (Hutto and Gilbert 2014), in [-1, 1]; 0 is neutral."""
    return float(_analyzer().polarity_scores(text)["compound"])


@functools.cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
