"""Runs that were never trained: settings and rows where runs have them."""

import json
import shutil

import pytest
import yaml

from applications.export import adapters_of
from applications.settings import resolve_settings
from inference.errors import UserError
from tests.tiny_runs import messages
from training.config_files import validate_config
from training.lineage import (
    ModelSource,
    base_model,
    inherit,
    newest_reward_model,
    origin_of,
    rounds_of,
    sources_of,
    trained_elsewhere,
)
from training.run_directory import RunDirectory
from training.steps import DPO, PPO, REWARD, SFT, STEPS


def make_run(path, rows=None, steps=STEPS, **settings):
    """A run directory whose steps left directories; `rows` are questions by the file's name."""
    run = RunDirectory(path)
    run.data.mkdir(parents=True)
    run.config_file.write_text(yaml.safe_dump({"model": "tiny", **settings}))
    for step in steps:
        run.step(step).model.mkdir(parents=True)
    files = {f"{kind}_{part}": [] for kind in ("sft", "pairs", "prompts") for part in ("train", "eval")}
    for name, questions in (files | (rows or {})).items():
        text = "".join(json.dumps({"prompt": messages(question)}) + "\n" for question in questions)
        (run.data / f"{name}.jsonl").write_text(text)
    return run


def model(run, step):
    return str(run.step(step).model)


def fork(path, rows=None, **settings):
    return make_run(path, rows, steps=(PPO, DPO), **settings)


def round_after(run):
    """Settings of a run that goes on from it."""
    return {"sft_model": "tiny", "data": {"parent": str(run.path)}}


@pytest.fixture
def parent(tmp_path):
    rows = {"sft_train": ["Why?"], "pairs_train": ["Where?", "Who?"], "prompts_train": ["When?"]}
    return make_run(tmp_path / "parent", rows, seed=5)


def settings_of(**values):
    return validate_config({"model": "tiny", **values})


def test_origin_of(parent, tmp_path):
    found = origin_of(model(parent, REWARD))
    assert found and (found.run.path, found.step) == (parent.path, REWARD)
    for source in ("", "tiny", "org/name", str(tmp_path), str(parent.path)):
        assert origin_of(source) is None
    shutil.copytree(model(parent, SFT), tmp_path / "step1_sft" / "model")  # beside no config.yaml
    assert origin_of(tmp_path / "step1_sft" / "model") is None


# The seed of the split


def test_a_split_has_the_runs_seed_unless_it_has_its_own():
    assert settings_of(seed=3).split_seed == 3  # as in runs whose settings do not name it
    assert settings_of(seed=3, data={"split_seed": 0}).split_seed == 0


@pytest.mark.parametrize(
    "given", [{"sft_model": SFT}, {"trained_reward_model": REWARD}, {"model": SFT}, {"reward_model": REWARD}]
)
def test_a_new_run_takes_the_split_of_the_run_that_its_models_come_from(parent, tmp_path, given):
    ((key, step),) = given.items()
    config = inherit(settings_of(seed=2, **{key: model(parent, step)}), RunDirectory(tmp_path / "new"))
    assert (config.split_seed, config.seed) == (5, 2)
    grandchild = make_run(tmp_path / "child", seed=7, data={"split_seed": 4})
    config = inherit(settings_of(seed=2, **{key: model(grandchild, step)}), RunDirectory(tmp_path / "new"))
    assert config.split_seed == 4
    own = settings_of(seed=2, data={"split_seed": 9}, **{key: model(parent, step)})
    assert inherit(own, RunDirectory(tmp_path / "new")).split_seed == 9


def test_a_run_that_is_there_keeps_its_split_and_base(parent, tmp_path):
    old = fork(tmp_path / "old", model=model(parent, SFT), sft_model=model(parent, SFT), seed=2)  # as they were made
    config = inherit(settings_of(seed=2, model=model(parent, SFT), sft_model=model(parent, SFT)), old)
    assert config == old.read_config() and config.split_seed == 2


def test_the_command_takes_both_over(parent, tmp_path):
    flags = {"sft_model": model(parent, SFT), "method": "dpo"}
    found = resolve_settings(model(parent, SFT), None, ["seed=2"], flags, RunDirectory(tmp_path / "new"))
    assert found is not None and (found.model, found.split_seed, found.seed) == ("tiny", 5, 2)


# The base model


def test_the_base_of_a_fork_is_that_of_the_run_before_it_also_in_a_chain(parent, tmp_path):
    config = inherit(
        settings_of(model=model(parent, SFT), sft_model=model(parent, SFT)), RunDirectory(tmp_path / "new")
    )
    assert config.model == "tiny"
    old = fork(tmp_path / "old", model=model(parent, SFT), sft_model=model(parent, SFT))
    assert base_model(old.read_config()) == "tiny"
    assert base_model(settings_of(model=model(old, PPO), sft_model=model(old, PPO))) == "tiny"
    assert base_model(settings_of(model="org/base", sft_model=model(parent, SFT))) == "org/base"


def test_a_base_that_nobody_knows_or_has_is_not_made_up(parent, tmp_path):
    elsewhere = str(tmp_path)
    assert base_model(settings_of(model=elsewhere, sft_model=elsewhere)) == ""
    ring = fork(tmp_path / "ring", model="tiny")
    ring.config_file.write_text(yaml.safe_dump({"model": model(ring, PPO), "sft_model": model(ring, PPO)}))
    assert base_model(ring.read_config()) == ""
    gone = make_run(tmp_path / "gone", model=str(tmp_path / "deleted"))
    config = inherit(settings_of(model=model(gone, SFT), sft_model=model(gone, SFT)), RunDirectory(tmp_path / "new"))
    assert config.model == model(gone, SFT)


def test_adapters_of_a_fork_lie_on_the_base_of_the_run_before(parent, tmp_path):
    child = fork(tmp_path / "child", sft_model=model(parent, SFT))
    child.step(PPO).adapter.mkdir()
    with pytest.raises(UserError, match=r"lies on the SFT model of .*parent, all of whose weights were trained"):
        adapters_of(child, child.read_config(), PPO, child.step(PPO).adapter)
    parent.step(SFT).adapter.mkdir()
    found = adapters_of(child, child.read_config(), PPO, child.step(PPO).adapter)
    assert found == ("tiny", [parent.step(SFT).adapter, child.step(PPO).adapter])
    on_hub = fork(tmp_path / "on_hub", sft_model="org/sft")
    on_hub.step(PPO).adapter.mkdir()
    assert adapters_of(on_hub, on_hub.read_config(), PPO, on_hub.step(PPO).adapter) == (
        "org/sft",
        [on_hub.step(PPO).adapter],
    )


# Held out stays held out

HELD_OUT = {
    "prompts_eval": ["why", "Who?", "New?"],
    "pairs_eval": ["WHEN?", "Else?"],
    "sft_eval": ["Else?"],
    "prompts_train": ["Where?", "Else 2?"],
}


def test_held_out_questions_that_the_models_were_trained_on_are_counted(parent, tmp_path):
    child = fork(tmp_path / "child", HELD_OUT, sft_model=model(parent, SFT), seed=2)
    (sentence,) = trained_elsewhere(child, sources_of(child.read_config()))
    assert sentence == (  # step 1 was trained on "Why?"
        f"Of what is held out here, 1 of 3 prompts, 0 of 2 pairs, 0 of 1 demonstrations have a question that was "
        f"trained on in {parent.path} (step 1); it was shared out otherwise (data.split_seed, 5 there and 2 here)."
    )
    both = {"sft_model": model(parent, SFT), "trained_reward_model": model(parent, REWARD)}
    judged = fork(tmp_path / "judged", HELD_OUT, seed=5, data={"held_out": 0.1}, **both)
    (sentence,) = trained_elsewhere(judged, sources_of(judged.read_config()))
    assert "2 of 3 prompts, 0 of 2 pairs" in sentence and "(step 1, 2), and so have 1 of 2 prompts" in sentence
    assert sentence.endswith("; it was shared out otherwise (data.held_out).")
    (sentence,) = trained_elsewhere(child, [ModelSource("parent", model(parent, PPO))])  # went through all three steps
    assert "2 of 3 prompts, 1 of 2 pairs, 0 of 1 demonstrations" in sentence and "(step 1, 2, 3)" in sentence


def test_a_chain_of_forks_is_followed_to_its_beginning(parent, tmp_path):
    child = fork(tmp_path / "child", sft_model=model(parent, SFT), trained_reward_model=model(parent, REWARD))
    grandchild = fork(tmp_path / "grandchild", HELD_OUT, sft_model=model(child, DPO))
    of_child, of_parent = trained_elsewhere(grandchild, sources_of(grandchild.read_config()))
    assert (
        f"Nothing that is held out here (3 prompts, 2 pairs, 1 demonstrations) has a question that was trained on in "
        f"{child.path} (step 2 (DPO))." == of_child
    )
    assert (
        f"1 of 3 prompts, 0 of 2 pairs, 0 of 1 demonstrations have a question that was trained on in {parent.path} "
        "(step 1)" in of_parent
    )


def test_what_cannot_be_known_is_said(parent, tmp_path):
    child = fork(tmp_path / "child", HELD_OUT, sft_model=model(parent, SFT), trained_reward_model="org/reward")
    shutil.rmtree(parent.data)
    assert [sentence.partition(":")[0] for sentence in trained_elsewhere(child, sources_of(child.read_config()))] == [
        f"It is not known whether rows that are held out here were trained on in {parent.path}",
        "It is not known what org/reward was trained on",
    ]


def test_nothing_is_said_of_a_runs_own_models_and_of_pretrained_ones(parent):
    sources = [ModelSource("SFT", model(parent, SFT)), ModelSource("base model", "tiny", True)]
    assert trained_elsewhere(parent, sources) == []


def test_demonstrations_that_ppo_mixed_in_were_trained_on(parent, tmp_path):
    mixed = make_run(tmp_path / "mixed", {"sft_train": ["Else?"]}, sft_model="tiny", rlhf={"ptx": {"coefficient": 1}})
    child = fork(tmp_path / "child", HELD_OUT)
    (sentence, _) = trained_elsewhere(child, [ModelSource("mixed", model(mixed, PPO))])
    assert "0 of 3 prompts, 1 of 2 pairs, 1 of 1 demonstrations" in sentence


# Rounds


def test_a_chain_of_rounds_ends_where_a_run_is_gone_or_the_chain_is_closed(parent, tmp_path):
    second = fork(tmp_path / "second", **round_after(parent))
    third = fork(tmp_path / "third", **round_after(second))
    assert rounds_of(third) == [parent, second, third] and rounds_of(parent) == [parent]
    parent.config_file.unlink()
    assert rounds_of(third) == [second, third]
    second.config_file.write_text(yaml.safe_dump({"model": "tiny", **round_after(third)}))
    assert rounds_of(third) == [second, third]


def test_the_newest_reward_model_of_a_chain(parent, tmp_path):
    second = fork(tmp_path / "second", **round_after(parent))
    assert newest_reward_model(second) == ""  # no step of the parent is finished
    parent.step(REWARD).result_file.write_text("{}")
    assert newest_reward_model(second) == model(parent, REWARD)
    given = fork(tmp_path / "given", **round_after(parent), trained_reward_model="org/reward")
    assert newest_reward_model(given) == "org/reward"
