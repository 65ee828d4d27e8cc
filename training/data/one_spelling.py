"""When are two texts the same, however they are written?"""

import re
import unicodedata

INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\U000e0000-\U000e007f]"
)
"""Signs that change nothing a reader sees: soft hyphens, joiners, directions, fillers, variants, tags."""
PLAIN = str.maketrans("\u2018\u2019\u02bc\u201c\u201d\u2010\u2011\u2012\u2013\u2014\u2212", "'''\"\"------")
"""Quotation marks and dashes as word processors set them."""
BEFORE = " \"'`*_#>([\u00bf\u00a1"
BEHIND = " .,;:?!\"'`*_)]\u3001\u3002"
"""Marks around a text: of its end, quotation, Markdown."""


def one_spelling(text: str) -> str:
    """`text` without what case, Unicode form, spaces and the marks around it make different."""
    text = text.casefold() if text.isascii() else one_alphabet(text)
    bare = " ".join(text.split())
    return bare.removeprefix("- ").lstrip(BEFORE).rstrip(BEHIND) or bare


def one_alphabet(text: str) -> str:
    text = unicodedata.normalize("NFKC", INVISIBLE.sub("", text)).translate(PLAIN)
    return unicodedata.normalize("NFKC", text.casefold())  # folding a sign may take it apart
