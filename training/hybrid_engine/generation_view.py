"""The weights of a training engine as a plain module that can generate.

Under ZeRO 0-2 every rank holds whole weights: the view is the module itself, no copy. Under ZeRO 3 the view is a
second, whole module into which the weights are gathered parameter by parameter.
"""

import copy

import torch
from torch import nn

from training.hybrid_engine.deepspeed_setup import deepspeed
from training.hybrid_engine.zero_engine import ZeroEngine


class GenerationView:
    def __init__(self, engine: ZeroEngine):
        self.engine = engine
        self.is_partitioned = engine.engine.zero_optimization_stage() == 3
        self._whole: nn.Module | None = None

    def refresh(self) -> nn.Module:
        """The language model with the engine's present weights. All ranks call it."""
        source = self.engine.language_model
        if not self.is_partitioned:
            return source
        if self._whole is None:
            self._whole = empty_copy(source)
        with torch.no_grad():
            for ours, theirs in zip(self._whole.parameters(), source.parameters(), strict=True):
                with deepspeed.zero.GatheredParameters([theirs]):
                    ours.copy_(theirs)
        return self._whole


def empty_copy(partitioned: nn.Module) -> nn.Module:
    """A module of the same structure with whole, uninitialised parameters and no ZeRO hooks."""
    memo: dict[int, object] = {}
    for parameter in partitioned.parameters():
        whole = torch.empty(
            parameter.ds_shape,  # type: ignore[attr-defined]
            dtype=parameter.dtype,
            device=parameter.device,
        )
        memo[id(parameter)] = nn.Parameter(whole, requires_grad=False)
    hooks = {}
    for module in partitioned.modules():  # hooks hold the engine: not to be copied
        hooks[module] = (module._forward_hooks, module._forward_pre_hooks)
        module._forward_hooks, module._forward_pre_hooks = type(hooks[module][0])(), type(hooks[module][1])()
    try:
        whole_module = copy.deepcopy(partitioned, memo)
    finally:
        for module, (after, before) in hooks.items():
            module._forward_hooks, module._forward_pre_hooks = after, before
    return whole_module.eval()
