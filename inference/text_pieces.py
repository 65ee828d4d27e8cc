"""Text of token ids that grow, in pieces that hold whole characters."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"
"""What a decoder writes for bytes that are not, or not yet, a character."""
WINDOW = 64
"""Tokens that are decoded again for each new one, at most, as long as they decode to whole characters."""
OVERLAP = 8
"""Tokens that the next window begins with: some decoders treat the first token of a text differently."""


class TextPieces:
    """The pieces joined are the decoded whole. Only a window of the newest tokens is decoded for each piece."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._start = 0  # the window's first token
        self._taken = 0  # characters of the window's text

    def take(self, ids: Sequence[int], is_whole: bool = False) -> str:
        """What `ids`, the former ones and new ones behind them, have added; `is_whole` says that nothing follows."""
        text = self._decode(list(ids[self._start :]))
        safe = text if is_whole else text.rstrip(BROKEN)  # what follows may be the first bytes of a character
        piece = safe[self._taken :]
        self._taken = max(self._taken, len(safe))
        if len(safe) == len(text) and len(ids) - self._start >= WINDOW:
            self._move(text, ids)
        return piece

    def _move(self, text: str, ids: Sequence[int]) -> None:
        """Begin a new window, unless it would begin inside a character or with nothing that can be seen."""
        start = len(ids) - OVERLAP
        seen = self._decode(list(ids[start:]))
        if seen and text.endswith(seen):
            self._start, self._taken = start, len(seen)


def whole_text(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text of all tokens, special ones too."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def pieces_of(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The text of each token; joined, they are the text of all. A character that takes several tokens stands at the
    last of them."""
    from tokenizers.decoders import DecodeStream

    text, pieces = whole_text(ids, tokenizer), list[str]()
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        stream = DecodeStream(skip_special_tokens=False)
        try:
            pieces = [stream.step(backend, token) or "" for token in ids]
        except Exception:  # it refuses what is no text
            pieces = []
    if not pieces or not text.startswith("".join(pieces)):
        growing = TextPieces(lambda some: whole_text(some, tokenizer))
        pieces = [growing.take(ids[: place + 1]) for place in range(len(ids))]
    return [*pieces[:-1], text[len("".join(pieces[:-1])) :]] if pieces else []
