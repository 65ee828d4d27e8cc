"""What a CPU wants: weights in the order that its products like (`BlockedWeights`), and products that give a token the
same bits whatever is computed beside it, in decoding, prefill, scoring and training (`Exactness`).

With few rows, as in a decode step, F.linear in fp32 is 1.5 to 4 times slower on weights in plain order, in bf16 about
twice (`python -m benchmarks.cpu_linear`). The blocked order is made once for each set of weights, beside them.

Layers that work on each token alone give the same bits wherever a product's rows do not depend on how many there are.
Fused attention does not: it sums in blocks that follow the number of queries and keys. So attention is three plain
steps here, product, softmax, product, and whatever a processor's products depend on is made a multiple of something.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from inference.private_surfaces import (
    blocks_bf16,
    in_blocked_order,
    linear_and_sum_on_blocked,
    linear_on_blocked,
    softmax_backward,
)

QUERIES = 256
"""Queries of one head that training computes at a time: what bounds the memory of their scores."""


@dataclass(frozen=True)
class Exactness:
    """What the products of a processor need so that a row's bits do not depend on the others."""

    rows: int = 1
    """Tokens of a forward pass are filled up to a multiple of this."""
    queries: int = 1
    """Queries in one product with the keys of a head are filled up to a multiple of this."""
    keys: int = 1
    """Keys that attention runs over are filled up to a multiple of this."""
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
        of_query, length = torch.empty_like(query), query.shape[-2]
        sums: list[Tensor] = []
        for part in parts(query, ctx.window, ctx.exact):
            queries, onto = part.of(query), part.of(gradient)
            keys, values = part.seen(key, value)
            weights = attention_weights(queries, keys, part.mask, 1)
            scores = softmax_backward(onto @ values.mT, weights)
            part.put(of_query, scores @ keys)
            terms = [scores.mT @ queries, weights.mT @ onto]
            if part.keys == key.shape[-2] and not sums:
                sums = terms
                break
            sums = sums or [torch.zeros_like(t, dtype=torch.float32) for t in (key, value)]
            for so_far, of_part in zip(part.seen(*sums), terms, strict=True):
                so_far += of_part
        return of_query * ctx.scale, *(t[..., :length, :].to(query.dtype) for t in sums), None, None, None


@dataclass(frozen=True)
class Part:
    """Queries at positions `start` .. `end` of each sequence, over its first `keys` keys."""

    start: int
    end: int
    keys: int
    mask: Tensor

    def of(self, queries: Tensor) -> Tensor:
        """The queries of heads that share a key head, one behind the other: (n, key heads, m, head)."""
        return queries[..., self.start : self.end, :].flatten(2, 3)

    def put(self, queries: Tensor, values: Tensor) -> None:
        """Put back what `of` took."""
        queries[..., self.start : self.end, :] = values.unflatten(2, (queries.shape[2], -1))

    def seen(self, *keys: Tensor) -> list[Tensor]:
        return [tensor[..., : self.keys, :] for tensor in keys]


def parts(queries: Tensor, window: int | None, exact: Exactness) -> Iterator[Part]:
    """Cut queries (n, key heads, heads that share one, length, head) into parts."""
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
    """The mask of queries at positions `start` .. `end` over `keys`, repeated for the heads that share them: each query
    sees the last `window` tokens up to itself."""
    distance = torch.arange(start, end, device=device)[:, None] - torch.arange(keys, device=device)
    hidden = (distance < 0) | (distance >= window)
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf).repeat(sharing, 1)


class Groups:
    """Sequences of like length, which attention computes together: filled up at the right, where nothing is seen."""

    def __init__(self, lengths: Sequence[int], waste: float, together: float):
        """A sequence joins longer ones where its pairs of tokens are at most `waste` fewer, and at most `together`
        tokens come together."""
        ends = list(itertools.accumulate(lengths))
        groups: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            longest = lengths[groups[-1][0]] if groups else 0
            is_like = longest**2 - lengths[index] ** 2 <= waste
            if groups and is_like and longest * (len(groups[-1]) + 1) <= together:
                groups[-1].append(index)
            else:
                groups.append([index])
        self.shapes = [(len(group), lengths[group[0]]) for group in groups]
        filled, places = list[Tensor](), torch.empty(sum(lengths), dtype=torch.int64)
        begin = 0
        for group, (_, longest) in zip(groups, self.shapes, strict=True):
            for index in group:
                own = slice(ends[index] - lengths[index], ends[index])
                places[own] = torch.arange(begin, begin + lengths[index])
                filled.append(torch.arange(own.start, own.start + longest).clamp_(max=own.stop - 1))
                begin += longest
        self.source, self.places = torch.cat(filled), places
        """The token in each place, int64 (places), and the place of each token, int64 (tokens)."""
        self.is_plain = len(places) == begin and bool((places[1:] > places[:-1]).all())

    def fill(self, tokens: Tensor) -> list[Tensor]:
        """(tokens, heads, head) -> (sequences, heads, longest, head) of each group."""
        if not self.is_plain:
            tokens = Filled.apply(tokens, *self._on(tokens.device))
        parts = tokens.split([count * longest for count, longest in self.shapes])
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, self.shapes, strict=True)]

    def take_back(self, places: Tensor) -> Tensor:
        """(places, ...) -> (tokens, ...)."""
        return places if self.is_plain else TakenBack.apply(places, *self._on(places.device))

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.source.device != device:
            self.source, self.places = (t.to(device, non_blocking=True) for t in (self.source, self.places))
        return self.source, self.places


class Filled(torch.autograd.Function):
    """Tokens in their places; to what fills up, no gradient comes from attention."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, source: Tensor, places: Tensor) -> Tensor:
        ctx.places = places
        return tokens.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.places), None, None


class TakenBack(torch.autograd.Function):
    """Tokens out of their places."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, source: Tensor, places: Tensor) -> Tensor:
        ctx.places, ctx.count = places, len(source)
        return tensor.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        whole = gradient.new_zeros(ctx.count, *gradient.shape[1:])
        return whole.index_copy_(0, ctx.places, gradient), None, None


ROWS = 32
"""Rows that the order is made for; others run on it too."""
Forward = Callable[[Tensor], Tensor]
MOST_BYTES = 4 * 2**30
"""Weights beyond this are left as they are: a second copy would cost more than it gives. A fixed bound, not what is
free now: a resumed run must compute as the first one did."""


SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of a module, by name, that are given the same inputs."""


class BlockedWeights:
    """The weights of a model's linear layers in blocked order, or nothing where that is unavailable or too large.

    A plain LoRA layer becomes three products, the last of which adds itself to the first, as in training
    (`training.models.adapters`): with few rows PEFT's own steps take longer than the base layer. Layers that share
    their inputs become one: with few rows calling a product takes as long as computing it.
    """

    def __init__(self, model: nn.Module):
        self.forwards: dict[nn.Module, Forward] = {}
        if not can_block(model):
            return
        done: set[nn.Module] = set()
        for module in model.modules():
            sharing: list[list[Any]] = [[getattr(module, name, None) for name in names] for names in SHARING]
            for layers in [*sharing, [module]]:
                if all(is_linear(layer) and layer not in done for layer in layers) and have_like_inputs(layers):
                    self.forwards |= zip(layers, forwards_of(layers), strict=True)
                    done.update(part for layer in layers for part in layer.modules())

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the layers compute with the blocked weights. They know nothing of gradients."""
        for module, forward in self.forwards.items():
            vars(module)["forward"] = forward  # a module's own way of setting takes longer, at each step
        try:
            yield
        finally:
            for module in self.forwards:
                del vars(module)["forward"]


def can_block(model: nn.Module) -> bool:
    weight = next(model.parameters())
    return (
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and blocks_bf16()))
        and sum(p.numel() * p.element_size() for p in model.parameters()) <= MOST_BYTES
    )


def is_linear(layer: Any) -> bool:
    """A linear layer, a Conv1D (whose weight is (inputs, outputs)) or one of them with plain LoRA."""
    return type(layer) in (nn.Linear, Conv1D) or is_plain_lora(layer)


def is_plain_lora(layer: Any) -> bool:
    """A LoRA layer of PEFT over a linear one, with one adapter in the same format and nothing else to it."""
    if not hasattr(layer, "lora_A") or type(getattr(layer, "base_layer", None)) not in (nn.Linear, Conv1D):
        return False
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or layer.merged or layer.lora_variant or any(layer.lora_bias.values()):
        return False
    return layer.lora_A[names[0]].weight.dtype == layer.base_layer.weight.dtype


def weight_of(layer: Any) -> Tensor:
    """(outputs, inputs), without adapters."""
    base = getattr(layer, "base_layer", layer)
    return base.weight.t() if type(base) is Conv1D else base.weight


def have_like_inputs(layers: Sequence[Any]) -> bool:
    return len({(weight.shape[1], weight.dtype) for weight in map(weight_of, layers)}) == 1


def forwards_of(layers: Sequence[Any]) -> list[Forward]:
    """Functions that compute what the linear layers do with their weights as they are now. All layers are given the
    same inputs."""
    bases = [getattr(layer, "base_layer", layer) for layer in layers]
    weights = [weight_of(layer) for layer in layers]
    bias = bases[0].bias
    if len(bases) > 1 and any(base.bias is not None for base in bases):
        zeros = (weight.new_zeros(len(weight)) for weight in weights)
        biases = [zero if base.bias is None else base.bias for base, zero in zip(bases, zeros, strict=True)]
        bias = torch.cat(biases).detach()
    product = blocked_product(torch.cat(weights) if len(weights) > 1 else weights[0].contiguous(), bias)
    if any(map(is_plain_lora, layers)):
        product = with_adapters(product, layers, weights)
    if len(layers) == 1:
        return [product]
    shared = SharedProduct(product, [len(weight) for weight in weights])
    return [partial(shared.part, index) for index in range(len(layers))]


def blocked_product(weight: Tensor, bias: Tensor | None) -> Forward:
    """x -> x weight^T + bias for this weight, (outputs, inputs), as it is now."""
    blocked, product = in_blocked_order(weight.detach(), ROWS), linear_on_blocked()

    def forward(inputs: Tensor) -> Tensor:
        return product(inputs, blocked, bias, "none", [], "")

    return forward


def with_adapters(base: Forward, layers: Sequence[Any], weights: Sequence[Tensor]) -> Forward:
    """x -> base(x) + scale B A x of the layers with plain LoRA, as they are now; base(x) while they are disabled,
    which PEFT does with all at once."""
    adapted = [layer for layer in layers if is_plain_lora(layer)]
    downs, ups = [], [weight.new_zeros(len(weight), 0) for weight in weights]
    for index, layer in enumerate(layers):
        if layer in adapted:
            (name,) = (name for name in layer.active_adapters if name in layer.lora_A)
            downs.append(layer.lora_A[name].weight)
            ups[index] = layer.lora_B[name].weight.detach() * layer.scaling[name]
    down, up = blocked_product(torch.cat(downs), None), in_blocked_order(torch.block_diag(*ups), ROWS)
    plus_product = linear_and_sum_on_blocked()

    def forward(inputs: Tensor) -> Tensor:
        sums = base(inputs)
        return sums if adapted[0].disable_adapters else plus_product(down(inputs), sums, up, None, "add")

    return forward


class SharedProduct:
    """One product of layers that are given the same inputs one after another: the first call computes for all."""

    def __init__(self, product: Forward, outputs: Sequence[int]):
        self.product, self.outputs = product, list(outputs)
        self._inputs: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def part(self, index: int, inputs: Tensor) -> Tensor:
        if inputs is not self._inputs or index not in self._parts:
            self._inputs, self._parts = inputs, self._all(inputs)
        part = self._parts.pop(index)
        if not self._parts:
            self._inputs = None
        return part

    def _all(self, inputs: Tensor) -> dict[int, Tensor]:
        return dict(enumerate(self.product(inputs).split(self.outputs, -1)))
