"""What of a model directory cannot be used, as its small files tell: code, adapters, pointers, quantised weights."""

import json
import os
from contextlib import suppress
from pathlib import Path

from inference.errors import UserError
from inference.untrusted import refuse_code

POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that stands for a large one."""
LARGEST_POINTER = 1024
"""Bytes."""
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
                        f"is read from other places; get the model anew from where you trust it."
                    )


def refuse_quantised(directory: Path, name: str = "") -> None:
    """Raise UserError for quantised weights, which do not train."""
    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # what is wrong with the file, loading it says
    parts = [values, *values.values()] if isinstance(values, dict) else []
    found = [(key, part[key]) for part in parts if isinstance(part, dict) for key in QUANTISED if part.get(key)]
    for key, how in found:
        method = how.get("quant_method") if isinstance(how, dict) else None
        if method == "gguf":  # unpacked already, since it lies in another format
            continue
        raise UserError(
            f"{name or directory} has quantised weights ({key} in its config.json{f': {method}' if method else ''}), "
            f"which can neither be trained nor answer here: give the model that it was made from, in 16 or 32 bit."
        )
