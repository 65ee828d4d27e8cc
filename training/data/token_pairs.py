"""Preference pairs as tokens: what the reward model and DPO learn from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.data.batching import sent
from training.data.rows import margin_of

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
    margin: float = 0.0
    """By how much the chosen answer is said to be better; 0 where nothing says it."""

    @classmethod
    def of(cls, row: dict[str, Any], tokens: Sequence[Tensor], place: int = 0) -> "TokenPair":
        """Of a row and the tokens of its texts."""
        prompt, chosen, rejected = tokens
        return cls(prompt, chosen, rejected, row.get("held_out_question", False), place, margin_of(row) or 0.0)

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


def grouped(pairs: Sequence[TokenPair], by_prompt: bool) -> list[list[int]]:
    """The places of pairs that are learned from together: all of a prompt, or each alone."""
    groups: dict[Any, list[int]] = {}
    for place, pair in enumerate(pairs):
        groups.setdefault(tuple(pair.prompt.tolist()) if by_prompt else place, []).append(place)
    return list(groups.values())


def answers_of(groups: Sequence[Sequence[TokenPair]]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Prompts and answers of one forward pass, each answer once in a group, and where the chosen and the rejected one
    of each pair are among them: int64 (2, pairs)."""
    rows, places = list[tuple[Tensor, Tensor]](), list[int]()
    found: dict[tuple[int, ...], int] = {}
    for side in ("chosen", "rejected"):
        for number, group in enumerate(groups):
            for pair in group:
                answer: Tensor = getattr(pair, side)
                place = found.setdefault((number, *answer.tolist()), len(rows))
                if place == len(rows):
                    rows.append((pair.prompt, answer))
                places.append(place)
    return rows, torch.tensor(places).view(2, -1)


def tokens_of(group: Sequence[TokenPair]) -> int:
    """That a group takes in a forward pass."""
    if len(group) == 1:
        return group[0].tokens
    return sum(len(prompt) + len(answer) for prompt, answer in answers_of([group])[0])


def shares_of(groups: Sequence[Sequence[Any]], device: torch.device) -> Tensor:
    """What each pair counts, so that every group counts 1: float32 (pairs)."""
    return sent([1 / len(group) for group in groups for _ in group], device)


def length_bucket(tokens: int) -> int:
    """The smallest bucket that holds an answer of so many tokens (the last one holds all longer ones)."""
    return next((bucket for bucket in LENGTH_BUCKETS if tokens <= bucket), LENGTH_BUCKETS[-1])
