"""What of a model directory cannot be used, as its small files tell: code, adapters, pointers, quantised weights."""

import json
import os
import pickle
from contextlib import suppress
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


POINTER = b"version https://git-lfs.github.com/spec/"
LARGEST_POINTER = 1024  # bytes
QUANTISED = ("quantization_config", "compression_config")


def require_usable(directory: Path, name: str = "") -> None:
    """Raise UserError for a directory whose files cannot be used as they are. `name` is what the user calls it."""
    refuse_code(directory, name)
    refuse_pointers(directory, name)
    refuse_quantised(directory, name)
    refuse_parts_elsewhere(directory, name)


def refuse_pointers(directory: Path, name: str = "") -> None:
    """Raise UserError where git has left a pointer in the place of a large file."""
    for file in sorted(directory.glob("*")):
        if file.is_file() and file.stat().st_size <= LARGEST_POINTER and file.read_bytes().startswith(POINTER):
            raise UserError(
                f"{file.name} of {name or directory} is a pointer of Git LFS, not the file: fetch the files with "
                f"git lfs install and git lfs pull, in the place that it was cloned to."
            )


def refuse_parts_elsewhere(directory: Path, name: str = "") -> None:
    """Raise UserError for an index of weights that names files of another directory."""
    for index in sorted(directory.glob("*.index.json")):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged index, loading it says
            for part in map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()):
                if part != os.path.basename(part):
                    raise UserError(
                        f"{index.name} of {name or directory} names {part[:80]}, which does not lie beside it: nothing "
                        f"is read from other places; get the model again from where you trust it."
                    )


def refuse_quantised(directory: Path, name: str = "") -> None:
    """Raise UserError for quantised weights, which do not train."""
    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # what is wrong with the file, loading it says
    parts = [values, *values.values()] if isinstance(values, dict) else []
    for key, how in ((key, part.get(key)) for part in parts if isinstance(part, dict) for key in QUANTISED):
        method = how.get("quant_method") if isinstance(how, dict) else None
        if not how or method == "gguf":  # GGUF is unpacked already, since it lies in another format
            continue
        raise UserError(
            f"{name or directory} has quantised weights ({key} in its config.json{f': {method}' if method else ''}), "
            f"which can neither be trained nor answer here: give the model that it was made from, in 16 or 32 bit."
        )
