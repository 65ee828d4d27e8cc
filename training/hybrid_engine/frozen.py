"""Models that only score: whole on every rank, or divided over the ranks by ZeRO 3."""

import torch
from torch import nn

from training.deepspeed_config import deepspeed_config
from training.distributed import Ranks
from training.hybrid_engine.deepspeed_setup import deepspeed
from training.hybrid_engine.dividing import divide
from training.role_settings import FrozenSettings


def freeze(model: nn.Module, settings: FrozenSettings, dtype: torch.dtype, ranks: Ranks) -> nn.Module:
    """A role that only scores: as it is on every rank's device, or divided over the ranks by ZeRO 3."""
    model.eval().requires_grad_(False)
    if settings.zero_stage == 0:
        return model.to(ranks.device)
    divide_to_score(model, dtype, ranks, settings)
    return gathering(model, dtype, ranks, settings)


DIVIDED = FrozenSettings(zero_stage=3)


def divide_to_score(model: nn.Module, dtype: torch.dtype, ranks: Ranks, settings: FrozenSettings = DIVIDED) -> None:
    """By ZeRO 3, in place."""
    with ranks.as_world():
        divide(model, deepspeed_config(settings.as_optimizer, dtype, trained=False), dtype, ranks)


def gathering(model: nn.Module, dtype: torch.dtype, ranks: Ranks, settings: FrozenSettings = DIVIDED) -> nn.Module:
    """`model`, which is divided, with a forward pass that gathers what it needs."""
    config = deepspeed_config(settings.as_optimizer, dtype, trained=False)
    with ranks.as_world():
        engine, *_ = deepspeed.initialize(model=model.eval(), config=config, dist_init_required=False)
    engine.eval()  # returns nothing, unlike torch's
    return engine
