"""Every causal family of the installed transformers: its default configuration, cut to two narrow layers."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 500  # less than the tiny tokenizer has: the embeddings have to grow
WINDOW = 4  # less than the rows have tokens
NARROW: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "decoder_layers", "encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_heads", "attention_heads", "num_kv_heads"), 4),
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "dim_head", "d_head", "v_head_dim", "qk_rope_head_dim"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **{"qk_nope_head_dim": 8, "qk_head_dim": 24, "index_head_dim": 32, "rotary_dim": 8},
    **dict.fromkeys(("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "dff", "dim_ff"), 96),
    **dict.fromkeys(("d_inner", "feed_forward_size", "ffn_hidden_size", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "local_attention"), WINDOW),
}
"""The most that a setting of this name may be, at any depth."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MORE: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {kind: ROPE for kind in ("full_attention", "sliding_attention")}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 32]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"]},
}
"""What a family needs besides: its defaults lack it, or it depends on what is narrow."""
UNBUILDABLE = {
    "gemma3n": "its images need the package timm",
    "gemma4_assistant": "its defaults contradict each other",
}
"""Families of which transformers makes no model here, and why."""
UNCUT = ("dots3_note", "blt")
"""Refused by name, before a model is built; their parts depend on each other."""


def narrowed(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that have to be smaller, also those of parts."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and "config" in name:
            found[name] = narrowed(value)
        elif isinstance(value, int) and not isinstance(value, bool) and value > NARROW.get(name, value):
            found[name] = NARROW[name]
        elif name.endswith("token_id") and isinstance(value, int) and value >= VOCABULARY:
            found[name] = 2
    if "kv_lora_rank" in values:  # latent attention has a key head for each query head
        found |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    return {name: value for name, value in found.items() if value != {}}


def narrow_config(kind: str, **more: Any) -> PreTrainedConfig:
    """The family's default configuration, cut to two narrow layers."""
    if kind in UNCUT:
        return AutoConfig.for_model(kind)
    values = narrowed(AutoConfig.for_model(kind).to_dict())
    for name, value in {**MORE.get(kind, {}), **more}.items():  # a part's settings join those that are there
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return AutoConfig.for_model(kind, **values)


def build(config: PreTrainedConfig, seed: int = 7) -> Any:
    """A model in fp32 whose random weights are large enough that tokens and positions matter."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model
