"""Which layers of which family are cut, and how.

Most families of transformers bring a plan (`base_model_tp_plan` in their configuration); the table holds the others.
What neither names (norms, position embeddings, projections around the decoder, score heads) is whole on every rank.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn

from inference.errors import UserError
from inference.families import backbone_of, layer_values, text_config

Kind = Literal["column", "key_value", "qkv", "row"]
"""column: each rank computes a run of the outputs, heads or neurons. key_value: the outputs of the key heads that the
rank's query heads use. qkv: column in each of three blocks, query, key, value. row: each rank takes a run of the inputs
and computes a partial sum."""

TABLE: dict[str, dict[str, Kind]] = {
    "opt": {
        "decoder.layers.*.self_attn.[qkv]_proj": "column",
        "decoder.layers.*.self_attn.out_proj": "row",
        "decoder.layers.*.fc1": "column",
        "decoder.layers.*.fc2": "row",
    },
    "gpt2": {
        "h.*.attn.c_attn": "qkv",
        "h.*.attn.c_proj": "row",
        "h.*.mlp.c_fc": "column",
        "h.*.mlp.c_proj": "row",
    },
    "gpt_neo": {
        "h.*.attn.attention.[qkv]_proj": "column",
        "h.*.attn.attention.out_proj": "row",
        "h.*.mlp.c_fc": "column",
        "h.*.mlp.c_proj": "row",
    },
    "gptj": {
        "h.*.attn.[qkv]_proj": "column",
        "h.*.attn.out_proj": "row",
        "h.*.mlp.fc_in": "column",
        "h.*.mlp.fc_out": "row",
    },
    "bloom": {  # query, key and value of a head lie side by side, so a run of the outputs is a run of heads
        "h.*.self_attention.query_key_value": "column",
        "h.*.self_attention.dense": "row",
        "h.*.mlp.dense_h_to_4h": "column",
        "h.*.mlp.dense_4h_to_h": "row",
    },
}
WHOLE = {"replicated_with_grad_allreduce", "colwise_gather_output", "rowwise_split_input"}
"""Words of transformers' plans for layers whose inputs and outputs are whole; we keep their weights whole too."""


@dataclass(frozen=True)
class Heads:
    """Attention heads of the whole model; `size` is a head's width."""

    query: int
    key_value: int
    size: int

    @classmethod
    def of(cls, config: Any) -> "Heads":
        query = one_for_all_layers(config, "num_attention_heads")
        size = one_for_all_layers(config, "head_dim") or text_config(config).hidden_size // query
        return cls(query, one_for_all_layers(config, "num_key_value_heads") or query, size)

    def local_keys(self, rank: int, size: int) -> list[int]:
        """The key/value heads that a rank has, one for each equally large group of its query heads."""
        mine = range(rank * self.query // size, (rank + 1) * self.query // size)
        used = [head // (self.query // self.key_value) for head in mine]
        if self.key_value % size == 0 or size % self.key_value == 0:
            return sorted(set(used))
        return used  # groups would be unequal: each query head gets its own copy


def one_for_all_layers(config: Any, *names: str) -> int:
    """The first of these settings that there is; 0 without any. Raises UserError where layers differ in it."""
    values = set(layer_values(config, *names))
    if len(values) > 1:
        raise no_plan(config, f"its layers differ in {names[0]}")
    return next(iter(values), 0)


def check_divides(config: Any, size: int) -> None:
    """Raise UserError if a model of this configuration cannot be cut into `size` parts."""
    if size == 1:
        return
    heads, width = Heads.of(config).query, one_for_all_layers(config, "intermediate_size", "ffn_dim", "n_inner")
    width = width or 4 * text_config(config).hidden_size
    if heads % size or width % size:
        common = math.gcd(heads, width)
        fitting = ", ".join(str(degree) for degree in range(1, common + 1) if common % degree == 0)
        raise UserError(
            f"A model with {heads} attention heads and a feed-forward width of {width} cannot be cut into {size} "
            f"tensor-parallel parts; degrees that fit it: {fitting}."
        )


def cut_layers(model: nn.Module) -> dict[str, Kind]:
    """The names of the layers of `model` that are cut, and how. Raises UserError for a family without a plan."""
    config: Any = model.config
    text = text_config(config)
    plan = TABLE.get(config.model_type) or plan_of_transformers(text)
    decoder = backbone_of(model) if text is config else cast(Any, model).get_decoder()
    modules = dict(model.named_modules())
    prefix = next((f"{name}." for name, module in modules.items() if name and module is decoder), "")
    kinds: dict[str, Kind] = {}
    for pattern, kind in plan.items():
        matching = re.compile(re.escape(prefix) + pattern.replace(".", r"\.").replace("*", r"\d+"))
        layers = [name for name in modules if matching.fullmatch(name)]
        if not layers:
            raise no_plan(config, f"it has no layer {pattern}")
        kinds.update(dict.fromkeys(layers, kind))
    return kinds


def plan_of_transformers(config: Any) -> dict[str, Kind]:
    """A family's own plan in our words."""
    plan: dict[str, Kind] = {}
    theirs = getattr(config, "base_model_tp_plan", None)
    if not theirs:
        raise no_plan(config, "there is no plan for it")
    for pattern, word in theirs.items():
        if word == "rowwise":
            plan[pattern] = "row"
        elif word == "colwise":
            plan[pattern] = "key_value" if pattern.endswith((".k_proj", ".v_proj")) else "column"
        elif word not in WHOLE:
            raise no_plan(config, f"its plan asks for '{word}'")
    return plan


def no_plan(config: Any, reason: str) -> UserError:
    return UserError(
        f"Models of type '{config.model_type}' cannot be cut over ranks ({reason}); use tensor-parallel degree 1."
    )
