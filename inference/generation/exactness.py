"""The same bits for a token, whatever is computed beside it: in decoding, in a prefill, in scoring and in training.

Layers that work on each token alone give that wherever a product's rows do not depend on how many there are. Fused
attention does not: it sums in blocks that follow the number of queries and keys. So attention is three plain steps
here, product, softmax, product, and whatever a processor's products depend on is made a multiple of something.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from inference.private_surfaces import softmax_backward

QUERIES = 256
"""Queries of one head that training computes at a time: what bounds the memory of their scores."""


@dataclass(frozen=True)
class Exactness:
    """What the products of a processor need so that a row's bits do not depend on the others."""

    rows: int = 1
    """Tokens of a forward pass are filled up to a multiple of this."""
    queries: int = 1
    """Of one product with the keys of a head."""
    keys: int = 1
    summed: int = 2**20
    """Keys that one product adds up, at most: beyond some number libraries divide them into parts of like size."""
    blocked: bool = True
    """Whether weights in oneDNN's blocked order give the bits of the plain ones."""

    def seen(self, keys: int) -> int:
        """The keys that attention runs over where there are so many."""
        return keys + -keys % self.keys


def filled(row: Tensor, multiple: int) -> Tensor:
    """(..., n) -> (..., n and more, a multiple), the last value repeated."""
    more = -row.shape[-1] % multiple
    return torch.cat([row, row[..., -1:].expand(*row.shape[:-1], more)], dim=-1) if more else row


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None, queries: int) -> Tensor:
    """(..., m, head), scaled, and (..., k, head) -> (..., m and more, k), m filled up to a multiple of `queries`.
    `mask`, (..., m, k), is 0 for keys that a query sees, else -inf."""
    scores = with_more(query, 2, -query.shape[-2] % queries) @ key.mT
    if mask is not None:
        scores[..., : query.shape[-2], :] += mask
    return scores.softmax(-1)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, exact: Exactness) -> Tensor:
    """The weighted values, (..., m, head)."""
    weights = attention_weights(query, key, mask, exact.queries)
    size = exact.summed
    sums = weights[..., :size] @ value[..., :size, :]
    for start in range(size, weights.shape[-1], size):
        sums += weights[..., start : start + size] @ value[..., start : start + size, :]
    return sums[..., : query.shape[-2], :]


def with_more(values: Tensor, dimension: int, count: int) -> Tensor:
    """So many zeros behind the values in a dimension, which is counted from the last one, 1."""
    return pad(values, (0, 0) * (dimension - 1) + (0, count)) if count else values


class CausalAttention(torch.autograd.Function):
    """Plain attention over whole sequences, a part of the queries at a time; going back makes the weights again."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, exact: Exactness
    ) -> Tensor:
        """(n, key heads, heads that share one, length, head), (n, key heads, length, head), and values, whose head may
        be of another size -> as the queries, with the head of the values."""
        length = query.shape[-2]
        more = exact.seen(length) - length
        key, value = with_more(key, 2, more), with_more(value, 2, more)
        query = query * scale
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.window, ctx.exact = scale, window, exact
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        for part in parts(query, window, exact):
            keys, values = part.seen(key, value)
            part.put(result, plain_attention(part.of(query), keys, values, part.mask, exact))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(t, dtype=torch.float32) for t in (key, value))
        for part in parts(query, ctx.window, ctx.exact):
            queries, onto = part.of(query), part.of(gradient)
            keys, values = part.seen(key, value)
            weights = attention_weights(queries, keys, part.mask, 1)
            scores = softmax_backward(onto @ values.mT, weights)
            part.put(of_query, scores @ keys)
            for sums, each in zip(part.seen(of_key, of_value), (scores.mT @ queries, weights.mT @ onto), strict=True):
                sums += each
        length = query.shape[-2]
        return of_query * ctx.scale, *(t[..., :length, :].to(query.dtype) for t in (of_key, of_value)), None, None, None


@dataclass(frozen=True)
class Part:
    """Queries at places `start` .. `end` of each sequence, over its first `keys` keys."""

    start: int
    end: int
    keys: int
    mask: Tensor

    def of(self, queries: Tensor) -> Tensor:
        """Those of all heads that share a key head, one behind the other: (n, key heads, m, head)."""
        return queries[..., self.start : self.end, :].flatten(2, 3)

    def put(self, queries: Tensor, values: Tensor) -> None:
        """What `of` took, back into its place."""
        queries[..., self.start : self.end, :] = values.unflatten(2, (queries.shape[2], -1))

    def seen(self, *keys: Tensor) -> list[Tensor]:
        return [each[..., : self.keys, :] for each in keys]


def parts(queries: Tensor, window: int | None, exact: Exactness) -> Iterator[Part]:
    """Of queries (n, key heads, heads that share one, length, head)."""
    sharing, length = queries.shape[2:4]
    for start in range(0, length, QUERIES):
        end = min(start + QUERIES, length)
        keys = exact.seen(end)
        seen = window if window is not None and window < end else end
        yield Part(start, end, keys, causal_mask(start, end, keys, seen, sharing, queries.dtype, queries.device))


@lru_cache(maxsize=64)  # the layers of a model ask for the same ones
def causal_mask(
    start: int, end: int, keys: int, window: int, sharing: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Of queries at places `start` .. `end`, each of which sees the last `window` tokens up to itself, over `keys`;
    repeated for the heads that share them."""
    distance = torch.arange(start, end, device=device)[:, None] - torch.arange(keys, device=device)
    hidden = (distance < 0) | (distance >= window)
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf).repeat(sharing, 1)
