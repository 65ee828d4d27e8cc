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

from inference.private_surfaces import blocks_bf16, in_blocked_order, linear_and_sum_on_blocked, linear_on_blocked

ROWS = 32
"""Rows that the order is made for; others run on it too."""
Forward = Callable[[Tensor], Tensor]
MOST_BYTES = 4 * 2**30
"""Weights beyond this are left as they are: a second copy would cost more than it gives. A fixed bound, not what is
free now: a resumed run must compute as the first one did."""


class BlockedWeights:
    """The weights of a model's linear layers in blocked order, or nothing where that cannot be had or is too large.

    A plain LoRA layer becomes three products, in fp32 the last of which adds itself to the first: with few rows PEFT's
    own steps take longer than the base layer. In bf16 they round as PEFT's do.
    """

    def __init__(self, model: nn.Module):
        self.forwards: dict[nn.Module, Forward] = {}
        if not can_block(model):
            return
        parts_of_adapted: set[nn.Module] = set()
        for module in model.modules():
            if module in parts_of_adapted:
                continue
            if is_plain_lora(module):
                layer: Any = module
                self.forwards[layer] = adapted_linear(layer)
                parts_of_adapted |= {layer.base_layer, *layer.lora_A.modules(), *layer.lora_B.modules()}
            elif type(module) in (nn.Linear, Conv1D):
                self.forwards[module] = blocked_linear(module)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the layers compute with the blocked weights. They know nothing of gradients."""
        for module, forward in self.forwards.items():
            module.forward = forward
        try:
            yield
        finally:
            for module in self.forwards:
                del module.forward


def can_block(model: nn.Module) -> bool:
    weight = next(model.parameters())
    return (
        weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and blocks_bf16()))
        and sum(p.numel() * p.element_size() for p in model.parameters()) <= MOST_BYTES
    )


def is_plain_lora(layer: Any) -> bool:
    """A LoRA layer of PEFT over a linear one, with one adapter in the same format and nothing else to it."""
    if not hasattr(layer, "lora_A") or type(getattr(layer, "base_layer", None)) not in (nn.Linear, Conv1D):
        return False
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or layer.merged or layer.lora_variant or any(layer.lora_bias.values()):
        return False
    return layer.lora_A[names[0]].weight.dtype == layer.base_layer.weight.dtype


def blocked_linear(layer: Any) -> Forward:
    """What a linear layer or a Conv1D (whose weight is (inputs, outputs)) computes with its weights as they are now."""
    weight, bias = layer.weight, layer.bias
    return blocked_product(weight.t().contiguous() if type(layer) is Conv1D else weight, bias)


def blocked_product(weight: Tensor, bias: Tensor | None) -> Forward:
    """x -> x weight^T + bias for this weight, (outputs, inputs), as it is now."""
    blocked, product = in_blocked_order(weight.detach(), ROWS), linear_on_blocked()

    def forward(inputs: Tensor) -> Tensor:
        return product(inputs, blocked, bias, "none", [], "")

    return forward


def adapted_linear(layer: Any) -> Forward:
    """x -> base(x) + scale B A x for a plain LoRA layer as it is now; base(x) while it is disabled."""
    (name,) = (name for name in layer.active_adapters if name in layer.lora_A)
    base, down = blocked_linear(layer.base_layer), blocked_linear(layer.lora_A[name])
    scaling = layer.scaling[name]
    if layer.lora_B[name].weight.dtype == torch.bfloat16:
        back = blocked_linear(layer.lora_B[name])

        def rounded(inputs: Tensor) -> Tensor:
            outputs = base(inputs)
            return outputs if layer.disable_adapters else outputs + back(down(inputs)) * scaling

        return rounded
    up = in_blocked_order(layer.lora_B[name].weight.detach() * scaling, ROWS)
    plus_product = linear_and_sum_on_blocked()

    def forward(inputs: Tensor) -> Tensor:
        outputs = base(inputs)
        return outputs if layer.disable_adapters else plus_product(down(inputs), outputs, up, None, "add")

    return forward
