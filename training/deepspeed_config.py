"""The one place that builds a DeepSpeed configuration."""

from typing import Any

import torch

from training.merging import merge
from training.role_settings import OptimizerSettings


def deepspeed_config(settings: OptimizerSettings, dtype: torch.dtype, trained: bool = True) -> dict[str, Any]:
    """Configuration for one role; the user's own (`settings.deepspeed`) lies on top.

    Micro-batches are ours to count (they vary with length), so DeepSpeed sees one row and no accumulation: the
    engine marks the last micro-batch of an optimiser step itself.
    """
    stage = effective_zero_stage(settings, dtype)
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if settings.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if settings.offload == "optimizer+parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": settings.gradient_clipping,
        "steps_per_print": 10**9,
    }
    if dtype == torch.bfloat16 and not settings.master_weights:
        if stage > 0:  # at stage 0 the plain path, which asks for no format, does it (ZeroEngine converts the model)
            ours["bf16"] = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
            ours["data_types"] = {"grad_accum_dtype": "bf16"}
    elif dtype == torch.bfloat16:
        ours["bf16"] = {"enabled": True}
        if trained:
            ours["data_types"] = {"grad_accum_dtype": "fp32"}
    elif dtype == torch.float16:
        ours["fp16"] = {"enabled": True, "initial_scale_power": 16}
    return merge(ours, settings.deepspeed)


def effective_zero_stage(settings: OptimizerSettings, dtype: torch.dtype) -> int:
    """16 bits with fp32 master weights need stage 1: from there on DeepSpeed keeps sums of gradients in fp32, and a
    state that other numbers of ranks can read; with one rank the two stages are the same. fp16 always has masters."""
    has_masters = dtype == torch.float16 or (dtype == torch.bfloat16 and settings.master_weights)
    return max(settings.zero_stage, 1) if has_masters else settings.zero_stage
