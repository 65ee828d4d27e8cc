"""Model directories that others made: nothing in them is run.

Weights are safetensors, or pickles that hold tensors alone: OPT and other families are published as nothing else. torch
reads those with `weights_only`, which builds no other object. Code that a model brings (`auto_map`), or names on the
hub (`attn_implementation`), stays unread.
"""

import json
import pickle
from pathlib import Path

from inference.errors import UserError


def refuse_code(directory: Path, name: str = "") -> None:
    """Raise UserError for a directory that wants code of its own run, or another model loaded in its place.

    `name` is what the user calls it, where that is not its path.
    """
    name = name or str(directory)
    refuse_adapter(directory, name)
    for file in ("config.json", "tokenizer_config.json"):
        try:
            values = json.loads((directory / file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # what is wrong with the file, loading it says
        key = "auto_map" if isinstance(values, dict) and values.get("auto_map") else names_kernel(values)
        if key:
            raise UserError(
                f"{name} brings code of its own ({key} in {file}), which is never run here: choose another model, "
                f"or take {key} out of a copy of it, which loads if transformers knows its type by itself."
            )


def names_kernel(values: object) -> str:
    """The key under which a configuration, or a part of one, names attention code of the hub; else empty."""
    if not isinstance(values, dict):
        return ""
    for key, value in values.items():
        if key.endswith("attn_implementation") and "/" in json.dumps(value):
            return key
    return next(filter(None, map(names_kernel, values.values())), "")


def refuse_adapter(directory: Path, name: str) -> None:
    """Raise UserError for a directory with an adapter: transformers would load the model that its file names."""
    if (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{name} holds an adapter (adapter_config.json), which is no whole model: merge it into its base model, "
            f"for one of a run with rlhf-chat export, and give the merged one."
        )


def is_unsafe_pickle(error: BaseException | None) -> bool:
    """Whether `error`, of loading weights, is that a pickle holds more than tensors. It was not run."""
    while error is not None:
        if isinstance(error, pickle.UnpicklingError):
            return True
        error = error.__cause__ or error.__context__
    return False


def unsafe_pickle(directory: Path) -> str:
    """The sentence for `is_unsafe_pickle`."""
    return (
        f"The weights in {directory} are a pickle that is damaged or holds more than tensors, which could run code, "
        f"so it was not loaded: get the model as safetensors."
    )
