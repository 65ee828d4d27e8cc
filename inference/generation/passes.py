"""Forward passes for generation: prompts into the cache, then a token a row.

`PackedPasses` runs every family whose attention goes through transformers' interface, without padding. `PaddedPasses`
runs any other causal language model of transformers through its own cache interface. Both give the same numbers.
What several packed sequences begin with, a system prompt or a prompt with several answers, is computed once
(`Prefixes`): a token depends on those before it in its own sequence alone, so sequences that begin alike share
everything but attention, which sees each of them whole.
"""

import inspect
import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from inference.families import require_supported_family
from inference.generation.attention import NextTokens, Sequences, Tokens, can_pack, packed
from inference.generation.cpu import Exactness, filled, with_more
from inference.generation.kv_cache import KVCache, Places

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


class Passes(Protocol):
    device: torch.device

    def prefill(self, prompts: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        """Put prompts, int64 (length) each, into rows of the cache; the logits after each, (prompts, vocabulary)."""
        ...

    def decode(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Append `tokens`, int64 (n), to rows 0 .. n-1, which are `lengths` long; logits (n, vocabulary)."""
        ...


def make_passes(model: nn.Module, cache: KVCache, pad_id: int, exact: Exactness | None = None) -> Passes:
    """`exact` is for models that run packed. Raises UserError for a model whose memory is not keys and values."""
    inner: Any = unwrapped(model)
    if getattr(inner, "config", None) is not None:
        require_supported_family(inner.config)
    return PackedPasses(inner, cache, exact) if can_pack(inner) else PaddedPasses(inner, cache, pad_id)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model of transformers inside wrappers (DeepSpeed, DistributedDataParallel, PEFT); adapters stay active."""
    while isinstance(wrapped := getattr(model, "module", None), nn.Module):
        model = wrapped
    base_model = getattr(model, "get_base_model", None)
    return base_model() if base_model is not None else model


def preferred_cache_dtype(model: nn.Module, exact: Exactness | None) -> torch.dtype | None:
    """fp32 on a CPU, where fused attention with one query is fastest in it; else the model's own (None)."""
    return torch.float32 if exact is None and next(model.parameters()).device.type == "cpu" else None


def packed_logits(
    model: Any, ids: Tensor, positions: Tensor, tokens: Tokens, wanted: Tensor, exact: Exactness | None = None
) -> Tensor:
    """Of a model that takes packed rows: ids and positions (1, tokens), places int64 (n) -> (n, vocabulary)."""
    count, rows = len(wanted), 1 if exact is None else exact.rows
    ids, positions, wanted = filled(ids, rows), filled(positions, rows), filled(wanted, rows)
    output = model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=wanted, tokens=tokens)
    return output.logits[0, :count]


class PackedPasses:
    def __init__(self, model: nn.Module, cache: KVCache, exact: Exactness | None = None):
        self.model: Any = model
        self.cache, self.exact = cache, exact
        self.device = next(model.parameters()).device

    def prefill(self, prompts: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        lengths = [len(prompt) for prompt in prompts]
        sequences = Sequences(lengths, self.cache, rows, self.exact)
        prefixes = Prefixes.of(sequences, itertools.chain(*(prompt.tolist() for prompt in prompts)), self.device)
        ids = torch.cat(list(prompts)).to(self.device, non_blocking=True)
        positions = sequences.positions(self.device)
        last = (torch.tensor(lengths).cumsum(0) - 1).to(self.device, non_blocking=True)
        if prefixes:
            ids, positions, last = ids[prefixes.computed], positions[:, prefixes.computed], prefixes.stands_for[last]
        return self._logits(ids[None], positions, prefixes or sequences, last)

    def decode(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        return self.decode_at(tokens, Places.of(lengths, self.device, self.exact))

    def decode_at(self, tokens: Tensor, places: Places) -> Tensor:
        """`decode` for places that are on the device already."""
        next_tokens = NextTokens(self.cache, places, self.exact)
        return self._logits(tokens[None], places.positions[None], next_tokens, places.index)

    def _logits(self, ids: Tensor, positions: Tensor, tokens: Tokens, wanted: Tensor) -> Tensor:
        with packed(self.model):
            return packed_logits(self.model, ids, positions, tokens, wanted, self.exact)


class PaddedPasses:
    def __init__(self, model: nn.Module, cache: KVCache, pad_id: int):
        self.model: Any = model
        self.cache, self.pad_id = cache, pad_id
        self.device = next(model.parameters()).device
        self.accepted = set(inspect.signature(model.forward).parameters)
        self.cache.dtype = None  # the family's own attention takes keys as it made them

    def prefill(self, prompts: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        lengths = [len(prompt) for prompt in prompts]
        ids, mask = right_pad(prompts, self.pad_id)
        own = DynamicCache()
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        logits = self._logits(ids.to(self.device), mask.to(self.device), positions.to(self.device), own)
        for layer, (keys, values, *_) in enumerate(own):
            keys, values = (
                torch.cat([t[row, :, :length] for row, length in enumerate(lengths)], dim=1) for t in (keys, values)
            )
            self.cache.write_prompts(layer, keys, values, rows, lengths)
        index = torch.arange(len(prompts), device=logits.device)
        return logits[index, torch.tensor(lengths, device=logits.device) - 1]

    def decode(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        places = Places.of(lengths, self.device)
        place = torch.arange(places.longest, device=self.device)
        mask = (place >= places.longest - 1 - places.positions[:, None]).long()  # rows end at the right
        slots = Cache(layers=[SlotLayer(self.cache, layer, places) for layer in self.cache.keys])
        return self._logits(tokens[:, None], mask, places.positions[:, None], slots)[:, -1]

    def _logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        optional = {"position_ids": positions} if "position_ids" in self.accepted else {}
        return self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **optional).logits


class SlotLayer(CacheLayerMixin):
    """One layer of a KVCache as the models of transformers want it while one token a row is added: rows that end at
    the right, so that a family's own sliding windows count from each row's newest token."""

    def __init__(self, cache: KVCache, layer: int, places: Places):
        super().__init__()
        self.cache, self.layer, self.places = cache, layer, places

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the cache is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        places = self.places
        keys, values = self.cache.append(self.layer, key_states, value_states, places)
        if places.is_level:
            return keys, values
        shift = places.longest - 1 - places.positions[:, None]  # (rows, 1)
        source = (torch.arange(places.longest, device=keys.device) - shift).clamp_(min=0)[:, None, :, None]
        return keys.gather(2, source.expand_as(keys)), values.gather(2, source.expand_as(values))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.places.longest, 0

    def get_seq_length(self) -> int:
        return self.places.longest - 1

    def get_max_length(self) -> int:
        return self.cache.capacity


def right_pad(sequences: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Sequences (length) of any lengths -> ids and mask, both int64 (rows, longest), beginning at the left."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return ids, mask
