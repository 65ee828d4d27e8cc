"""Forward passes for generation: prompts into the cache, then a token a row.

`PackedPasses` runs every family whose attention goes through transformers' interface, without padding. `PaddedPasses`
runs any other causal language model of transformers through its own cache interface. Both give the same numbers.
What several packed sequences begin with, a system prompt or a prompt with several answers, is computed once
(`Prefixes`): a token depends on those before it in its own sequence alone, so sequences that begin alike share
everything but attention, which sees each of them whole.
"""

import inspect
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from inference.families import require_supported_family
from inference.generation.attention import NextTokens, Sequences, Tokens, can_pack, packed
from inference.generation.cpu import Exactness, filled, with_more
from inference.generation.kv_cache import CachePositions, KVCache
from inference.generation.sampler import Draw, RowKeys, Sample, SamplingSettings

LEAST = 1 / 16
"""The share of tokens that must be repeats: to put the sequences together again takes time in every layer."""


@dataclass(frozen=True)
class Prefixes:
    """Sequences of which a forward pass holds each beginning once."""

    sequences: Sequences
    computed: Tensor
    """Indices of the tokens that it holds in the row of all tokens, int64 (computed tokens)."""
    stands_for: Tensor
    """The index, for each of all tokens, of the computed one that is the same, int64 (tokens)."""

    @classmethod
    def of(
        cls, sequences: Sequences, ids: Iterable[int], device: torch.device, apart: Collection[int] = ()
    ) -> "Prefixes | None":
        """Look for repeats in all token ids; None where there are too few. `device` is that of the model.

        Tokens at the indices `apart` are computed for each sequence.
        """
        tokens = iter(ids)
        rows = [list(itertools.islice(tokens, length)) for length in sequences.lengths]
        if beginnings(rows) < LEAST * sum(sequences.lengths):  # most often; and to find it out is quick
            return None
        own = set(apart)
        computed_of: dict[tuple[int, int], int] = {}  # the computed token before, the token -> the computed token
        computed: list[int] = []
        stands_for: list[int] = []
        for row in rows:
            last = -1
            for token in row:
                index = len(stands_for)
                last = computed_of.setdefault((last, -1 - index if index in own else token), len(computed))
                if last == len(computed):
                    computed.append(index)
                stands_for.append(last)
        if len(computed) > (1 - LEAST) * len(stands_for):
            return None
        tensors = (torch.tensor(indices).to(device, non_blocking=True) for indices in (computed, stands_for))
        return cls(sequences, *tensors)

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


def beginnings(rows: Iterable[list[int]]) -> int:
    """Count the tokens that need not be computed again where each beginning is computed once."""
    pairs = (zip(*pair, strict=False) for pair in itertools.pairwise(sorted(rows)))
    return sum(len(list(itertools.takewhile(lambda both: both[0] == both[1], pair))) for pair in pairs)


def at(tokens: Tensor, indices: Tensor) -> Tensor:
    """(tokens, ...), int64 (n) -> (n, ...). Gradients of a token that is taken more than once are added in fp32, always
    in the same order."""
    rows = tokens.flatten(1)
    taken = embedding(indices, rows.float() if rows.requires_grad else rows)
    return taken.to(tokens.dtype).unflatten(1, tokens.shape[1:])


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
    """Run a model that takes packed rows: ids and positions (1, tokens), indices int64 (n) -> (n, vocabulary)."""
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
        return self.decode_at(tokens, CachePositions.of(lengths, self.device, self.exact))

    def decode_at(self, tokens: Tensor, positions: CachePositions) -> Tensor:
        """`decode` for positions that are on the device already."""
        next_tokens = NextTokens(self.cache, positions, self.exact)
        return self._logits(tokens[None], positions.next[None], next_tokens, positions.index)

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
        positions = CachePositions.of(lengths, self.device)
        column = torch.arange(positions.longest, device=self.device)
        mask = (column >= positions.longest - 1 - positions.next[:, None]).long()  # rows end at the right
        slots = Cache(layers=[SlotLayer(self.cache, layer, positions) for layer in self.cache.keys])
        return self._logits(tokens[:, None], mask, positions.next[:, None], slots)[:, -1]

    def _logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        optional = {"position_ids": positions} if "position_ids" in self.accepted else {}
        return self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **optional).logits


class SlotLayer(CacheLayerMixin):
    """One layer of a KVCache as the models of transformers want it while one token a row is added: rows that end at
    the right, so that a family's own sliding windows count from each row's newest token."""

    def __init__(self, cache: KVCache, layer: int, positions: CachePositions):
        super().__init__()
        self.cache, self.layer, self.positions = cache, layer, positions

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the cache is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        positions = self.positions
        keys, values = self.cache.append(self.layer, key_states, value_states, positions)
        if positions.is_level:
            return keys, values
        shift = positions.longest - 1 - positions.next[:, None]  # (rows, 1)
        source = (torch.arange(positions.longest, device=keys.device) - shift).clamp_(min=0)[:, None, :, None]
        return keys.gather(2, source.expand_as(keys)), values.gather(2, source.expand_as(values))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.positions.longest, 0

    def get_seq_length(self) -> int:
        return self.positions.longest - 1

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


MOST_STEPS = 8
"""Steps between two looks of the host at what was drawn. More cost more tokens behind an end, that nobody wants."""
CONTEXT = 128
"""Tokens that buckets of the context are multiples of."""
WARM_UP_STEPS = 2
"""Before a capture, so that libraries set themselves up outside of it."""

logger = logging.getLogger(__name__)


class GraphKey(NamedTuple):
    """All that a captured step has fixed, beside addresses."""

    rows: int
    context: int
    settings: SamplingSettings
    end_ids: tuple[int, ...]
    may_end: bool


class Replay:
    """The static step over one cache and one set of weights; the engine keeps it from call to call.

    On CUDA each size, from buckets, is captured once as a graph and replayed; elsewhere, and where a capture fails, the
    step runs eagerly. Rows beyond the running ones are decoded too, into rows of the cache that nobody reads.
    """

    def __init__(self, passes: PackedPasses):
        self.passes, self.cache, self.device = passes, passes.cache, passes.device
        self.addresses = addresses(passes)
        self.captures = can_capture(self.device)
        self.graphs: dict[GraphKey, torch.cuda.CUDAGraph] = {}
        # of each row: newest token, its position; tokens of the response, of this run; sample, seed, iteration
        self.state = torch.zeros(7, self.cache.slots, dtype=torch.int64, device=self.device)
        # tokens and log-probabilities of a run; tokens are exact in float64, and one tensor is read at once
        self.drawn = torch.zeros(2, MOST_STEPS, self.cache.slots, dtype=torch.float64, device=self.device)

    def holds_for(self, passes: PackedPasses) -> bool:
        """Whether cache, weights and buffers lie where they lay: a graph reads these addresses."""
        return passes.cache is self.cache and addresses(passes) == self.addresses

    def run(self, samples: list[Sample], steps: int, draw: Draw) -> tuple[list[list[int]], list[list[float]]]:
        """Up to `MOST_STEPS` tokens for each of the samples, which are rows 0, 1, ... of the cache, and their
        log-probabilities: (steps, samples) each. They are not written into the samples."""
        rows = row_bucket(len(samples), self.cache.slots)
        context = context_bucket(max(sample.length for sample in samples) - 1 + steps, self.cache.capacity)
        self._load(samples, rows, draw)
        step = self._prepared(rows, context, draw)
        for _ in range(steps):
            step()
        tokens, logprobs = self.drawn[:, :steps, : len(samples)].tolist()  # the host waits here
        return [[int(token) for token in drawn] for drawn in tokens], logprobs

    def step(self, rows: int, context: int, draw: Draw) -> None:
        """One token for rows 0 .. rows-1, none longer than `context` with it; made from `state` and left there for
        the next step. Nothing in it may depend on what only the device knows."""
        state = self.state[:, :rows]
        token, end, position, number, sample, seed, iteration = state
        logits = self.passes.decode_at(token, CachePositions(end, context, is_level=False))
        tokens, logprobs = draw.tokens(logits, RowKeys(seed, iteration), sample, position)
        drawn = torch.stack((tokens.double(), logprobs.double()))[:, None]  # (2, 1, rows)
        self.drawn[:, :, :rows].scatter_(1, number.expand_as(drawn), drawn)
        token.copy_(tokens)
        state[1:4].add_(1)

    def _load(self, samples: list[Sample], rows: int, draw: Draw) -> None:
        """Bring the rows to the device in one copy."""
        seed, iteration = draw.key.seed, draw.key.iteration
        numbers: list[tuple[int, ...]] = [
            (sample.response_ids[-1], sample.length - 1, len(sample.response_ids), 0, sample.index, seed, iteration)
            for sample in samples
        ]
        numbers += [(0,) * len(self.state)] * (rows - len(samples))
        self.state[:, :rows] = torch.tensor(numbers).T

    def _prepared(self, rows: int, context: int, draw: Draw) -> Callable[[], None]:
        """The step as a graph, captured now if it is new; eager where that cannot be. The rows must be loaded."""
        step = partial(self.step, rows, context, draw)
        key = GraphKey(rows, context, draw.settings, draw.end_ids, draw.may_end)
        if key not in self.graphs:
            if not self.captures:
                return step
            try:
                self.graphs[key] = self._capture(step)
            except RuntimeError as error:  # torch's and CUDA's errors are such
                self.captures = False
                reason = str(error).partition("\n")[0]
                logger.warning("decoding goes on without new CUDA graphs, slower; a capture failed: %s", reason)
                return step
        return self.graphs[key].replay

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Warm up on a side stream and capture there, as torch's notes on CUDA graphs say."""
        graph = torch.cuda.CUDAGraph()
        loaded, current = self.state.clone(), torch.cuda.current_stream(self.device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):  # leads back out when the capture fails; torch.cuda.graph alone does not
            for _ in range(WARM_UP_STEPS):
                step()
                self.state.copy_(loaded)
            # other threads, such as NCCL's, may call CUDA meanwhile
            with torch.cuda.graph(graph, self._pool, self._side, capture_error_mode="thread_local"):
                step()
        current.wait_stream(self._side)
        return graph

    @cached_property
    def _side(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    @cached_property
    def _pool(self) -> Any:
        """All graphs share their memory: one runs at a time, and what is to stay lies outside."""
        return torch.cuda.graph_pool_handle()


def can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


def addresses(passes: PackedPasses) -> tuple[int, ...]:
    """The addresses of the model's parameters and buffers."""
    return tuple(tensor.data_ptr() for part in (passes.model.parameters(), passes.model.buffers()) for tensor in part)


def row_bucket(rows: int, slots: int) -> int:
    """The next power of two, or all slots."""
    return min(slots, 1 << (rows - 1).bit_length())


def context_bucket(tokens: int, capacity: int) -> int:
    """The next multiple of `CONTEXT`, beyond 1024 of a power of two that keeps the excess below a quarter."""
    multiple = max(CONTEXT, 1 << (tokens - 1).bit_length() >> 3)
    return min(capacity, -(-tokens // multiple) * multiple)
