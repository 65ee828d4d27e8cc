"""Keys and values of the samples that are being decoded: one slot a sample, rows 0 .. n-1 in use."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from inference.generation.cpu import Exactness


class KVCache:
    """Bounded memory: `slots` samples of at most `capacity` tokens. A layer's part is made when it first writes.

    `dtype` is what keys and values are stored in; None takes the model's. On a CPU fused attention with one query is
    several times faster in fp32 than in bf16, so there fp32 is the better choice whatever the weights are. Plain
    products copy what does not lie in one piece: with `exact` a layer's part is as long as its longest row.
    """

    def __init__(self, slots: int, capacity: int, dtype: torch.dtype | None = None, exact: Exactness | None = None):
        self.slots, self.capacity, self.dtype, self.exact = slots, capacity, dtype, exact
        self.keys: dict[int, Tensor] = {}  # layer -> (slots, key heads, capacity or less, head)
        self.values: dict[int, Tensor] = {}

    @property
    def bytes(self) -> int:
        """Memory of what has been made so far."""
        return sum(t.numel() * t.element_size() for part in (self.keys, self.values) for t in part.values())

    def release(self) -> None:
        """Give the memory back; a layer's part is made again when it next writes."""
        self.keys.clear()
        self.values.clear()

    def fits(self, slots: int, capacity: int) -> bool:
        return slots <= self.slots and capacity <= self.capacity

    def _layer(self, layer: int, keys: Tensor, values: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """The tensors of a layer, for rows of up to `longest` tokens; `keys` and `values`, (..., heads, tokens, head),
        show their sizes."""
        room = self.capacity if self.exact is None else longest
        for part, new in ((self.keys, keys), (self.values, values)):
            if layer not in part:
                shape = (self.slots, new.shape[-3], room, new.shape[-1])
                part[layer] = torch.zeros(shape, dtype=self.dtype or new.dtype, device=new.device)
            elif part[layer].shape[2] != room:
                part[layer] = pad(part[layer], (0, 0, 0, room - part[layer].shape[2])).contiguous()
        return self.keys[layer], self.values[layer]

    def _held(self, layer: int, lengths: Sequence[int]) -> int:
        """Room that a layer's part needs for rows of these lengths beside those that are there."""
        if self.exact is None:
            return self.capacity
        return max(self.exact.seen(max(lengths)), self.keys[layer].shape[2] if layer in self.keys else 0)

    def write_prompts(self, layer: int, keys: Tensor, values: Tensor, rows: Sequence[int], lengths: Sequence[int]):
        """Store whole prompts, which lie one behind the other in `keys` and `values` (heads, tokens, head)."""
        cached_keys, cached_values = self._layer(layer, keys, values, self._held(layer, lengths))
        start = 0
        for row, length in zip(rows, lengths, strict=True):
            cached_keys[row, :, :length] = keys[:, start : start + length]
            cached_values[row, :, :length] = values[:, start : start + length]
            start += length

    def append(self, layer: int, keys: Tensor, values: Tensor, positions: "CachePositions") -> tuple[Tensor, Tensor]:
        """Store one token a row, (rows, heads, 1, head) each; returns the rows' keys and values up to the longest."""
        cached_keys, cached_values = self._layer(layer, keys, values, positions.longest)
        if positions.is_level:  # all rows are equally long: a slice is cheaper than an index
            end = positions.longest
            cached_keys[: positions.rows, :, end - 1 : end] = keys
            cached_values[: positions.rows, :, end - 1 : end] = values
        else:
            cached_keys[positions.index, :, positions.next] = keys[:, :, 0].to(cached_keys.dtype)
            cached_values[positions.index, :, positions.next] = values[:, :, 0].to(cached_values.dtype)
        rows, longest = positions.rows, positions.longest
        return cached_keys[:rows, :, :longest], cached_values[:rows, :, :longest]

    def copy(self, source: int, target: int, length: int) -> None:
        """Give row `target` the first `length` tokens of row `source`."""
        for part in (self.keys, self.values):
            for tensor in part.values():
                tensor[target, :, :length] = tensor[source, :, :length]

    def read(self, row: int, length: int) -> Tensor:
        """Keys and values of the first `length` tokens of a row, layer by layer in one row of numbers (n)."""
        parts = [part[layer][row, :, :length] for layer in sorted(self.keys) for part in (self.keys, self.values)]
        return torch.cat([tensor.flatten() for tensor in parts])

    def empty(self, length: int) -> Tensor:
        """Room for what `read` gives for `length` tokens; layers must have been made."""
        layers = [tensor for part in (self.keys, self.values) for tensor in part.values()]
        numbers = sum(tensor.shape[1] * length * tensor.shape[3] for tensor in layers)
        return torch.empty(numbers, dtype=layers[0].dtype, device=layers[0].device)

    def write(self, row: int, length: int, numbers: Tensor) -> None:
        """Store what `read` gave; layers must have been made."""
        start = 0
        for layer in sorted(self.keys):
            for tensor in self._layer(layer, self.keys[layer], self.values[layer], self._held(layer, [length])):
                target = tensor[row, :, :length]
                target.copy_(numbers[start : start + target.numel()].view_as(target))
                start += target.numel()


class CachePositions:
    """Where the next token of each row goes: row i is `next[i]` tokens long so far."""

    def __init__(self, next: Tensor, longest: int, is_level: bool):
        """`next` is int64 (rows). No row sees beyond its first `longest` tokens; `is_level`: all see just these."""
        self.next, self.longest, self.is_level = next, longest, is_level
        self.rows = len(next)
        self.index = torch.arange(self.rows, device=next.device)
        self._masks: dict[int | None, Tensor | None] = {}

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, exact: Exactness | None = None) -> "CachePositions":
        longest = max(lengths) + 1
        longest = longest if exact is None else exact.seen(longest)
        return cls(torch.tensor(lengths, device=device), longest, is_level=min(lengths) + 1 == longest)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """What to add to the scores of each row: 0 on its tokens (of the last `window`), -inf beyond; (rows, 1, 1,
        longest). None where every row sees everything."""
        if window not in self._masks:
            narrow = window is not None and window < self.longest
            if self.is_level and not narrow:
                self._masks[window] = None
            else:
                position = torch.arange(self.longest, device=self.next.device)
                seen = position <= self.next[:, None]
                if window is not None:
                    seen &= position > self.next[:, None] - window
                mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
                self._masks[window] = mask[:, None, None]
        return self._masks[window]
