"""Attention without padding, behind transformers' own attention interface.

The tokens of a forward pass lie in one row, (1, tokens): several sequences one behind the other (`Sequences`: scoring,
training, prefill), or the next token of every running sample (`NextTokens`: decoding). The models of transformers hand
the keyword `tokens` down to the attention function, which asks it what each token may see. So every family whose
attention goes through the interface runs here as it is; `can_pack` says which do.
"""

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.initialization import no_init_weights

from inference.families import backbone_of, layer_kinds, layer_values, text_config
from inference.generation.cpu import CausalAttention, Exactness, Groups, plain_attention, with_more
from inference.generation.kv_cache import CachePositions, KVCache
from inference.private_surfaces import attention_of, goes_through_interface, set_attention

PACKED_ATTENTION = "rlhf_chat_packed"
MORE_THAN_SOFTMAX = ("softcap", "s_aux", "sinks", "position_bias")
"""Keywords that transformers gives to attention which is more than a scaled softmax (Gemma 2, gpt-oss)."""


class NotHandedDown(ValueError):
    """A call without the keyword `tokens`."""


class MoreThanSoftmax(NotImplementedError):
    """A call for attention that is more than a scaled softmax over what came before."""


class Tokens(Protocol):
    """What the tokens of a packed row are to each other."""

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
        """(heads, tokens, head), keys and values with as many heads or fewer -> (tokens, heads, head)."""
        ...


class Sequences:
    """Whole sequences, causal each. With a cache their keys and values are stored in the given rows."""

    def __init__(
        self,
        lengths: Sequence[int],
        cache: KVCache | None = None,
        rows: Sequence[int] = (),
        exact: Exactness | None = None,
    ):
        """`exact` asks for attention whose bits do not depend on the other tokens; it knows no dropout."""
        self.lengths = list(lengths)
        self.cache, self.rows, self.exact = cache, rows, exact
        self._bounds: Tensor | None = None
        self._groups: dict[float, Groups] = {}

    def positions(self, device: torch.device) -> Tensor:
        """Each token's position in its sequence, int64 (1, tokens)."""
        return torch.cat([torch.arange(length) for length in self.lengths])[None].to(device, non_blocking=True)

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
        if self.cache is not None:
            self.cache.write_prompts(layer, key, value, self.rows, self.lengths)
        is_bf16_on_cpu = query.dtype == torch.bfloat16 and query.device.type == "cpu"
        if self.exact is not None or (is_bf16_on_cpu and not dropout):  # plain products are fastest there
            return self._attend_plainly(query, key, value, scale, window, self.exact or PLAIN)
        if is_bf16_on_cpu:
            return self._attend(query.float(), key.float(), value.float(), scale, window, dropout).to(query.dtype)
        return self._attend(query, key, value, scale, window, dropout)

    def bounds(self, device: torch.device) -> Tensor:
        """Where each sequence begins, and the end of the last one, int32 (sequences + 1)."""
        if self._bounds is None or self._bounds.device != device:
            ends = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32)
            self._bounds = ends.to(device, non_blocking=True)
        return self._bounds

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None, dropout: float
    ) -> Tensor:
        window = None if window is None or window >= max(self.lengths) else window
        if takes_packed(query, value) and not dropout and (kernel := packed_kernel()) and kernel.knows(window):
            return kernel(query, key, value, self.bounds(query.device), max(self.lengths), scale, window)
        key, value = repeat_heads(key, query.shape[0]), repeat_heads(value, query.shape[0])
        attend = partial(causal, scale=scale, window=window, dropout=dropout)
        if query.is_cuda or min(self.lengths) == max(self.lengths):  # few large kernels
            return self._by_groups((query, key, value), attend, math.inf, math.inf)
        parts = zip(*(heads.split(self.lengths, dim=1) for heads in (query, key, value)), strict=True)
        alone = [attend(*(part.unsqueeze(0) for part in of_one)).squeeze(0) for of_one in parts]
        return torch.cat([seen.transpose(0, 1) for seen in alone])

    def _attend_plainly(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None, exact: Exactness
    ) -> Tensor:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        tokens = sum(self.lengths)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            shared = query.unflatten(1, (key.shape[1], -1))
            return CausalAttention.apply(shared, key, value, scale, window, exact).flatten(1, 2)

        seen = self._by_groups([heads[:, :tokens] for heads in (query, key, value)], attend, WASTE, TOGETHER)
        return with_more(seen, 3, query.shape[1] - tokens)

    def _by_groups(
        self, heads: Iterable[Tensor], attend: Callable[..., Tensor], waste: float, together: float
    ) -> Tensor:
        """(heads, tokens, head) each -> (tokens, heads, head). `attend` takes a group, (sequences, heads, longest,
        head) each."""
        if waste not in self._groups:
            self._groups[waste] = Groups(self.lengths, waste, together)
        groups = self._groups[waste]
        of_groups = [groups.fill(tensor.transpose(0, 1)) for tensor in heads]
        seen = [attend(*tensors).transpose(1, 2).flatten(0, 1) for tensors in zip(*of_groups, strict=True)]
        return groups.take_back(seen[0] if len(seen) == 1 else torch.cat(seen))


PLAIN = Exactness(keys=32)
"""For attention that need not be exact: in whole vectors softmax is faster."""
WASTE = 48**2
"""Pairs of tokens that a call of its own costs as much as, with plain products on a CPU: so many are computed for
nothing rather than that a sequence gets a call."""
TOGETHER = 2048
"""Tokens in one call, at most, on a CPU: more leave its caches."""


class NextTokens:
    """One token of each of the first rows of a cache; it sees its row and itself."""

    def __init__(self, cache: KVCache, positions: CachePositions, exact: Exactness | None = None):
        self.cache, self.positions, self.exact = cache, positions, exact

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
        """Dropout is ignored: only training has it."""
        rows, more = self.positions.rows, query.shape[1] - self.positions.rows
        query, key, value = (t[:, :rows].transpose(0, 1) for t in (query, key, value))
        keys, values = self.cache.append(layer, key[:, :, None], value[:, :, None], self.positions)
        # query heads that share a key head become its queries: no key is copied
        queries = query.reshape(rows, keys.shape[1], -1, query.shape[-1]).to(keys.dtype)
        mask = self.positions.mask(window, keys.dtype)
        if self.exact is None:
            seen = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
        else:
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            seen = plain_attention(queries * scale, keys, values, mask, self.exact)
        return with_more(seen.reshape(rows, -1, seen.shape[-1]).to(query.dtype), 3, more)


class PackedKernel:
    """torch's own attention over sequences that lie one behind the other: without padding, and no key is copied.

    What `varlen_attn` takes differs: 2.10 knows causal attention alone, 2.13 windows, scales and grouped heads.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function, self.takes = function, set(inspect.signature(function).parameters)

    def knows(self, window: int | None) -> bool:
        return window is None or "window_size" in self.takes

    def __call__(
        self,
        query: Tensor,  # (heads, tokens, head)
        key: Tensor,  # (key heads, tokens, head)
        value: Tensor,
        bounds: Tensor,  # int32 (sequences + 1)
        longest: int,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        """Causal attention of each sequence over its last `window` tokens, (tokens, heads, head)."""
        options: dict[str, Any] = {"is_causal": True}
        if "window_size" in self.takes:
            options = {"window_size": (-1 if window is None else window - 1, 0)}
        if scale is not None and "scale" in self.takes:
            options["scale"] = scale
        elif scale is not None:
            query = query * (scale * query.shape[-1] ** 0.5)
        if "enable_gqa" in self.takes:
            options["enable_gqa"] = key.shape[0] != query.shape[0]
        else:
            key, value = repeat_heads(key, query.shape[0]), repeat_heads(value, query.shape[0])
        query, key, value = (heads.transpose(0, 1) for heads in (query, key, value))
        return self.function(query, key, value, bounds, bounds, longest, longest, **options)


@cache
def packed_kernel() -> PackedKernel | None:
    """None where this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return PackedKernel(varlen_attn)


def takes_packed(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel is for such heads: in 16 bit on CUDA, of sizes and processors that flash attention has."""
    is_16_bit, head = query.dtype in (torch.bfloat16, torch.float16), query.shape[-1]
    fits = head == value.shape[-1] and head % 8 == 0 and head <= 256
    return query.is_cuda and is_16_bit and fits and has_flash_attention(query.device)


@cache
def has_flash_attention(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def repeat_heads(heads: Tensor, count: int) -> Tensor:
    """(key heads, tokens, head) -> (count, tokens, head), each repeated for the query heads that share it."""
    return heads if heads.shape[0] == count else heads.repeat_interleave(count // heads.shape[0], dim=0)


def causal(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None, dropout: float = 0.0
) -> Tensor:
    """Causal attention over (rows, heads, length, head); of the last `window` tokens only, if there is one."""
    length = query.shape[-2]
    if window is None or window >= length:
        return scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout, scale=scale)
    position = torch.arange(length, device=query.device)
    distance = position[:, None] - position
    seen = (distance >= 0) & (distance < window)
    return scaled_dot_product_attention(query, key, value, seen, dropout_p=dropout, scale=scale)


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, tokens, head)
    key: Tensor,  # (1, key heads, tokens, head)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    tokens: Tokens | None = None,
    **of_other_functions: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every attention layer; returns (1, tokens, heads, head)."""
    if tokens is None:
        raise NotHandedDown("packed attention needs the keyword `tokens`: call the model inside `packed` with it")
    if attention_mask is not None or any(of_other_functions.get(name) is not None for name in MORE_THAN_SOFTMAX):
        raise MoreThanSoftmax(f"{type(module).__name__} needs more than a scaled softmax")
    layer: Any = module.layer_idx
    return tokens.attend(layer, query[0], key[0], value[0], scaling, sliding_window, dropout)[None], None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


_PACKS: dict[tuple[type[nn.Module], str], bool] = {}  # (class, configuration) -> whether such models can be packed


def can_pack(model: nn.Module) -> bool:
    """Whether the family's attention goes through the interface in every layer and is a plain scaled softmax."""
    config: Any = getattr(model, "config", None)
    if config is None or not goes_through_interface(model):
        return False
    shape = type(model), config.to_json_string(use_diff=False)
    if shape not in _PACKS:
        _PACKS[shape] = hands_tokens_down(model)
    return _PACKS[shape]


class Asked:
    """Notes which layers ask, and with which windows; answers with numbers that mean nothing."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.windows = 0

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None, *_: Any
    ) -> Tensor:
        self.layers.append(layer)
        self.windows += window is not None
        return query.new_empty(query.shape[1], query.shape[0], value.shape[-1])


def hands_tokens_down(model: Any) -> bool:
    """Whether `tokens` reaches the attention function once in every layer, and a window with it where the layer has
    one. Tried on a model of the same shape without memory.

    Some families say that they go through the interface and drop keywords (Nemotron) or do not (DiffLlama), show
    windows in a mask alone (Phi-3.5-MoE), or add something of their own (sinks, a mask).
    """
    config = copy.deepcopy(model.config)
    asked = Asked()
    try:
        with torch.device("meta"), torch.no_grad(), no_init_weights():
            shape = type(model)(config).to(torch.bfloat16)  # grouped products have no shapes in fp32
            set_attention(shape.config, PACKED_ATTENTION)
            ids = torch.zeros(1, 2, dtype=torch.long)
            backbone_of(shape)(input_ids=ids, position_ids=ids, use_cache=False, tokens=asked)
    except (NotHandedDown, MoreThanSoftmax):
        return False
    except (NotImplementedError, RuntimeError):  # cannot be tried without memory (some mixtures of experts): what the
        return True  # family says must do
    layers = range(text_config(config).num_hidden_layers)
    return sorted(asked.layers) == list(layers) and asked.windows >= expected_windows(config)


def expected_windows(config: Any) -> int:
    """Layers that see the last tokens only, by the configuration."""
    if kinds := layer_kinds(config):
        return kinds.count("sliding_attention")
    return len(layer_values(config, "sliding_window"))


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Inside, the model's attention takes packed rows."""
    config: Any = model.config
    before = attention_of(config)
    set_attention(config, PACKED_ATTENTION)
    try:
        yield
    finally:
        set_attention(config, before)
