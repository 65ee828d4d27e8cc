"""Preference pairs as tokens: what the reward model and DPO learn from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LENGTH_BUCKETS = (8, 16, 32, 64, 128, 256)
"""Pairs are counted by the tokens of the longer answer: up to so many, from the bucket before on."""


@dataclass(frozen=True)
class TokenPair:
    """One prompt, two answers; int64 (length) each."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor
    is_unseen: bool = False
    """Whether nothing was trained on under its question (embedded default only)."""
    place: int = 0
    """Of its row in the file, counted from 0."""

    @classmethod
    def of(cls, row: dict[str, Any], tokens: Sequence[Tensor], place: int = 0) -> "TokenPair":
        """Of a row and the tokens of its texts."""
        prompt, chosen, rejected = tokens
        return cls(prompt, chosen, rejected, row.get("held_out_question", False), place)

    @property
    def differs(self) -> bool:
        """Whether there is anything to prefer: cut to the longest response, two answers may be the same."""
        return not torch.equal(self.chosen, self.rejected)

    @property
    def longer(self) -> int:
        """Tokens of the longer answer."""
        return max(len(self.chosen), len(self.rejected))

    @property
    def tokens(self) -> int:
        """Of both rows together."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


def left_out(count: int, of: int, limit: int) -> str:
    """The sentence about pairs that do not differ within data.max_response_tokens, which is `limit`."""
    return (
        f"{count} of {of} pairs are left out: chosen and rejected are the same in their first {limit} tokens "
        f"(data.max_response_tokens)"
    )


def rows_of(pairs: Sequence[TokenPair]) -> list[tuple[Tensor, Tensor]]:
    """Prompts and answers of one forward pass: all chosen ones, then all rejected ones."""
    return [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]


def length_bucket(tokens: int) -> int:
    """The smallest bucket that holds an answer of so many tokens (the last one holds all longer ones)."""
    return next((bucket for bucket in LENGTH_BUCKETS if tokens <= bucket), LENGTH_BUCKETS[-1])
