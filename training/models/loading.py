"""Loading models of any supported family, with adapters, and writing them as plain Hugging Face directories."""

import re
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from inference.chat_format import ChatFormat
from inference.errors import UserError
from inference.families import require_supported_family
from inference.untrusted import is_unsafe_pickle, refuse_code, unsafe_pickle
from training.config import Dtype
from training.role_settings import LoRASettings
from training.run_directory import read_json

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LINEAR = (torch.nn.Linear, Conv1D)


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The number format to compute in; `auto` takes bf16 where the hardware multiplies it fast."""
    if dtype == "fp16" and device.type == "cpu":
        raise UserError("fp16 does not work on a CPU; use dtype=bf16 or dtype=fp32.")
    if dtype != "auto":
        return TORCH_DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def load_causal_lm(
    directory: Path, chat_format: ChatFormat, dtype: torch.dtype, dropout: float = 0.0, with_weights: bool = True
) -> PreTrainedModel:
    """A causal language model whose embeddings hold all of the format's tokens.

    `dropout` takes the place of the model's own; 0 switches it off. Without weights the parameters are uninitialised:
    another rank brings them.
    """
    model = _load(AutoModelForCausalLM, directory, dtype, dropout, with_weights)
    fit_vocabulary(model, chat_format)
    return model


def load_scorer(
    directory: Path,
    chat_format: ChatFormat,
    dtype: torch.dtype,
    layers: int = 0,
    dropout: float = 0.0,
    with_weights: bool = True,
) -> PreTrainedModel:
    """A model with a linear head of one output a token (`score`); a fresh head is drawn from N(0, 1 / (d + 1)).

    `layers` keeps only the first so many; 0 keeps all. `dropout` and `with_weights` as in `load_causal_lm`.
    The initialisation is that of "The N implementation details of RLHF with PPO" (detail 11).
    """
    fresh = not has_score_head(directory)
    require_scorer_family(directory)
    cut = {"num_hidden_layers": layers} if layers else {}
    model = _load(AutoModelForSequenceClassification, directory, dtype, dropout, with_weights, num_labels=1, **cut)
    if fresh:
        with torch.no_grad():
            head: Any = model.score
            head.weight.normal_(0.0, (head.in_features + 1) ** -0.5)
    fit_vocabulary(model, chat_format)
    return model


def require_scorer_family(directory: Path) -> None:
    """Raise UserError for a family that transformers cannot give a score head (CodeGen)."""
    try:
        kind = AutoConfig.from_pretrained(directory, local_files_only=True).model_type
    except (OSError, ValueError):
        return  # what is wrong with the directory, loading it says
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise UserError(
            f"Models of type '{kind}' cannot be reward models (transformers has no score head for them): choose "
            f"another one with --reward-model, or --set method=dpo, which needs none."
        )


def _load(
    loader: Any, directory: Path, dtype: torch.dtype, dropout: float, with_weights: bool, **values: int
) -> PreTrainedModel:
    refuse_code(directory)
    missing: list[str] = []
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, **values)
        require_supported_family(config)
        for name in ("dropout", "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout"):
            if hasattr(config, name):
                setattr(config, name, dropout)
        if with_weights:
            model, report = loader.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=False,
                weights_only=True,
            )
            missing = sorted(key for key in report["missing_keys"] if not key.startswith("score."))  # a fresh head
        else:
            model = _without_weights(loader, config, dtype)
    except Exception as error:  # safetensors, json and transformers each raise their own kinds
        raise unloadable(directory, error) from error
    if missing:  # transformers would go on with random weights
        raise UserError(
            f"The model in {directory} is not complete: {len(missing)} weights are missing, for example {missing[0]}; "
            f"{way_out(directory)}."
        )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return model


def _without_weights(loader: Any, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model with uninitialised parameters, which take no memory until somebody writes into them."""
    with init_empty_weights(include_buffers=False):
        model = loader.from_config(config, dtype=dtype)
    model.tie_weights()
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay one
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False):
            if old not in made:
                made[old] = nn.Parameter(torch.empty_like(old, device="cpu"), old.requires_grad)
            setattr(module, name, made[old])
    return model


def unloadable(directory: Path, error: Exception) -> UserError:
    """The sentence for what transformers raised while it loaded a model; a UserError stays what it is."""
    if isinstance(error, UserError):
        return error
    if is_unsafe_pickle(error):
        return UserError(unsafe_pickle(directory))
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
    return UserError(f"The model in {directory} cannot be loaded ({reason}); {way_out(directory)}.")


def way_out(directory: Path) -> str:
    """Of a damaged model: that of a finished step is written anew from the step's last checkpoint."""
    if (directory.parent / "result.json").is_file():
        return f"delete {directory} and give the command of its step again, which writes it anew"
    return "fetch it again, or give another one"


def has_score_head(directory: Path) -> bool:
    """Whether the model gives scores already, so that no fresh head is drawn for it. Raises UserError."""
    architectures = read_json(directory / "config.json", way_out(directory)).get("architectures") or []
    return any(name.endswith("ForSequenceClassification") for name in architectures)


def fit_vocabulary(model: PreTrainedModel, chat_format: ChatFormat) -> None:
    """Grow the embeddings if the format has more tokens; new rows are the mean of the old ones."""
    model.config.pad_token_id = chat_format.pad_id
    model.config.eos_token_id = chat_format.end_of_turn_id
    inputs: Any = model.get_input_embeddings()
    old = inputs.num_embeddings
    if chat_format.vocabulary_size <= old:
        return
    model.resize_token_embeddings(chat_format.vocabulary_size, mean_resizing=False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        if table is not None:
            weight: Any = table.weight
            weight.data[old:] = weight.data[:old].mean(0)


def require_same_tokens(actor: ChatFormat, scorer: ChatFormat, actor_name: str, scorer_name: str) -> None:
    """A reward model reads the actor's token ids, so both must mean the same by them. Raises UserError."""
    if actor.tokenizer.get_vocab() != scorer.tokenizer.get_vocab():
        raise UserError(
            f"The reward model {scorer_name} has another tokenizer than the actor {actor_name}; "
            f"choose a reward model of the same family with --reward-model."
        )


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
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"lora.targets={settings.targets} does not fit this model ({reason}).") from error


def require_lora_layers(model: torch.nn.Module, settings: LoRASettings, key: str = "lora.targets") -> None:
    """Raise UserError where a target names no layer of `model`: PEFT ignores one if another one is found.

    A list holds ends of names, a text is a regular expression over whole names, as in PEFT.
    """
    targets = settings.targets
    if targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules()]
    try:
        if isinstance(targets, str):
            missing = [targets] if not any(re.fullmatch(targets, name) for name in names) else []
        else:
            missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    except re.error as error:
        raise UserError(f"{key}={targets} is no regular expression ({error}); give a list of module names.") from None
    if missing or not targets:
        linear = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, LINEAR)}
        fitting = ", ".join(sorted(linear - {"lm_head", "embed_out", "score"}))
        raise UserError(
            f"{key}={targets} does not fit this model, which has no layer {' or '.join(missing) or 'without a name'}: "
            f"choose from {fitting}, or all-linear."
        )


def save_model(
    directory: Path,
    model: PreTrainedModel,
    chat_format: ChatFormat,
    trained: dict[str, Tensor],
    lora: LoRASettings,
    dtype: torch.dtype,
    extra_config: dict[str, float] | None = None,
    adapter_directory: Path | None = None,
) -> None:
    """Write a plain Hugging Face directory: `model` (as training started from it, fp32) with the `trained` weights.

    `trained` has the names that the model (with adapters, if `lora.rank`) gives its parameters, in fp32, which are
    merged here: in 16 bit most of an adapter would be rounded away. `extra_config` lands in config.json.
    """
    adapted = add_lora(model, lora) if lora.rank else None
    unexpected = model.load_state_dict(trained, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"trained weights without a place in the model: {unexpected[:3]}")
    if adapted is not None:
        if adapter_directory is not None:
            adapted.save_pretrained(adapter_directory)
        model = adapted.merge_and_unload()
    for key, value in (extra_config or {}).items():
        setattr(model.config, key, value)
    if model.can_generate():
        model.generation_config = GenerationConfig(
            bos_token_id=chat_format.tokenizer.bos_token_id,
            eos_token_id=chat_format.end_of_turn_id,
            pad_token_id=chat_format.pad_id,
        )
    cast(Any, model).to(dtype).save_pretrained(directory)
    chat_format.save(directory)
