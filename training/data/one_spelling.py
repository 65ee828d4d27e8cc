"""When are two texts the same, however they are written?"""

import re
import unicodedata

INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff]"
)
"""Signs that change nothing a reader sees: soft hyphens, joiners, directions, variants, byte order marks."""
PLAIN = str.maketrans("\u2018\u2019\u02bc\u201c\u201d\u2010\u2011\u2012\u2013\u2014\u2212", "'''\"\"------")
"""Quotation marks and dashes as word processors set them."""


def one_spelling(text: str) -> str:
    """`text` without what case, Unicode form, spaces and the marks at its end make different."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", INVISIBLE.sub("", text)).translate(PLAIN)
    text = unicodedata.normalize("NFKC", text.casefold())  # folding a sign may take it apart
    bare = " ".join(text.split())
    return bare.rstrip(" .?!\u3002") or bare
