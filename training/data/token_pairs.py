"""Preference pairs as tokens: what the reward model and DPO learn from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.chat_format import ChatFormat
from training.config import DataSettings


@dataclass(frozen=True)
class TokenPair:
    """One prompt, two answers; int64 (length) each."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor
    is_unseen: bool = False
    """Whether nothing was trained on under its question (embedded default only)."""

    @classmethod
    def encode(cls, row: dict[str, Any], chat_format: ChatFormat, data: DataSettings) -> "TokenPair":
        return cls(
            torch.tensor(chat_format.prompt_ids(row["prompt"], data.max_prompt_tokens)),
            torch.tensor(chat_format.response_ids(row["chosen"], data.max_response_tokens)),
            torch.tensor(chat_format.response_ids(row["rejected"], data.max_response_tokens)),
            row.get("held_out_question", False),
        )

    @property
    def tokens(self) -> int:
        """Of both rows together."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


def rows_of(pairs: Sequence[TokenPair]) -> list[tuple[Tensor, Tensor]]:
    """Prompts and answers of one forward pass: all chosen ones, then all rejected ones."""
    return [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
