"""TensorBoard files read back by TensorBoard itself; the calls to W&B, seen by a stand-in."""

import sys
from types import SimpleNamespace

import pytest

from inference.errors import UserError
from training import metrics
from training.config_files import load_config
from training.run_directory import RunDirectory
from training.steps import SFT


def journal(path, *settings: str):
    run = RunDirectory(path)
    run.step(SFT).path.mkdir(parents=True, exist_ok=True)
    return metrics.metrics_journal(run, run.step(SFT), load_config([], ["model=any", *settings]))


def test_tensorboard_reads_what_was_written_and_forgets_what_was_rewound(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    first = journal(tmp_path, "logging.tensorboard=true")
    first.rewind(-1)
    for number in (1, 2, 3):
        first.write(number, {"loss": number / 4, "eval/loss": float("nan")})
    second = journal(tmp_path, "logging.tensorboard=true")  # resumed from a checkpoint after 2
    second.rewind(2)
    second.write(3, {"loss": 7.0})
    found = accumulator(str(tmp_path / "tensorboard" / "step1_sft"))
    found.Reload()
    assert found.Tags()["scalars"] == ["loss"]  # what is not finite is left out
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 0.25), (2, 0.5), (3, 7.0)]
    assert [row["loss"] for row in second.read()] == [0.25, 0.5, 7.0]


def test_wandb_gets_the_numbers_of_a_run_that_keeps_its_name(tmp_path, monkeypatch):
    begun, logged = [], []

    def init(**arguments):
        begun.append(arguments)
        return SimpleNamespace(log=logged.append, define_metric=lambda *a, **k: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=object()))
    for _ in range(2):
        ours = journal(tmp_path / "demo", "logging.wandb=true", "logging.wandb_project=mine")
        ours.rewind(-1)
    ours.write(4, {"loss": 0.5})
    assert logged == [{"number": 4, "loss": 0.5}]
    assert begun[0] == begun[1] and begun[0]["project"] == "mine" and begun[0]["group"] == "demo"
    assert begun[0]["config"]["model"] == "any" and begun[0]["resume"] == "allow"


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_a_sentence_with_the_extra(tmp_path, monkeypatch, name):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=rf"pip install 'rlhf-chat\[{name}\]'"):
        journal(tmp_path, f"logging.{name}=true")


def test_without_settings_nothing_is_needed_or_written(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda module: None)
    ours = journal(tmp_path)
    ours.rewind(-1)
    ours.write(1, {"loss": 0.5})
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["metrics.jsonl"]
