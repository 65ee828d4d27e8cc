"""Loading models of any supported family, with adapters, and writing them as plain Hugging Face directories."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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

from inference.chat_format import ChatFormat
from inference.chat_template import same_rendering
from inference.errors import UserError
from inference.families import require_supported_family, set_dropout
from inference.model_files import require_usable
from inference.weights import SCORER, WrongWeights, quiet_transformers, read_weights, rewrite_config, some, unloadable
from training.config import Dtype
from training.hybrid_engine.layout import StageCut
from training.models.policy import add_lora, keep_layers
from training.pipelines.stage_model import held_by, read_stage
from training.private_surfaces import multiplies_bf16
from training.role_settings import LoRASettings
from training.run_directory import write_directory

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCORE_HEAD = ("score.weight",)
LANGUAGE_HEAD = re.compile(r"^(\w+\.)?(lm_head|embed_out)\.")


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Choose the number format to compute in; `auto` takes bf16 where the hardware multiplies it fast."""
    if dtype == "fp16" and device.type == "cpu":
        raise UserError("fp16 does not work on a CPU; use dtype=bf16 or dtype=fp32.")
    if dtype != "auto":
        return TORCH_DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if multiplies_bf16() else torch.float32


def load_causal_lm(
    directory: Path,
    chat_format: ChatFormat,
    dtype: torch.dtype,
    dropout: float = 0.0,
    with_weights: bool = True,
    cut: StageCut | None = None,
) -> PreTrainedModel:
    """Load a causal language model whose embeddings hold all of the format's tokens.

    `dropout` replaces the model's own; 0 switches it off. Without weights the parameters are uninitialised: another
    rank brings them. With a `cut` only its stage's are read, and those of other stages are on the meta device until
    `keep_stage` takes them out.
    """
    config = _read_config(directory)
    model, _ = _load(AutoModelForCausalLM, directory, config, dtype, dropout, with_weights, cut)
    require_tied(model, directory)
    fit_vocabulary(model, chat_format)
    return model


def require_causal_lm(directory: Path, name: str = "") -> None:
    """Raise UserError for what `load_causal_lm` refuses; no weights are read. `name` is what the user calls it."""
    config = _read_config(directory, name)
    model, _ = read_weights(AutoModelForCausalLM, directory, name, config=config, device_map="meta")
    if untied(model):  # their files have both, of which only the values tell
        model, _ = read_weights(AutoModelForCausalLM, directory, name, config=config)
    require_tied(model, directory, name)


def untied(model: PreTrainedModel) -> list[str]:
    """Name the weights that are others' by the configuration, and are not."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True).items()
    return [name for name, other in tied if model.get_parameter(name) is not model.get_parameter(other)]


def require_tied(model: PreTrainedModel, directory: Path, name: str = "") -> None:
    """Raise UserError where embeddings and head differ that should be one, as other tools and other ranks make them."""
    if apart := untied(model):
        raise UserError(
            f"The config.json of {name or directory} says that {some(apart)} and the embeddings are the same weights, "
            f'and its files hold two that differ: write "tie_word_embeddings": false into a copy of it.'
        )


def load_scorer(
    directory: Path,
    chat_format: ChatFormat,
    dtype: torch.dtype,
    layers: int = 0,
    dropout: float = 0.0,
    with_weights: bool = True,
    trained: bool = False,
    cut: StageCut | None = None,
) -> PreTrainedModel:
    """Load a model with a linear head of one output a token (`score`); a fresh head is drawn from N(0, 1 / (d + 1)).

    `layers` keeps only the first so many; 0 keeps all. `dropout`, `with_weights` and `cut` as in `load_causal_lm`. Of a
    `trained` one the head is in the files: a fresh one gives scores at random.
    The initialisation is that of "The N implementation details of RLHF with PPO" (detail 11).
    """
    config = scorer_config(directory, layers)
    with _heads_named(directory, trained):
        model, made_up = _load(
            AutoModelForSequenceClassification,
            directory,
            config,
            dtype,
            dropout,
            with_weights,
            cut,
            may_miss=() if trained else SCORE_HEAD,
            may_have=_beside_scorer(layers),
        )
    if made_up:
        with torch.no_grad():
            head: Any = model.score
            head.weight.normal_(0.0, (head.in_features + 1) ** -0.5)
    fit_vocabulary(model, chat_format)
    return model


def require_scorer(directory: Path, name: str = "", trained: bool = False, layers: int = 0) -> None:
    """Raise UserError for what `load_scorer` refuses; no weights are read. `name` is what the user calls it."""
    with _heads_named(directory, trained, name):
        read_weights(
            AutoModelForSequenceClassification,
            directory,
            name,
            may_miss=() if trained else SCORE_HEAD,
            may_have=_beside_scorer(layers),
            config=scorer_config(directory, layers, name),
            device_map="meta",
        )


def scorer_config(directory: Path, layers: int = 0, name: str = "") -> PreTrainedConfig:
    """Read a scorer's configuration, with the first so many layers (0: all). Raises UserError for no scorer."""
    config = _read_config(directory, name, num_labels=1)
    require_scorer_family(config)
    if layers:
        keep_layers(config, layers)
    return config


def require_scorer_family(config: PreTrainedConfig) -> None:
    """Raise UserError for a family that transformers gives no head that scores tokens (CodeGen, BERT)."""
    has_head = config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if has_head:
        try:
            with torch.device("meta"):
                model: Any = AutoModelForSequenceClassification.from_config(config)
        except Exception:
            return  # what is wrong with the configuration, loading it says
        has_head = isinstance(getattr(model, "score", None), torch.nn.Linear)
    if not has_head:
        raise UserError(
            f"Models of type '{config.model_type}' cannot be reward models (transformers has no score head for them): "
            f"choose another one with --reward-model, or --set method=dpo, which needs none."
        )


def _beside_scorer(layers: int) -> Callable[[str], bool]:
    """Tell which weights a scorer leaves in the files: a language model's head, and the layers from `layers` on."""

    def is_left(key: str) -> bool:
        number = re.search(r"\.(\d+)\.", key)
        return LANGUAGE_HEAD.search(key) is not None or (0 < layers <= int(number[1]) if number else False)

    return is_left


@contextmanager
def _heads_named(directory: Path, trained: bool, name: str = "") -> Iterator[None]:
    """Turn wrong weights of a score head into a sentence about it."""
    try:
        yield
    except WrongWeights as error:
        name = name or str(directory)
        heads = ((has, wanted) for key, has, wanted in error.mismatched if key in SCORE_HEAD)
        labels = next((has[0] for has, wanted in heads if has[1:] == wanted[1:]), 1)
        if labels != 1:
            raise UserError(
                f"{name} is a classifier of {labels} labels, and a reward model has one: choose a model with one "
                f"score, or begin step 2 with a language model (--reward-model)."
            ) from None
        if not trained or error.missing.isdisjoint(SCORE_HEAD):
            raise
        seen = f", but {some(error.unexpected)}" if error.unexpected else ""
        raise UserError(
            f"{name} is no trained reward model: its weights hold no score head ({SCORE_HEAD[0]}){seen}. With a head "
            f"drawn at random PPO would follow noise: train one with rlhf-chat reward, or give a reward model whose "
            f"head has that name."
        ) from None


def _read_config(directory: Path, name: str = "", **values: int) -> PreTrainedConfig:
    require_usable(directory, name)
    try:
        with quiet_transformers():  # of labels that num_labels replaces
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **values)
    except Exception as error:  # json and transformers each raise their own kinds
        raise unloadable(directory, error, name) from error
    require_supported_family(config)
    return config


def _load(
    loader: Any,
    directory: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    dropout: float,
    with_weights: bool,
    cut: StageCut | None,
    **allowed: Any,
) -> tuple[PreTrainedModel, set[str]]:
    """Load the model, and name those of the weights that it `may_miss` which were made up."""
    set_dropout(config, dropout)
    if with_weights and cut is not None and len(cut.layers) > 1:
        try:
            whole = structure(loader, config, dtype)
        except Exception as error:
            raise unloadable(directory, error) from error
        model, made_up = read_stage(whole, directory, cut, dtype=dtype, **allowed)
    elif with_weights:
        model, made_up = read_weights(loader, directory, config=config, dtype=dtype, **allowed)
    else:
        try:
            model, made_up = _without_weights(loader, config, dtype, cut), set()
        except Exception as error:
            raise unloadable(directory, error) from error
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    freeze_other_parts(model)
    return model, made_up


def freeze_other_parts(model: PreTrainedModel) -> None:
    """Freeze what text does not pass through (a vision tower), which weight decay alone would change."""
    if model.config.get_text_config() is model.config:
        return
    score = getattr(model, "score", None)
    read = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings(), score)
    trained = {parameter for part in read if isinstance(part, nn.Module) for parameter in part.parameters()}
    for parameter in set(model.parameters()) - trained:
        parameter.requires_grad_(False)


def structure(loader: Any, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model with its buffers, and with parameters on the meta device."""
    with init_empty_weights(include_buffers=False):
        model = loader.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def _without_weights(
    loader: Any, config: PreTrainedConfig, dtype: torch.dtype, cut: StageCut | None
) -> PreTrainedModel:
    """Build the model with uninitialised parameters, which take no memory until somebody writes into them."""
    model = structure(loader, config, dtype)
    held = set(model.parameters()) if cut is None else held_by(model, cut)
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay one
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False):
            if old in held and old not in made:
                made[old] = nn.Parameter(torch.empty_like(old, device="cpu"), old.requires_grad)
            setattr(module, name, made.get(old, old))
    return model


def fit_vocabulary(model: PreTrainedModel, chat_format: ChatFormat) -> None:
    """Grow the embeddings if the format has more tokens; new rows are the mean of the old ones."""
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = chat_format.pad_id
        config.eos_token_id = chat_format.end_of_turn_id
    inputs: Any = model.get_input_embeddings()
    old = inputs.num_embeddings
    if chat_format.vocabulary_size <= old:
        return
    with torch.random.fork_rng(devices=[]):  # it draws rows, which are written over; a stage may have no table
        model.resize_token_embeddings(chat_format.vocabulary_size, mean_resizing=False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        if table is not None:
            weight: Any = table.weight
            weight.data[old:] = weight.data[:old].mean(0)


def require_same_tokens(actor: ChatFormat, scorer: ChatFormat, actor_name: str, scorer_name: str) -> None:
    """Raise UserError where reward model and actor mean other texts by the same token ids, which the former reads."""
    if actor.tokenizer.get_vocab() != scorer.tokenizer.get_vocab():
        raise UserError(
            f"The reward model {scorer_name} has another tokenizer than the actor {actor_name}; "
            f"choose a reward model of the same family with --reward-model."
        )


def require_same_format(actor: ChatFormat, scorer: ChatFormat, actor_name: str, scorer_name: str) -> None:
    """Raise UserError where a finished reward model has another template than the actor whose texts it scores."""
    require_same_tokens(actor, scorer, actor_name, scorer_name)
    if not same_rendering(actor, scorer):
        raise UserError(
            f"The reward model {scorer_name} has another chat template than the actor {actor_name}, and would score "
            f"texts that it was not trained to read: train one from this data with rlhf-chat reward, or, if it was "
            f"trained with the actor's template, put that into its directory (chat_template.jinja)."
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

    `trained` has the names that the model (with adapters, if `lora.rank`) gives its parameters, in fp32, flat or in
    their shapes, which are merged here: in 16 bit most of an adapter would be rounded away. `extra_config` lands in
    config.json.
    """
    adapted = add_lora(model, lora) if lora.rank else None
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    shaped = {name: weight.view(shapes.get(name, weight.shape)) for name, weight in trained.items()}
    unexpected = model.load_state_dict(shaped, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"trained weights that the model does not have: {unexpected[:3]}")
    if adapted is not None:
        if adapter_directory is not None:
            lies_on = adapted.peft_config["default"]
            lies_on.base_model_name_or_path = os.path.abspath(lies_on.base_model_name_or_path)
            write = partial(adapted.save_pretrained, save_embedding_layers=False)  # added tokens have frozen rows
            write_directory(adapter_directory, write)
        model = adapted.merge_and_unload()
    for key, value in (extra_config or {}).items():
        setattr(model.config, key, value)
    if model.can_generate():
        model.generation_config = GenerationConfig(
            bos_token_id=chat_format.tokenizer.bos_token_id,
            eos_token_id=list(chat_format.end_ids) if len(chat_format.end_ids) > 1 else chat_format.end_of_turn_id,
            pad_token_id=chat_format.pad_id,
        )
    cast(Any, model).to(dtype).save_pretrained(directory)
    rewrite_config(directory, **({} if model.can_generate() else SCORER))
    chat_format.save(directory, scored=not model.can_generate())
