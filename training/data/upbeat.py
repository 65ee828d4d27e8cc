"""How upbeat a text is by a lexicon, which judges answers and has no part in any reward."""

import functools

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


def upbeat_score(text: str) -> float:
    """From -1 (gloomy) to 1 (upbeat), 0 for neutral: the compound score of VADER (Hutto and Gilbert 2014)."""
    return _analyzer().polarity_scores(text)["compound"]


@functools.cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()  # reads its lexicon, about 7,500 lines
