"""The first layers of a model: its configuration, cut."""

from transformers import PreTrainedConfig

from inference.errors import UserError
from inference.families import text_config

NO_LAYERS = ("_token_id", "_token_ids", "architectures")
"""Ends of the names of lists that hold nothing for each layer, whatever their length."""


def keep_layers(config: PreTrainedConfig, layers: int) -> None:
    """Keep the first so many layers, and of every list with a value for each layer as many. Raises UserError."""
    text = text_config(config)
    has = text.num_hidden_layers
    if layers > has:
        raise UserError(f"reward.layers={layers}: the model has {has} layers; keep that many, or 0 for all.")
    text.num_hidden_layers = layers
    for name, value in vars(text).items():
        if isinstance(value, list | tuple) and len(value) == has and not name.endswith(NO_LAYERS):
            setattr(text, name, value[:layers])
    if hasattr(text, "attention_types"):  # GPT-Neo's own way to write what its attention_layers hold
        text.attention_types = [[[kind], 1] for kind in text.attention_layers]
