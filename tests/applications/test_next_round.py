"""`rlhf-chat run --from RUN --go-on`: which settings and models the next round begins with, and what is refused."""

import shutil
from pathlib import Path

import pytest
import yaml

from applications.chat import model_before
from applications.from_run import from_run, next_command, next_name
from applications.settings import as_settings
from inference.errors import UserError
from tests.tiny_runs import make_tiny_run
from training.run_directory import RunDirectory
from training.steps import DPO, PPO, REWARD, SFT


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_tiny_run(tmp_path_factory.mktemp("parent"))


@pytest.fixture
def parent(made, tmp_path):
    """Settings and names of finished steps, without the weights; somebody has judged answers."""
    run = RunDirectory(shutil.copytree(made.path, tmp_path / "demo", ignore=shutil.ignore_patterns("*.safetensors")))
    (run.path / "preferences.jsonl").write_text("")
    values = yaml.safe_load(run.config_file.read_text())
    values |= {"seed": 7, "reward": {"layers": 1, "max_steps": 5, "initialize_from": "sft"}, "announce": "minutes"}
    values |= {"data": {**values["data"], "limit": 30}, "evaluation": {"prompts": 6, "true_score": "upbeat"}}
    run.config_file.write_text(yaml.safe_dump(values))
    return run


def go_on(parent, *overrides, name="next", **flags):
    return from_run(parent.path, parent.path.parent / name, [], list(overrides), as_settings(flags), goes_on=True)[1]


def test_the_next_round_begins_with_the_newest_models_on_the_preferences(parent):
    config = go_on(parent)
    assert config.sft_model == str(parent.step(PPO).model) and config.reward_model == str(parent.step(REWARD).model)
    assert (config.reward.layers, config.reward.initialize_from, config.reward.max_steps) == (0, "base", 0)
    assert config.data.source == str(parent.path / "preferences.jsonl") and config.data.parent == str(parent.path)
    assert (config.data.limit, config.data.split_seed, config.data.max_response_tokens) == (0, 7, 12)
    assert (config.model, config.seed, config.announce) == (parent.read_config().model, 7, "")
    assert config.evaluation.true_score == "none" and config.evaluation.prompts == 6
    assert config.steps == [SFT, REWARD, PPO] and config.given_model(SFT)


def test_chat_compares_a_round_with_the_model_that_it_came_from(made, parent):
    (parent.step(PPO).model / "model.safetensors").symlink_to(made.step(PPO).model / "model.safetensors")
    run = RunDirectory(parent.path.parent / "next")
    assert model_before(run.path, trusts=False) is None
    run.write_config(go_on(parent), {})
    assert model_before(run.path, trusts=False) == ("demo/rlhf", parent.step(PPO).model)


def test_what_is_given_lies_above(parent, tmp_path):
    (tmp_path / "mine.jsonl").write_text("")
    config = go_on(parent, "dpo.epochs=9", "reward.max_steps=2", data=[str(tmp_path / "mine.jsonl")], method="dpo")
    assert (config.dpo.epochs, config.reward.max_steps, config.method) == (9, 2, "dpo")
    assert config.data.source == str(tmp_path / "mine.jsonl") and config.steps == [SFT, DPO]
    config = go_on(parent, reward_model="tiny")
    assert (config.reward_model, config.reward.layers, config.reward.initialize_from) == ("tiny", 1, "sft")


def test_a_round_after_a_round_has_the_newest_reward_model_there_is(parent):
    shutil.copytree(parent.path, parent.path.parent / "second")
    second = RunDirectory(parent.path.parent / "second")
    shutil.rmtree(second.step(REWARD).path)
    values = yaml.safe_load(second.config_file.read_text())
    values["data"]["parent"], values["sft_model"] = str(parent.path), "tiny"
    second.config_file.write_text(yaml.safe_dump(values))
    config = go_on(second)
    assert config.sft_model == str(second.step(PPO).model) and config.reward_model == str(parent.step(REWARD).model)


def test_a_round_that_is_there_keeps_its_settings(parent):
    run = RunDirectory(parent.path.parent / "next")
    run.write_config(go_on(parent, "dpo.epochs=9"), {})
    parent.config_file.write_text(parent.config_file.read_text().replace("seed: 7", "seed: 8"))
    assert (go_on(parent).dpo.epochs, go_on(parent).seed) == (9, 7)
    other = shutil.copytree(parent.path, parent.path.parent / "other")
    with pytest.raises(UserError, match=r"next was made from .*demo, not from .*other: give .* another --name"):
        go_on(RunDirectory(other))
    with pytest.raises(UserError, match=r"demo was made without --from, not from .*other"):
        go_on(RunDirectory(other), name="demo")


def test_a_parent_without_what_is_needed(parent, tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        go_on(RunDirectory(tmp_path / "nowhere"))
    (parent.path / "preferences.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no preferences yet .*rlhf-chat prefer .*demo.* --data FILE"):
        go_on(parent)
    shutil.rmtree(parent.step(REWARD).path)
    with pytest.raises(UserError, match=r"has no reward model to go on from.*--method dpo.*rlhf-chat reward .*demo"):
        go_on(parent, data=["chitchat"])
    assert go_on(parent, data=["chitchat"], method="dpo").method == "dpo"
    assert go_on(parent, "method=dpo", data=["chitchat"]).method == "dpo"
    assert go_on(parent, data=["chitchat"], reward_model="tiny").reward.layers == 1
    others = "rlhf.reward_weights.model=0", "rlhf.reward_url=http://localhost"
    assert not go_on(parent, *others, data=["chitchat"]).rlhf.has_reward_model
    for step in (SFT, PPO):
        shutil.rmtree(parent.step(step).path)
    with pytest.raises(UserError, match="has no finished model"):
        go_on(parent, data=["chitchat"], method="dpo")


@pytest.mark.parametrize(
    ("parent", "name"), [("runs/demo", "demo-round2"), ("demo-round2", "demo-round3"), ("a/b-round19/", "b-round20")]
)
def test_a_round_has_a_name(parent, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert next_name(Path(parent)) == name


def test_the_command_of_the_next_round_takes_no_name_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parent, more = Path("runs/demo"), " --data a.jsonl"
    assert next_command(parent, more) == "rlhf-chat run --from runs/demo --go-on --data a.jsonl"
    for name in ("demo-round2", "demo-round3"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert next_command(parent, more) == "rlhf-chat run --from runs/demo --go-on --data a.jsonl --name demo-round4"
