"""What several sequences begin with is computed once: a system prompt, a prompt with several answers.

A token of a packed row depends on those before it in its own sequence alone, so sequences that begin alike share
everything but attention, which sees each of them whole.
"""

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from inference.generation.attention import Sequences
from inference.generation.exactness import with_more

LEAST = 1 / 16
"""The share of tokens that must be repeats: to put the sequences together again takes time in every layer."""


@dataclass(frozen=True)
class Prefixes:
    """Sequences of which a forward pass holds each beginning once."""

    sequences: Sequences
    computed: Tensor
    """Places of the tokens that it holds in the row of all tokens, int64 (computed tokens)."""
    stands_for: Tensor
    """For each of all tokens the place of the computed one that is the same, int64 (tokens)."""

    @classmethod
    def of(
        cls, sequences: Sequences, ids: Iterable[int], device: torch.device, apart: Collection[int] = ()
    ) -> "Prefixes | None":
        """Of all token ids; None where too little is repeated. `device` is that of the model.

        Tokens at the places `apart` are computed for each sequence.
        """
        own = set(apart)
        found: dict[tuple[int, int], int] = {}  # the computed token before, the token -> the computed token
        computed: list[int] = []
        stands_for: list[int] = []
        tokens = iter(ids)
        for length in sequences.lengths:
            last = -1
            for token in itertools.islice(tokens, length):
                place = len(stands_for)
                last = found.setdefault((last, -1 - place if place in own else token), len(computed))
                if last == len(computed):
                    computed.append(place)
                stands_for.append(last)
        if len(computed) > (1 - LEAST) * len(stands_for):
            return None
        places = (torch.tensor(each).to(device, non_blocking=True) for each in (computed, stands_for))
        return cls(sequences, *places)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        window: int | None,
        dropout: float = 0.0,
    ) -> Tensor:
        q, k, v = (at(heads.transpose(0, 1), self.stands_for).transpose(0, 1) for heads in (query, key, value))
        seen = at(self.sequences.attend(layer, q, k, v, scale, window, dropout), self.computed)
        return with_more(seen, 3, query.shape[1] - len(self.computed))


def at(tokens: Tensor, places: Tensor) -> Tensor:
    """(tokens, ...), int64 (n) -> (n, ...). Gradients of a token that is taken more than once are added in fp32, always
    in the same order."""
    rows = tokens.flatten(1)
    found = embedding(places, rows.float() if rows.requires_grad else rows)
    return found.to(tokens.dtype).unflatten(1, tokens.shape[1:])
