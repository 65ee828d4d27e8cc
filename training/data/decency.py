"""Which utterances a model should not learn from: abusive or obscene words, links, no words at all."""

import functools
import re
from importlib.resources import files

HARMLESS = frozenset(
    """crap damn drunk facial fat god hell homey kill lmao murder omg oral organ paddy pasty pawn poop pot potty revue
    rum screw screwed seaman slope snatch sniper steamy strip stroke stupid suck sucked thrust tramp ugly undies
    virgin vodka vomit weirdo whiz willy womb woody""".split()
)
"""On the word list, and yet heard in polite talk."""
INSULTS = frozenset(
    ["bastards", "idiot", "idiots", "imbecile", "loser", "losers", "morons", "psycho", "retards", "scumbag"]
)
"""Not on the word list."""
ROOTS = re.compile(r"fuck|shit|bitch|nigg|fagg|whore|rapist|suicid|kill (?:your|my)self|shut up|hate you")
"""Rude wherever they stand, in longer words too."""
LINK = re.compile(r"https?:|www\.|\.com\b|\.org\b|@", re.IGNORECASE)


def is_decent(text: str) -> bool:
    words, phrases = word_list()
    plain = text.lower()
    squeezed = re.sub(r"(.)\1{2,}", r"\1", plain)  # fuuuuck
    return not any(
        ROOTS.search(form) or phrases.search(form) or not words.isdisjoint(re.findall(r"\w+", form))
        for form in (plain, squeezed)
    )


def is_talk(text: str) -> bool:
    """Whether there is a word in it, and no link or address."""
    return re.search(r"[A-Za-z]{2}|\bI\b", text) is not None and LINK.search(text) is None


@functools.cache
def word_list() -> tuple[frozenset[str], re.Pattern[str]]:
    """Of the package `better_profanity`: single words, and a pattern for its phrases and words with signs in them."""
    text = (files("better_profanity") / "profanity_wordlist.txt").read_text(encoding="utf-8")
    entries = {line.strip().lower() for line in text.splitlines()} - HARMLESS - {""}
    words = {entry for entry in entries if re.fullmatch(r"\w+", entry)}
    phrases = "|".join(re.escape(entry) for entry in sorted(entries - words))
    return frozenset(words | INSULTS), re.compile(rf"(?<!\w)(?:{phrases})(?!\w)")
