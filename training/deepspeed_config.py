"""The one place that builds a DeepSpeed configuration."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from inference.errors import UserError
from training.config import RunConfig
from training.merging import merge
from training.models.loading import TORCH_DTYPES
from training.role_settings import OptimizerSettings


def deepspeed_config(settings: OptimizerSettings, dtype: torch.dtype, trained: bool = True) -> dict[str, Any]:
    """Build the configuration of one role; the user's own (`settings.deepspeed`) lies on top.

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
    """Raise stage 0 to 1 for 16 bits with fp32 master weights: from there on DeepSpeed keeps sums of gradients in fp32,
    and a state that other numbers of ranks can read; with one rank the two stages are the same. fp16 always has
    masters."""
    has_masters = dtype == torch.float16 or (dtype == torch.bfloat16 and settings.master_weights)
    return max(settings.zero_stage, 1) if has_masters else settings.zero_stage


SETTING_OF = {
    "train_batch_size": "batch_size, or in step 3 prompts_per_iteration and mini_batches",
    "train_micro_batch_size_per_gpu": "micro_batch_tokens",
    "gradient_accumulation_steps": "batch_size and micro_batch_tokens",
    "gradient_clipping": "gradient_clipping",
    "optimizer": "learning_rate, betas, epsilon and weight_decay of AdamW",
    "scheduler": "schedule and warmup",
    "activation_checkpointing": "gradient_checkpointing",
    "data_types": "master_weights",
    "amp": "dtype",
    "torch_autocast": "dtype",
    "fp16.enabled": "dtype",
    "bf16.enabled": "dtype",
    "bf16.bf16_master_weights_and_grads": "master_weights",
    "bf16.bf16_optimizer_states": "master_weights",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.cpu_offload": "offload",
    "zero_optimization.cpu_offload_param": "offload",
    "zero_optimization.cpu_offload_use_pin_memory": "offload",
    "tensorboard": "logging.tensorboard",
    "wandb": "logging.wandb",
}
"""Key -> the setting, or settings, that say it."""
VALUES = (
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "steps_per_print",
    "disable_python_gc",
)
"""Keys with one value that act on how we use DeepSpeed."""
GROUPS: dict[str, tuple[str, ...]] = {
    "zero_optimization": (),
    "fp16": (),
    "bf16": (),
    "flops_profiler": (
        "enabled",
        "recompute_fwd_factor",
        "profile_step",
        "module_depth",
        "top_modules",
        "detailed",
        "output_file",
    ),
    "comms_logger": ("enabled", "prof_all", "prof_ops", "verbose", "debug"),
    "csv_monitor": ("enabled", "output_path", "job_name"),
    "aio": ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"),
}
"""Groups with their keys; those without have a model of DeepSpeed's own."""


def require_overlays(config: RunConfig, dtype: torch.dtype) -> None:
    """Raise UserError for the first key that would not do what it says."""
    planned = config.model_copy(update={"rlhf": config.rlhf.as_planned})
    for name, settings in planned.trained_roles.items():
        if settings.deepspeed:
            require_overlay(f"{name}.deepspeed", settings, dtype)


def require_overlay(name: str, settings: OptimizerSettings, dtype: torch.dtype) -> None:
    for key, value in flat(settings.deepspeed):
        if said := setting_that_says(key):
            raise UserError(f"{name}: '{key}' is not for DeepSpeed to say: the setting is {said}.")
        group = key.partition(".")[0]
        if group not in (*VALUES, *GROUPS):
            raise UserError(f"{name}: DeepSpeed ignores '{key}' here{nearest(key, (*VALUES, *GROUPS, *SETTING_OF))}")
        if group in GROUPS and group == key and not isinstance(value, Mapping):
            raise UserError(f"{name}: '{key}' is a group of keys (got {value!r}).")
        if GROUPS.get(group) and key != group and (inner := key.removeprefix(f"{group}.")) not in GROUPS[group]:
            raise UserError(f"{name}: DeepSpeed ignores '{key}'{nearest(inner, GROUPS[group])}")
    require_used(name, settings, dtype)
    require_known(name, settings, dtype)


def setting_that_says(key: str) -> str | None:
    parts = key.split(".")
    return next((SETTING_OF[head] for i in range(len(parts)) if (head := ".".join(parts[: i + 1])) in SETTING_OF), None)


def require_used(name: str, settings: OptimizerSettings, dtype: torch.dtype) -> None:
    """Raise UserError for groups that DeepSpeed reads only at another number format or ZeRO stage."""
    overlay, stage = settings.deepspeed, effective_zero_stage(settings, dtype)
    for group in {"fp16", "bf16"} & overlay.keys():
        if dtype != TORCH_DTYPES[group]:
            computes = next(name for name, value in TORCH_DTYPES.items() if value == dtype)
            raise UserError(f"{name}: DeepSpeed ignores '{group}', for the run computes in {computes} (dtype).")
    zero = overlay.get("zero_optimization", {})
    if zero and stage == 0:
        raise UserError(f"{name}: DeepSpeed ignores 'zero_optimization' at zero_stage=0; set zero_stage to 1, 2 or 3.")
    if zero.get("round_robin_gradients"):
        raise UserError(
            f"{name}: with 'zero_optimization.round_robin_gradients' DeepSpeed takes one weight for another where it "
            f"is asked for them; leave it out."
        )
    for key, value in zero.items():
        if key.startswith("stage3_") and stage < 3:
            raise UserError(f"{name}: DeepSpeed ignores 'zero_optimization.{key}' below zero_stage=3.")
        is_nvme = isinstance(value, Mapping) and value.get("device", "nvme") == "nvme"
        if key.startswith("offload_") and (settings.offload == "none" or not is_nvme):
            raise UserError(f"{name}: 'zero_optimization.{key}' is not for DeepSpeed to say: the setting is offload.")


def require_known(name: str, settings: OptimizerSettings, dtype: torch.dtype) -> None:
    """Raise UserError for what DeepSpeed's own models of its groups do not know or take."""
    if not {"zero_optimization", "fp16", "bf16"} & settings.deepspeed.keys():
        return  # DeepSpeed takes seconds to import
    from training.hybrid_engine.deepspeed_setup import deepspeed

    models: dict[str, type[BaseModel]] = {
        "zero_optimization": deepspeed.runtime.zero.config.DeepSpeedZeroConfig,
        "fp16": deepspeed.runtime.precision_config.DeepSpeedFP16Config,
        "bf16": deepspeed.runtime.precision_config.DeepSpeedBF16Config,
    }
    whole = deepspeed_config(settings, dtype)
    for group in models.keys() & settings.deepspeed.keys():
        try:
            models[group](**whole[group])
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join([group, *(str(part) for part in first["loc"])])
            if first["type"] != "extra_forbidden":
                raise UserError(f"{name}: DeepSpeed does not take '{key}' ({first['msg']}).") from None
            fields = [field.alias or field_name for field_name, field in models[group].model_fields.items()]
            raise UserError(
                f"{name}: DeepSpeed does not know '{key}'{nearest(str(first['loc'][-1]), fields)}"
            ) from None


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield dotted keys and values, groups before what is in them."""
    for key, value in values.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")


def nearest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.7)
    return f"; did you mean '{near[0]}'?" if near else ": leave it out."
