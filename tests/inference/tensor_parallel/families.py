"""Tiny random models of every supported family: 8 heads, vocabulary 101, which no degree divides."""

from typing import Any

import torch

SMALL: dict[str, Any] = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8}
GATED = {**SMALL, "intermediate_size": 48, "head_dim": 8, "pad_token_id": 0, "max_position_embeddings": 64}
OPT = {
    **SMALL,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "pad_token_id": 1,
}
OLD = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
GPT2 = {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 8, "n_positions": 64, **OLD}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", OPT),
    "opt untied": ("opt", {**OPT, "tie_word_embeddings": False}),
    "opt post-norm, projections": ("opt", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "gpt2": ("gpt2", GPT2),
    "gpt2 untied": ("gpt2", {**GPT2, "tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", {**SMALL, "intermediate_size": 48, "max_position_embeddings": 64, **OLD}),
    "bloom": ("bloom", {"vocab_size": 101, "hidden_size": 32, "n_layer": 2, "n_head": 8, **OLD}),
    "llama": ("llama", {**GATED, "num_key_value_heads": 4}),
    "llama tied, 2 key heads": ("llama", {**GATED, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama 3 key heads of 12": (
        "llama",
        {**GATED, "hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 3},
    ),
    "qwen2": ("qwen2", {**GATED, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**GATED, "num_key_value_heads": 2}),
    "mistral": ("mistral", {**GATED, "num_key_value_heads": 2, "sliding_window": 5}),
    "gpt_neo": (
        "gpt_neo",
        {
            "vocab_size": 101,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 8,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
            "max_position_embeddings": 64,
            **OLD,
        },
    ),
    "gptj": ("gptj", {**GPT2, "n_embd": 64, "rotary_dim": 4, "tie_word_embeddings": False}),
    "phi3, attention whole": ("phi3", {**GATED, "num_key_value_heads": 2, **OLD}),
    "olmo2, attention whole": ("olmo2", {**GATED, "num_key_value_heads": 2}),
    "gemma, scaled embeddings": ("gemma", {**GATED, "num_key_value_heads": 1}),
}


def build(family: str, scorer: bool = False, layers: int = 0) -> Any:
    """The same random model on every rank; biases, norms and heads are random too. `layers` of 0 leave it its own."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    model_type, values = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **values, **({"num_labels": 1} if scorer else {}))
    if layers:
        config.num_hidden_layers = layers
    torch.manual_seed(0)
    model = (AutoModelForSequenceClassification if scorer else AutoModelForCausalLM).from_config(config)
    randomise(model)
    return model.float().eval()


def randomise(model: torch.nn.Module, seed: int = 1) -> None:
    """Give every parameter random values, also those that start at 0 or 1 (biases, norms, LoRA's B)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.ndim > 1 else 0.1)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(values + (1.0 if is_norm else 0.0))
