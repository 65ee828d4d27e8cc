"""Damaged files of a run and of models: run, report, eval and chat say which, and what to do about it."""

import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from applications.launch import run_stage_script
from inference.chat_format import ChatFormat
from inference.chat_model import ChatModel
from inference.disk import file_sentence
from inference.errors import UserError
from inference.families import build_tiny_model
from inference.model_store import resolve_model
from tests.test_mistakes import sentence
from tests.tiny_runs import make_tiny_run
from training.checkpoints import Checkpoints
from training.data.rows import read_rows
from training.distributed import Ranks
from training.metrics import Journal
from training.models.loading import load_causal_lm, load_scorer
from training.run_directory import RunDirectory
from training.steps import SFT


@pytest.fixture(scope="module")
def good_model(tmp_path_factory):
    build_tiny_model(directory := tmp_path_factory.mktemp("models") / "tiny")
    return directory


@pytest.fixture
def model(tmp_path, good_model):
    return shutil.copytree(good_model, tmp_path / "model")


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garbage(file):
    file.write_bytes(b"\xff" * 4096)


def huge_header(file):
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])


def without_a_tensor(file):
    weights = load_file(file)
    weights.pop("model.decoder.layers.0.fc1.weight")
    save_file(weights, file, {"format": "pt"})


def of_another_shape(file):
    name = "model.decoder.layers.0.fc1.weight"
    save_file({**load_file(file), name: torch.zeros(3, 3)}, file, {"format": "pt"})


def empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, garbage, huge_header, without_a_tensor, of_another_shape, empty])
def test_damaged_weights(model, good_model, damage):
    damage(model / "model.safetensors")
    chat_format = ChatFormat.load(good_model)
    for load in (
        ChatModel.load,
        lambda directory: load_causal_lm(directory, chat_format, torch.float32),
        lambda directory: load_scorer(directory, chat_format, torch.float32),
    ):
        with pytest.raises(UserError) as refused:
            load(model)
        assert str(model) in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_a_damaged_model_of_a_finished_step_is_written_again(model, good_model):
    (model.parent / "result.json").write_text("{}")
    cut(model / "model.safetensors")
    with pytest.raises(UserError, match=re.escape(f"delete {model} and give the command of its step again")):
        load_causal_lm(model, ChatFormat.load(good_model), torch.float32)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
@pytest.mark.parametrize(
    "damage", [cut, garbage, empty, lambda file: file.unlink(), lambda file: file.write_text("[1]")]
)
def test_damaged_tokenizer_and_config(model, good_model, name, damage):
    damage(model / name)
    chat_format = ChatFormat.load(good_model)
    loaders = [ChatModel.load]
    if name == "config.json":
        loaders += [
            lambda directory: load_causal_lm(directory, chat_format, torch.float32),
            lambda directory: load_scorer(directory, chat_format, torch.float32),
            lambda directory: resolve_model(str(directory), lambda line: None),
        ]
    for load in loaders:
        with pytest.raises(UserError) as refused:
            load(model)
        assert str(model) in str(refused.value) and len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("state", ["{", "[]", "{}", '{"number": 1}', "\x00\x00"])
def test_a_damaged_state_of_a_checkpoint(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, 2, Ranks(0, 1, torch.device("cpu")))
    checkpoints.save(1, lambda place: None, {})
    (tmp_path / "1" / "state.json").write_text(state)
    with pytest.raises(UserError, match=r"is damaged .*; delete .* to go on from the start"):
        checkpoints.newest()


BAD_LINES = [b'{"number": 2, "lo\n', b"\x00" * 20 + b"\n", b"[1]\n", b'{"loss": 1}\n', b"\xff\xfe\n"]


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_damaged_line_of_a_journal_loses_none_of_those_behind_it(tmp_path, line):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.write(1, {"loss": 0.5})
    with open(journal.file, "ab") as handle:
        handle.write(line)
    journal.write(3, {"loss": 0.25})
    before = journal.file.read_bytes()
    for use in (journal.read, lambda: journal.rewind(1)):
        with pytest.raises(UserError, match=r"Line 2 of .*metrics.jsonl is damaged: delete that line"):
            use()
    assert journal.file.read_bytes() == before


@pytest.mark.parametrize("line", [b'{"prompt": [', b"\x00\n", b"[]\n"])
def test_a_damaged_row_is_named(tmp_path, line):
    (tmp_path / "data").mkdir()
    for file, doomed in (
        (tmp_path / "data" / "a.jsonl", tmp_path / "data"),
        (tmp_path / "c.jsonl", tmp_path / "c.jsonl"),
    ):
        file.write_bytes(b"{}\n" + line)
        with pytest.raises(UserError, match=rf"Line 2 of {file} is damaged: delete .*{doomed}"):
            read_rows(file)


@pytest.fixture(scope="module")
def good_run(tmp_path_factory):
    run = make_tiny_run(tmp_path_factory.mktemp("run"))
    Journal(run.step(SFT).metrics_file).write(1, {"loss": 0.5})
    return run.path


@pytest.fixture
def run(good_run, tmp_path):
    return shutil.copytree(good_run, tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "text", "arguments", "expected"),
    [
        ("step1_sft/metrics.jsonl", "{\n", ["report"], "Line 1 of .*metrics.jsonl is damaged: delete that line"),
        ("step1_sft/result.json", '{"seco', ["report"], "result.json is damaged .* delete it, then rlhf-chat sft"),
        (
            "step2_reward/result.json",
            "",
            ["report"],
            "result.json is damaged .* delete it, then rlhf-chat reward",
        ),
        (
            "evaluation.json",
            '{"prompts": 3',
            ["report"],
            "evaluation.json is damaged .* then rlhf-chat eval .* makes it",
        ),
        ("data/counts.json", "\x00", ["report"], "counts.json is damaged .* delete .*data, which the next step makes"),
        ("config.yaml", "model: [", ["report"], "config.yaml is not valid YAML"),
        ("config.yaml", "\x00\x01", ["eval"], "config.yaml is not valid YAML"),
        ("config.yaml", "7", ["run", "--name"], "config.yaml holds no settings"),
        ("config.yaml", "model: x\nsft: 7", ["sft"], "'sft' is a group of settings"),
        ("step3_rlhf/model/config.json", "{", ["chat"], "config.json cannot be read"),
    ],
)
def test_a_damaged_run(run, monkeypatch, capsys, tmp_path, file, text, arguments, expected):
    (run / file).parent.mkdir(exist_ok=True)
    (run / file).write_text(text)
    said = sentence(monkeypatch, capsys, tmp_path, *arguments, run)
    assert re.search(expected, said) and len(said.strip().splitlines()) == 1, said


def test_an_export_of_damaged_weights_leaves_nothing(run, monkeypatch, capsys, tmp_path):
    cut(run / "step3_rlhf" / "model" / "model.safetensors")
    said = sentence(monkeypatch, capsys, tmp_path, "export", run, "--out", tmp_path / "out", "--dtype", "bf16")
    assert "cannot be loaded" in said and not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "--model", "tiny", "--name", "/proc/none/run"], "/proc/none cannot be used .No such file"),
        (["run", "--model", "tiny", "--name", "FILE/run"], "FILE.* cannot be used .Not a directory"),
        (["sft", "FILE", "--model", "tiny"], "exists and is not a run directory"),
        (["report", "RUN", "--out", "/proc/none/page.html"], "page.html cannot be written"),
        (["export", "RUN", "--out", "/proc/none/out"], "/proc/none/out cannot be written .*--out"),
    ],
)
def test_places_that_cannot_be_written(run, monkeypatch, capsys, tmp_path, arguments, expected):
    (tmp_path / "FILE").write_text("")
    arguments = [str(argument).replace("RUN", str(run)) for argument in arguments]
    assert re.search(expected, sentence(monkeypatch, capsys, tmp_path, *arguments))


@pytest.mark.parametrize("name", ["step1_sft", "step1_sft/log.txt", "step1_sft/.error.json.room"])
def test_a_step_directory_that_refuses(run, name):
    """A directory where a file should be, and the other way round: they refuse root, too."""
    shutil.rmtree(run / "step1_sft")
    if name == "step1_sft":
        (run / name).write_text("")
    else:
        (run / name).mkdir(parents=True)
    with pytest.raises(OSError) as refused:
        run_stage_script("step1_sft", RunDirectory(run), 1)
    said = file_sentence(refused.value) or ""
    assert re.search(rf"{run / 'step1_sft'}.* cannot be used \(.*\): check that place", said), said


def test_a_run_directory_that_refuses(run, monkeypatch, capsys, tmp_path):
    (run / ".lock").mkdir()
    said = sentence(monkeypatch, capsys, tmp_path, "sft", run)
    assert f"{run / '.lock'} cannot be used (Is a directory): check that place and its rights, then the same" in said


def test_no_permission_is_a_sentence_at_the_command(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("inference.disk.fcntl.flock", refuse)
    said = sentence(monkeypatch, capsys, tmp_path, "sft", run)
    assert f"{run / '.lock'} cannot be used (Permission denied)" in said


def refuse(handle, *_):
    raise PermissionError(13, "Permission denied", handle.name)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("[1]", "config.json is damaged"),
        ("{", "config.json is damaged"),
        ('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}', "brings code of its own"),
    ],
)
def test_a_run_and_its_dry_run_refuse_a_model_before_anything_is_made(
    model, monkeypatch, capsys, tmp_path, config, expected
):
    (model / "config.json").write_text(config)
    for more in ([], ["--dry-run"]):
        said = sentence(monkeypatch, capsys, tmp_path, "run", "--model", model, "--name", "new", *more)
        assert expected in said and not (tmp_path / "runs").exists()
