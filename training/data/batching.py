"""Rows of different lengths -> micro-batches of real tokens, shared out over the ranks."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together. `weight` 0 marks one that only keeps this rank in step."""

    rows: list[int]
    weight: float = 1.0


def plan_micro_batches(
    lengths: Sequence[int], token_budget: int, ranks: int = 1, beginnings: Sequence[list[int]] | None = None
) -> list[list[MicroBatch]]:
    """Plan for each rank its micro-batches over rows 0 .. len(lengths) - 1, the same number for every rank.

    Rows are dealt longest first, back and forth, so that ranks get like work; a micro-batch takes rows of like length
    while their tokens stay within `token_budget` (one row always fits). Ranks that run short repeat a row with
    weight 0: under ZeRO-3 a rank that skips a forward pass would leave the others waiting for its weights.

    With `beginnings`, token ids, a micro-batch takes rows that begin alike, which packed models compute once; their
    lengths may differ widely.
    """
    order = longest_first(lengths)
    shares = deal(order, ranks)
    if beginnings is not None:
        shares = [sorted(rows, key=beginnings.__getitem__) for rows in shares]
    return with_equal_counts([fill_micro_batches(rows, lengths, token_budget) for rows in shares], order)


def deal_micro_batches(lengths: Sequence[int], count: int, ranks: int = 1) -> list[list[MicroBatch]]:
    """Plan as `plan_micro_batches`, but with `count` micro-batches of like work on each rank, or one a row."""
    order = longest_first(lengths)
    plans = [[MicroBatch(rows) for rows in deal(share, min(count, len(share)))] for share in deal(order, ranks)]
    return with_equal_counts(plans, order)


def longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


def deal(order: list[int], shares: int) -> list[list[int]]:
    """Deal rows back and forth, so that all shares get like work."""
    hands: list[list[int]] = [[] for _ in range(shares)]
    for i, row in enumerate(order):
        turn, hand = divmod(i, shares)
        hands[hand if turn % 2 == 0 else -1 - hand].append(row)
    return hands


def with_equal_counts(plans: list[list[MicroBatch]], order: list[int]) -> list[list[MicroBatch]]:
    """Pad the plans of ranks that have fewer micro-batches than others with micro-batches of weight 0."""
    count = max(len(plan) for plan in plans)
    for plan in plans:
        plan.extend(MicroBatch([order[-1]], weight=0.0) for _ in range(count - len(plan)))
    return plans


def fill_micro_batches(rows: list[int], lengths: Sequence[int], token_budget: int) -> list[MicroBatch]:
    """Take `rows` in their order, as many a micro-batch as fit; none is split."""
    batches: list[MicroBatch] = []
    room = 0
    for row in rows:
        if batches and lengths[row] <= room:
            batches[-1].rows.append(row)
        else:
            batches.append(MicroBatch([row]))
            room = token_budget
        room -= lengths[row]
    return batches


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Rows of prompt and response, one behind the other: real tokens only."""

    ids: Tensor  # (tokens) int64
    predicting: Tensor  # (response tokens) int64, positions of the tokens that each response token follows
    lengths: list[int]
    tokens: list[int]  # `ids` for the host, which would wait for the device to look at it
    positions: list[int]  # `predicting` for the host

    @classmethod
    def of(cls, rows: Sequence[tuple[Tensor, ...]], device: torch.device) -> "TokenBatch":
        """Pack (prompt ids, response ids) pairs, each int64 (length) with at least one token."""
        ids = torch.cat([part for row in rows for part in row])
        lengths = [len(prompt) + len(answer) for prompt, answer in rows]
        ends = zip(itertools.accumulate(lengths), rows, strict=True)
        positions = [position for end, (_, answer) in ends for position in range(end - len(answer) - 1, end - 1)]
        tokens = [token for row in rows for part in row for token in part.tolist()]
        return cls(ids, torch.tensor(positions, dtype=torch.int64), lengths, tokens, positions).to(device)

    def to(self, device: torch.device) -> "TokenBatch":
        to_host = device.type == "cpu"  # there it would be read before it has come
        ids, predicting = (tensor.to(device, non_blocking=not to_host) for tensor in (self.ids, self.predicting))
        return replace(self, ids=ids, predicting=predicting)

    @property
    def targets(self) -> Tensor:
        """The response tokens, row by row, int64."""
        return self.ids[self.predicting + 1]

    @property
    def last(self) -> Tensor:
        """The position of each row's last token, int64 (rows)."""
        return sent(list(itertools.accumulate(self.lengths, initial=-1))[1:], self.ids.device)

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and positions, int64 (rows, longest) each, beginning at the left; `mask` picks the tokens again."""
        rows = self.ids.split(self.lengths)
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        mask = positions < torch.tensor(self.lengths, device=ids.device)[:, None]
        return ids, mask.long(), positions


def sent(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Make a tensor of numbers on a device, without waiting for what the device has to do before."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
