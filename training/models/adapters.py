"""LoRA adapters: which layers get one, so that the model with it merged is the one that was trained."""

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from inference.errors import UserError
from inference.families import is_router, takes_adapter
from training.role_settings import LoRASettings


def add_lora(model: PreTrainedModel, settings: LoRASettings) -> Any:
    """Put adapters into `model` (in place) and freeze the rest; a score head stays trainable. Returns the PeftModel."""
    from peft import LoraConfig, TaskType, get_peft_model

    require_lora_layers(model, settings)
    scorer = hasattr(model, "score")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=settings.targets,
        task_type=TaskType.SEQ_CLS if scorer else TaskType.CAUSAL_LM,
        modules_to_save=["score"] if scorer else None,
        exclude_modules=[name for name, layer in model.named_modules() if is_router(layer)] or None,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"lora.targets={settings.targets} does not fit this model ({reason}).") from error


def require_lora_layers(model: torch.nn.Module, settings: LoRASettings, key: str = "lora.targets") -> None:
    """Raise UserError where a target names no layer of `model`, or one whose adapter would not be what is saved.

    PEFT ignores a target if another one is found. A list holds ends of names, a text is a regular expression over whole
    names, as in PEFT.
    """
    targets = settings.targets
    if targets == "all-linear":
        return
    listed = [targets] if isinstance(targets, str) else targets
    layers = {name: layer for name, layer in model.named_modules() if not is_router(layer)}
    try:
        found = {target: [name for name in layers if is_target(name, target, targets)] for target in listed}
    except re.error as error:
        raise UserError(f"{key}={targets} is no regular expression ({error}); give a list of module names.") from None
    missing = [target for target, names in found.items() if not names]
    if missing or not targets:
        linear = {name.rpartition(".")[2] for name, layer in layers.items() if takes_adapter(layer)}
        fitting = ", ".join(sorted(linear - {"lm_head", "embed_out", "score"}))
        raise UserError(
            f"{key}={targets} does not fit this model, which has no layer {' or '.join(missing) or 'without a name'}: "
            f"choose from {fitting}, or all-linear."
        )
    for name in sorted({name for names in found.values() for name in names}):
        if reason := no_adapter(layers[name], name, model):
            raise UserError(f"{key}={targets} names {name}, {reason}: leave it out, or take all-linear.")


def is_target(name: str, target: str, targets: str | list[str]) -> bool:
    """Whether one of LoRA's targets names this module."""
    if isinstance(targets, str):
        return re.fullmatch(target, name) is not None
    return f".{name}".endswith(f".{target}")


def no_adapter(layer: nn.Module, name: str, model: nn.Module) -> str:
    """Why no adapter fits a layer so that merging it gives what was trained; empty where one does."""
    if name == "score":
        return "the head of scores, all of whose weights are trained anyway"
    if isinstance(layer, nn.Embedding) and type(layer) is not nn.Embedding:
        return "an embedding that its family computes in a way of its own"
    weight = getattr(layer, "weight", None)
    others = [
        (other, getattr(module, "weight", None)) for other, module in model.named_modules() if module is not layer
    ]
    shared = next((other for other, its in others if its is not None and its is weight), "")
    return f"whose weights are those of {shared} too, so that merging would change both" if shared else ""
