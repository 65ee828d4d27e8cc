"""The sizes of a language model, which memory and time are worked out from before anything is loaded.

Source of `activation_values`: "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198,
section 4).
"""

import copy
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from inference.errors import UserError
from training.hybrid_engine.layout import StageCut

if TYPE_CHECKING:  # transformers takes a second to import
    from torch import Tensor
    from transformers import PreTrainedConfig

_FFN_NAMES = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dff")


@dataclass(frozen=True)
class Shape:
    """The sizes of a causal language model; where its layers differ, those of the largest."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    is_gated: bool  # whether the feed-forward part has a gate beside its up-projection (Llama and Qwen have)
    parameters: int  # all weights; an embedding that is also the output matrix counts once
    output_matrix: int  # weights of an output matrix of its own; a model with a score head has none
    linears: tuple[tuple[str, int], ...]
    """Name, and inputs + outputs, of every linear layer but the output matrix: adapters can go there."""
    embedding_width: int = 0  # where it is not `hidden`, as in OPT-350m
    config: "PreTrainedConfig | None" = field(default=None, compare=False, repr=False)

    @classmethod
    def from_config_values(cls, values: dict[str, Any]) -> "Shape":
        """Build from Hugging Face configuration values with their `model_type`. Raises UserError as `of` does."""
        from inference.families import config_of

        return cls.of(config_of(values))

    @classmethod
    def of(cls, config: "PreTrainedConfig") -> "Shape":
        """Build from a configuration. The model is built without storage.

        Raises UserError where transformers makes no causal language model of it, or one that cannot be used here.
        """
        from inference.families import layer_values, meta_model, require_supported_family, takes_adapter, text_config

        require_supported_family(config)
        model = meta_model(config)
        output = model.get_output_embeddings()
        table = cast("Tensor", model.get_input_embeddings().weight)
        own_output = output is not None and output.weight is not table
        linears = tuple(
            (name, sum(module.weight.shape))
            for name, module in model.named_modules()
            if module is not output and takes_adapter(module)
        )
        text = text_config(config)

        def largest(*names: str) -> int:
            return max(layer_values(config, *names), default=0)

        hidden, heads = text.hidden_size, largest("num_attention_heads")
        experts = largest("moe_intermediate_size") * largest("num_experts_per_tok")
        return cls(
            layers=text.num_hidden_layers,
            hidden=hidden,
            ffn=max(largest(*_FFN_NAMES) or 4 * hidden, experts),
            heads=heads,
            kv_heads=largest("num_key_value_heads") or heads,
            head_dim=largest("qk_head_dim", "head_dim") or hidden // heads,
            vocabulary=text.vocab_size,
            is_gated=any("gate" in name for name, _ in model.named_parameters()),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            output_matrix=output.weight.numel() if own_output else 0,
            linears=linears,
            embedding_width=table.shape[1],
            config=config,
        )

    @cached_property
    def why_no_stages(self) -> str:
        """Why models of this family cannot be cut into pipeline stages, a sentence; '' where they can."""
        from training.models.policy import keep_layers
        from training.pipelines.stage_model import require_stages

        if self.config is None or self.layers < 2:
            return ""
        short = copy.deepcopy(self.config)
        keep_layers(short, 2)
        with suppress(UserError):  # quick, but some families are not made of two layers
            require_stages(short, 2)
            return ""
        try:
            require_stages(self.config, 2)
        except UserError as error:
            return str(error)
        return ""

    @property
    def embedding(self) -> int:
        return self.vocabulary * (self.embedding_width or self.hidden)

    @property
    def scorer_parameters(self) -> int:
        """Weights with a score head instead of the output matrix (its own few thousand left out)."""
        return self.parameters - self.output_matrix

    def stage(self, cut: StageCut, with_head: bool = True) -> "Shape":
        """Return the shape of a pipeline stage: the first one has the embeddings too, the last one the output
        matrix, if the model is one `with_head`; what is both is on both. What else is outside of the layers counts
        as theirs."""
        if len(cut.layers) == 1:
            return self
        output = self.output_matrix * with_head
        in_layers = (self.parameters if with_head else self.scorer_parameters) - self.embedding - output
        parameters = -(-in_layers * len(cut.run) // self.layers) + self.embedding * cut.is_first
        parameters += (output or self.embedding * with_head) * cut.is_last
        linears = tuple((name, size) for name, size in self.linears if _layer_of(name) in cut.run)
        layers, output = len(cut.run), output * cut.is_last
        return replace(self, layers=layers, parameters=parameters, output_matrix=output, linears=linears)

    def lora_parameters(self, rank: int, targets: str | list[str]) -> int:
        """Count the weights of adapters on `targets`, chosen as peft does: a list by last names, a text by pattern."""

        def has_adapter(name: str) -> bool:
            if targets == "all-linear":
                return True
            if isinstance(targets, str):
                return re.fullmatch(targets, name) is not None
            return any(name == target or name.endswith("." + target) for target in targets)

        return rank * sum(size for name, size in self.linears if has_adapter(name))

    def activation_values(self, tokens: int, checkpointing: bool, passes: int = 1) -> int:
        """Count the numbers stored for the backward passes of so many forward ones; dropout is off, attention is fused.

        A layer keeps the inputs of two norms, of attention and of the feed-forward part (4 hidden), queries and
        attention output, keys and values, and the feed-forward part before and after its activation, a gate's
        factors too. With checkpointing: each layer's input and, while it is recomputed, one layer whole.
        """
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = 4 * self.hidden + 2 * queries + 2 * keys + (4 if self.is_gated else 2) * self.ffn
        inputs = passes * self.layers
        return tokens * (inputs * self.hidden + layer if checkpointing else inputs * layer)

    def cache_values(self, tokens: int) -> int:
        """Count the numbers in the keys and values of so many tokens."""
        return tokens * self.layers * 2 * self.kv_heads * self.head_dim


def _layer_of(name: str) -> int:
    """Return the number of the layer that a module is in; -1 outside of all."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else -1
