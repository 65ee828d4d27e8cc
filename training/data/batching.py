"""Rows of different lengths -> micro-batches with little padding, shared out over the ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together. `weight` 0 marks one that only keeps this rank in step."""

    rows: list[int]
    weight: float = 1.0


def plan_micro_batches(lengths: Sequence[int], token_budget: int, ranks: int = 1) -> list[list[MicroBatch]]:
    """For each rank its micro-batches over rows 0 .. len(lengths) - 1, the same number for every rank.

    Rows are dealt longest first, back and forth, so that ranks get like work; a micro-batch takes rows while
    (rows x longest) stays within `token_budget` (one row always fits). Ranks that run short repeat a row with
    weight 0: under ZeRO-3 a rank that skips a forward pass would leave the others waiting for its weights.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for place, row in enumerate(order):
        turn, seat = divmod(place, ranks)
        shares[seat if turn % 2 == 0 else ranks - 1 - seat].append(row)
    plans = [fill_micro_batches(share, lengths, token_budget) for share in shares]
    count = max(len(plan) for plan in plans)
    for plan in plans:
        plan.extend(MicroBatch([order[-1]], weight=0.0) for _ in range(count - len(plan)))
    return plans


def fill_micro_batches(rows: list[int], lengths: Sequence[int], token_budget: int) -> list[MicroBatch]:
    """`rows` come longest first, so the first of a micro-batch sets its padded length."""
    batches: list[MicroBatch] = []
    for row in rows:
        if batches and (len(batches[-1].rows) + 1) * lengths[batches[-1].rows[0]] <= token_budget:
            batches[-1].rows.append(row)
        else:
            batches.append(MicroBatch([row]))
    return batches


@dataclass(frozen=True)
class TokenBatch:
    """Padded token rows, prompts and responses concatenated; padding on the right."""

    ids: Tensor  # (rows, length) int64
    mask: Tensor  # (rows, length) int64, 1 on real tokens
    response: Tensor  # (rows, length) bool, True on response tokens

    @classmethod
    def of(cls, rows: Sequence[tuple[Tensor, Tensor]], pad_id: int, device: torch.device) -> "TokenBatch":
        """From (prompt ids, response ids) pairs, each int64 (length)."""
        longest = max(len(prompt) + len(response) for prompt, response in rows)
        ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        trained = torch.zeros_like(ids, dtype=torch.bool)
        for i, (prompt, response) in enumerate(rows):
            end = len(prompt) + len(response)
            ids[i, : len(prompt)] = prompt
            ids[i, len(prompt) : end] = response
            mask[i, :end] = 1
            trained[i, len(prompt) : end] = True
        return cls(ids.to(device), mask.to(device), trained.to(device))

    @property
    def positions(self) -> Tensor:
        """(rows, length) int64; padding repeats the last real position."""
        return (self.mask.cumsum(-1) - 1).clamp(min=0)

    @property
    def last(self) -> Tensor:
        """Index of each row's last real token, int64 (rows)."""
        return self.mask.sum(-1) - 1
