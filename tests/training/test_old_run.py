"""A run directory of an earlier version (tests/data/old_run): chat, report, serve and eval open it, all steps go on."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from applications.cli import main
from inference.chat_model import ChatModel
from inference.generation.sampler import SamplingSettings
from inference.serving.service import find_served_models
from training import stage_script as stage
from training.distributed import Ranks
from training.evaluation.comparison import Comparison
from training.run_directory import RunDirectory
from training.step1_sft import sft
from training.step2_reward import reward
from training.step3_rlhf import ppo
from training.steps import PPO, REWARD, SFT

OLD = Path(__file__).parents[1] / "data" / "old_run"
TRAIN = {SFT: sft.train, REWARD: reward.train, PPO: ppo.train}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Its working directory; its settings name the model by a path relative to it."""
    return shutil.copytree(OLD, tmp_path_factory.mktemp("old") / "place")


@pytest.fixture
def run(place, monkeypatch) -> RunDirectory:
    monkeypatch.chdir(place)
    return RunDirectory(Path("run"))


def command(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["rlhf-chat", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


def test_chat(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say tea.\n"))
    command(monkeypatch, "chat", "run", "--max-tokens", "4")
    assert capsys.readouterr().out.strip()


def test_report(run, monkeypatch):
    (run.path / "report.html").unlink()
    command(monkeypatch, "report", "run")
    page = (run.path / "report.html").read_text()
    assert "Say sun 4." in page and "Step 3: PPO" in page


def test_serve(run):
    found = find_served_models(run.path)
    assert list(found) == ["sft", "rlhf"]
    for directory in found.values():
        model = ChatModel.load(directory)
        assert "".join(model.reply([{"role": "user", "content": "Say tea."}], SamplingSettings(4), seed=1, turn=0))


def test_eval(run):
    measuring = stage.make_stage(run, PPO, run.read_config(), Ranks(0, 1, torch.device("cpu")))
    measuring.display.quiet = True
    Comparison(measuring).run(run.path / "again.json", run.path / "again.jsonl")
    again, before = (json.loads((run.path / name).read_text()) for name in ("again.json", "evaluation.json"))
    assert again["pair"] == before["pair"] and again["prompts"] == before["prompts"]


@pytest.mark.parametrize("step", TRAIN, ids=lambda step: step.command)
def test_a_step_goes_on_from_the_middle_to_the_same_end(run, one_rank, monkeypatch, step):
    directory = run.step(step)
    assert (directory.checkpoints / "1").is_dir()
    before = load_file(OLD / "run" / directory.path.name / "model" / "model.safetensors")
    directory.result_file.unlink()
    shutil.rmtree(directory.model)
    monkeypatch.setattr(sys, "argv", ["main.py", "run"])
    monkeypatch.setattr(stage, "start_ranks", lambda: one_rank)
    monkeypatch.setattr(stage, "stop_ranks", lambda: None)
    assert stage.run_stage(step, TRAIN[step]) == 0
    metrics, old = (file.read_text().splitlines() for file in (directory.metrics_file, OLD / directory.metrics_file))
    first = [line for line in old if json.loads(line)["number"] <= 1]
    assert first == metrics[: len(first)] and json.loads(metrics[-1])["number"] == 2  # it did not begin anew
    after = load_file(directory.model / "model.safetensors")
    assert all(torch.allclose(after[name], before[name], atol=1e-5) for name in before)
