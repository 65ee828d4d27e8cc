"""The model store without a network: the hub is replaced at its one call."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

from inference import model_store
from inference.errors import UserError
from inference.families import build_tiny_model
from inference.model_store import cache_directory, resolve_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    directory = tmp_path / "cache"
    monkeypatch.setenv("RLHF_CHAT_CACHE", str(directory))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return directory


@pytest.fixture
def model(tmp_path):
    """A directory that has all that is checked for."""
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (directory / name).write_text("{}")
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


@pytest.fixture
def lines():
    return []


def hashes(directory):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def refuse(*arguments, **options):
    raise AssertionError("must not be called")


# Directories


def test_directory_is_returned_as_it_is(model, lines, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert resolve_model(str(model), lines.append) == model
    monkeypatch.chdir(model.parent)
    assert resolve_model("model", lines.append) == Path("model")
    assert lines == []


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "has no config.json|it has no config.json"),
        ("config.json", "{", r"config\.json of .* cannot be read"),
        ("model.safetensors", None, r"no weights \(\*\.safetensors or pytorch_model\*\.bin\)"),
        ("tokenizer.json", None, r"no tokenizer \(tokenizer\.json"),
    ],
)
def test_incomplete_directory_is_named(model, file, content, message):
    if content is None:
        (model / file).unlink()
    else:
        (model / file).write_text(content)
    with pytest.raises(UserError, match=message):
        resolve_model(str(model))


def test_weights_in_parts(model):
    (model / "model.safetensors").unlink()
    first, second = model / "model-1-of-2.safetensors", model / "model-2-of-2.safetensors"
    first.touch()
    index = {"weight_map": {"a": first.name, "b": second.name, "c": second.name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"only 1 of 2 weights files, model-2-of-2\.safetensors is missing"):
        resolve_model(str(model))
    second.touch()
    # the hub's repositories also have the index of the format that is not loaded
    (model / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-1-of-1.bin"}}')
    assert resolve_model(str(model)) == model
    (model / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match=r"unreadable model\.safetensors\.index\.json"):
        resolve_model(str(model))


def test_pickled_weights_will_do(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert resolve_model(str(model)) == model


def test_model_directory_inside_is_proposed(model):
    with pytest.raises(UserError, match=f"did you mean {model}"):
        resolve_model(str(model.parent))


@pytest.mark.parametrize("source", ["./none", "/none/there", "none/", "a/b/c", "~/none-of-that-name"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(source, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=f"There is no directory {source}"):
        resolve_model(source)


def test_a_file_is_no_model(model):
    with pytest.raises(UserError, match="is a file; give the directory"):
        resolve_model(str(model / "model.safetensors"))


# The tiny model and the cache


def test_tiny_is_the_same_every_time_and_leaves_the_random_state(tmp_path, lines):
    state = torch.get_rng_state()
    first = resolve_model("tiny", lines.append)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    started = time.process_time()
    build_tiny_model(tmp_path / "again")
    assert time.process_time() - started < 2
    code = (
        f"from pathlib import Path; from inference.families import *; build_tiny_model(Path({str(tmp_path)!r}) / 'p')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert hashes(first) == hashes(tmp_path / "again") == hashes(tmp_path / "p")
    assert resolve_model("tiny", lines.append) == first
    assert lines == []


def test_tiny_opens_in_transformers():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = resolve_model("tiny")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    # a layer: four maps 64 -> 64, then 64 -> 128 -> 64, two norms; besides: tokens, positions + 2, final norm
    layer = 4 * (64 * 64 + 64) + (64 * 128 + 128) + (128 * 64 + 64) + 2 * 2 * 64
    assert model.num_parameters() == 512 * 64 + 514 * 64 + 2 * 64 + 2 * layer
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert len(tokenizer) == 512
    assert tokenizer.chat_template is None
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<s>"]) == [0, 1, 2]
    assert (model.config.pad_token_id, model.config.eos_token_id, model.config.bos_token_id) == (0, 1, 2)
    text = "A byte-level tokenizer knows every text: é 漢字 🙂\n\t ."
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.encode("a")[0] == 2  # as OPT does
    logits = model(input_ids=torch.tensor([tokenizer.encode("Hello")])).logits
    assert logits.shape[-1] == 512
    assert torch.isfinite(logits).all()


def test_cache_is_beside_the_users_other_caches(monkeypatch):
    monkeypatch.delenv("RLHF_CHAT_CACHE")
    assert cache_directory() == Path.home() / ".cache" / "rlhf-chat"


def test_what_a_killed_process_left_is_not_used(cache, monkeypatch):
    left_over = cache / f"{model_store.TINY_CACHE_NAME}.part-abc" / "made"
    left_over.mkdir(parents=True)
    (left_over / "config.json").write_text("{}")
    assert resolve_model("tiny") == cache / model_store.TINY_CACHE_NAME
    assert (cache / model_store.TINY_CACHE_NAME / "model.safetensors").is_file()
    assert not left_over.parent.exists()


def test_a_process_killed_while_building_leaves_no_model(cache):
    """The child is killed (no cleanup runs) with half a model written; the next call builds it whole."""
    code = (
        "import os, signal, pathlib\n"
        "from inference import model_store\n"
        "def half(directory):\n"
        "    (directory / 'config.json').write_text('{}')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "model_store._build_tiny = half\n"
        "model_store.resolve_model('tiny')\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == -9
    assert [file.name for file in cache.glob("*.part-*/made/*")] == ["config.json"]
    assert not (cache / model_store.TINY_CACHE_NAME).exists()
    assert (resolve_model("tiny") / "model.safetensors").is_file()
    assert list(cache.glob("*.part-*")) == []


def test_two_processes_build_once(cache, tmp_path):
    """The builder adds a line to a file and goes on once the other one waits; both end up with the one model."""
    code = (
        "import sys, time, pathlib\n"
        "from inference import model_store\n"
        f"waits = pathlib.Path({str(tmp_path / 'waits')!r})\n"
        "def build(directory):\n"
        f"    open({str(tmp_path / 'built')!r}, 'a').write('built\\n')\n"
        "    while not waits.exists(): time.sleep(0.01)\n"
        "    (directory / 'config.json').write_text('{}')\n"
        "model_store._build_tiny = build\n"
        "print(model_store.resolve_model('tiny', lambda line: print(line, file=sys.stderr) or waits.touch()))\n"
    )
    pipe = subprocess.PIPE
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=pipe, stderr=pipe) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [Path(out.decode().strip()) for out, _ in outputs] == [cache / model_store.TINY_CACHE_NAME] * 2
    assert (tmp_path / "built").read_text() == "built\n"
    assert sorted(err.decode().partition(" ")[0] for _, err in outputs) == ["", "Waiting"]


def test_failed_build_leaves_nothing(cache, monkeypatch):
    def full(directory):
        (directory / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(model_store, "_build_tiny", full)
    with pytest.raises(UserError, match=r"disk of .* is full; make room, or set RLHF_CHAT_CACHE"):
        resolve_model("tiny")
    assert [file.suffix for file in cache.iterdir()] == [".lock"]


def test_cache_that_cannot_be_written(cache):
    cache.touch()  # a file is in its place
    with pytest.raises(UserError, match="set RLHF_CHAT_CACHE elsewhere"):
        resolve_model("tiny")


def test_no_heavy_import_where_none_is_needed(model, cache):
    (cache / model_store.TINY_CACHE_NAME).mkdir(parents=True)
    code = (
        "import sys; from inference.model_store import resolve_model; resolve_model('tiny');"
        f"resolve_model({str(model)!r});"
        "sys.exit(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# The hub


def http_error(kind, status, headers=None):
    """A hub error as its HTTP layer raises it."""
    import importlib

    http = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])  # httpx, or its successor
    request = http.Request("GET", "https://hub.test/api/models/org/name")
    return kind("Client Error.\n\nLong text.", response=http.Response(status, headers=headers, request=request))


def unreachable():
    return errors.LocalEntryNotFoundError("Got: ConnectError: [Errno -2] Name or service not known\nAn error happened")


def server_down():
    error = unreachable()
    error.__cause__ = http_error(errors.HfHubHTTPError, 503)
    return error


def connection_lost():
    return type(errors.HTTPError.__name__, (errors.HTTPError,), {"__module__": errors.HTTPError.__module__})("reset")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: http_error(errors.RepositoryNotFoundError, 404), "no model of that name.*check the name.*HF_TOKEN"),
        (lambda: http_error(errors.GatedRepoError, 403), "is gated: accept its terms at .*/org/name and set HF_TOKEN"),
        (lambda: http_error(errors.HfHubHTTPError, 401), "HTTP 401.*set HF_TOKEN"),
        (lambda: http_error(errors.HfHubHTTPError, 429), "HTTP 429.*try again later"),
        (server_down, "HTTP 503.*try again later"),
        (lambda: errors.HFValidationError("bad"), "no model of that name"),
        (unreachable, "hub cannot be reached.*check the network"),
        (connection_lost, "hub cannot be reached.*check the network"),
        (lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "disk is full.*set HF_HOME"),
        (lambda: RuntimeError("Data error: No space left on device (os error 28)"), "disk is full"),
        (lambda: PermissionError(13, "Permission denied", "file"), "failed .*Permission denied"),
        (lambda: RuntimeError(), r"failed \(RuntimeError\)"),
    ],
)
def test_hub_errors_are_one_sentence_with_the_way_out(make, words, monkeypatch, lines):
    def fail(*arguments, **options):
        raise make()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=words) as caught:
        resolve_model("org/name", lines.append)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert "--model DIR" in sentence or "HF_HOME" in sentence


@pytest.mark.parametrize("error", [unreachable, lambda: errors.OfflineModeIsEnabled("offline")])
def test_offline_and_not_in_the_cache(error, monkeypatch, lines):
    def fail(*arguments, **options):
        raise error()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set: unset it once, or use a local directory"):
        resolve_model("gpt2", lines.append)


def write_hub_cache(home, repository, files):
    """A repository in the hub's cache, laid out as the hub's library does it."""
    commit = "0" * 40
    folder = home / "hub" / ("models--" + repository.replace("/", "--"))
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    for name in files:
        (snapshot / name).write_text("{}")
    return snapshot


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_offline_works_with_cached_files(tmp_path, weights):
    """The hub's real library, in a process of its own: it reads HF_HUB_OFFLINE and HF_HOME when imported."""
    snapshot = write_hub_cache(tmp_path, "org/name", ["config.json", "vocab.json", "merges.txt", weights])
    code = "from inference.model_store import resolve_model; print(resolve_model('org/name', lambda line: None))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_CACHE", None)
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert Path(output.stdout.decode().strip()) == snapshot


class FakeHub:
    """snapshot_download for one repository of empty files; remembers the patterns it was asked for."""

    def __init__(self, directory, files):
        self.directory, self.files, self.calls = directory, files, []

    def __call__(self, repository, allow_patterns, ignore_patterns):
        self.calls.append(repository)
        self.directory.mkdir(exist_ok=True)
        filtered = huggingface_hub.utils.filter_repo_objects(
            self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for name in filtered:
            (self.directory / name).parent.mkdir(exist_ok=True)
            (self.directory / name).write_text("{}")
        return str(self.directory)


def test_hub_model_with_safetensors(tmp_path, monkeypatch, lines):
    wanted = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
    unwanted = ["pytorch_model.bin", "flax_model.msgpack", "consolidated.safetensors", "onnx/config.json", "README.md"]
    hub = FakeHub(tmp_path / "snapshot", wanted + unwanted)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert resolve_model("org/name", lines.append) == tmp_path / "snapshot"
    assert sorted(file.name for file in (tmp_path / "snapshot").iterdir()) == sorted(wanted)
    assert hub.calls == ["org/name"]
    assert "MB) in " in lines[-1]


def test_hub_model_with_pickles_only(tmp_path, monkeypatch, lines):
    files = ["config.json", "pytorch_model.bin", "vocab.json", "merges.txt", "tf_model.h5"]  # as facebook/opt-1.3b
    hub = FakeHub(tmp_path / "snapshot", files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert (resolve_model("gpt2", lines.append) / "pytorch_model.bin").is_file()
    assert hub.calls == ["gpt2", "gpt2"]
    assert not (tmp_path / "snapshot" / "tf_model.h5").exists()


def test_hub_repository_without_weights_is_named_as_the_user_did(tmp_path, monkeypatch, lines):
    hub = FakeHub(tmp_path / "snapshot", ["config.json", "tokenizer.json", "model.Q4_1.gguf"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    with pytest.raises(UserError, match=r"^org/name has no weights"):
        resolve_model("org/name", lines.append)


def test_snapshot_that_lacks_only_needless_files_serves_while_offline(model, monkeypatch, lines):
    def fail(*arguments, **options):
        raise errors.IncompleteSnapshotError("1 file(s) are missing (notes.txt)", snapshot_path=str(model))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert resolve_model("org/name", lines.append) == model
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="hub cannot be reached"):
        resolve_model("org/name", lines.append)
