"""Linear layers on a CPU with their weights in oneDNN's blocked order: what decoding spends its time in.

With few rows, as in a decode step, F.linear in fp32 is 1.5 to 4 times slower on the plain order, in bf16 about twice
(`python -m benchmarks.cpu_linear`). The order is made once for each set of weights, beside them: the training weights
stay as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ROWS = 32
"""Rows that the order is made for; others run on it too."""
MOST_BYTES = 4 * 2**30
"""Weights beyond this are left as they are: a second copy would cost more than it gives. A fixed bound, not what is
free now: a resumed run must compute as the first one did."""


class BlockedWeights:
    """The weights of a model's linear layers in blocked order, or nothing where that is not to be had (no CPU, fp16,
    a build without oneDNN) or too large."""

    def __init__(self, model: nn.Module):
        self.forwards: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
        if can_block(model):
            for module in model.modules():
                if type(module) is nn.Linear:
                    self.forwards.append((module, blocked_linear(module.weight, module.bias)))
                elif type(module) is Conv1D:  # GPT-2's linear layer: its weight is (inputs, outputs)
                    self.forwards.append((module, blocked_linear(module.weight.t().contiguous(), module.bias)))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the layers compute with the blocked weights. They know nothing of gradients."""
        for module, forward in self.forwards:
            module.forward = forward
        try:
            yield
        finally:
            for module, _ in self.forwards:
                del module.forward


def can_block(model: nn.Module) -> bool:
    weight = next(model.parameters())
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and sum(p.numel() * p.element_size() for p in model.parameters()) <= MOST_BYTES
    )


def blocked_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x -> x weight^T + bias for this weight, (outputs, inputs), as it is now."""
    operators: Any = torch.ops.mkldnn
    blocked = operators._reorder_linear_weight(weight.detach(), ROWS)
    linear = operators._linear_pointwise.default

    def forward(inputs: Tensor) -> Tensor:
        return linear(inputs, blocked, bias, "none", [], "")

    return forward
