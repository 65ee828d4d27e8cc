"""Log-probabilities of tokens as the protocol shows them: with the text and the bytes of each token."""

import re
from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from inference.chat_model import BROKEN
from inference.generation.own_draw import OwnSample

MOST_ALTERNATIVES = 20


class Logprobs:
    """Of one model. Knows each token that it has met."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]  # decoders treat a first token differently
        self._byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
        self._met: dict[int, tuple[str, list[int] | None]] = {}

    def of(self, sample: OwnSample, places: Sequence[int]) -> list[dict[str, Any]]:
        """The protocol's `content`, for the response tokens at these places."""
        return [
            self._entry(sample.response_ids[place], sample.logprobs[place])
            | {"top_logprobs": [self._entry(*pair) for pair in sample.likeliest[place]] if sample.alternatives else []}
            for place in places
        ]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        if token not in self._met:
            self._met[token] = self._look_at(token)
        text, in_bytes = self._met[token]
        return {"token": text, "bytes": in_bytes, "logprob": logprob}

    def _look_at(self, token: int) -> tuple[str, list[int] | None]:
        """What a token says inside of a text; its bytes also where they are but a part of a character."""
        text = self._decode([*self._before, token]).removeprefix(self._decode(self._before))
        if BROKEN not in text:
            return text, list(text.encode())
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if found := re.fullmatch("<0x([0-9A-F]{2})>", name):
            return text, [int(found[1], 16)]
        return text, [self._byte_of[letter] for letter in name] if self._byte_of.keys() >= set(name) else None

    def _decode(self, ids: list[int]) -> str:
        return cast(str, self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))
