"""A LoRA layer for a CPU: there PEFT's steps over each token take as long as the products of the adapter."""

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from inference.generation.cpu import is_plain_lora
from inference.private_surfaces import is_divided


class AdaptedLinear(lora.Linear):
    """x -> base(x) + B s A x, where the last product adds itself to the first, and so in the backward pass."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not runs_as_products(self, x):
            return super().forward(x, *args, **kwargs)
        (name,) = (name for name in self.active_adapters if name in self.lora_A)
        base, down, up, scaling = self.base_layer, self.lora_A[name], self.lora_B[name], self.scaling[name]
        if any(is_divided(parameter) or parameter.requires_grad for parameter in base.parameters()):
            return up(down(x), base(x), scaling)  # as modules, so that ZeRO 3 puts their weights together
        matrix = base.weight.t() if type(base) is Conv1D else base.weight
        rows = AdaptedProduct.apply(x.flatten(0, -2), matrix, base.bias, down.weight, up.weight, scaling)
        return rows.unflatten(0, x.shape[:-1])


class AddedLinear(nn.Linear):
    """B of an adapter, which adds itself to the outputs of the base."""

    def forward(self, x: Tensor, outputs: Tensor | None = None, scaling: float = 1.0) -> Tensor:
        if outputs is None:
            return super().forward(x)
        rows = torch.addmm(outputs.flatten(0, -2), x.flatten(0, -2), (self.weight * scaling).t())
        return rows.view_as(outputs)


def use_products(model: nn.Module) -> None:
    """Let the LoRA layers of `model` compute so, where they can."""
    for module in model.modules():
        if type(module) is lora.Linear:
            module.__class__ = AdaptedLinear
            for up in module.lora_B.values():
                up.__class__ = AddedLinear


def runs_as_products(layer: Any, x: Tensor) -> bool:
    """Whether the layer is on a CPU, with all its weights in the dtype of x, and has nothing but A, B and its base."""
    if x.device.type != "cpu" or layer.disable_adapters or not is_plain_lora(layer):
        return False
    drops = layer.training and any(isinstance(module, nn.Dropout) for module in layer.lora_dropout.values())
    return layer.base_layer.weight.dtype == x.dtype and not drops


class AdaptedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        """x (n, inputs), weight (outputs, inputs), down (rank, inputs), up (outputs, rank) -> (n, outputs)."""
        reduced, scaled = linear(x, down), up * scaling
        ctx.save_for_backward(x, weight, down, scaled, reduced)
        ctx.scaling = scaling
        return linear(x, weight, bias).addmm_(reduced, scaled.t())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, scaled, reduced = ctx.saved_tensors
        of_reduced = gradient @ scaled
        of_x = (gradient @ weight).addmm_(of_reduced, down) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_reduced.t() @ x, (gradient.t() @ reduced).mul_(ctx.scaling), None
