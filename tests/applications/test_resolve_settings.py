"""Options -> settings: which of them wins, and what is refused."""

from pathlib import Path

import pytest

from applications.settings import given_of, resolve_settings
from inference.errors import UserError
from training.config_files import load_config
from training.run_directory import RunDirectory

TINY = {"model": "tiny", "config": None, "overrides": None, "flags": {}}


def resolve(**given):
    return resolve_settings(**{**TINY, **given})


def write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def test_preset_then_file_then_set_then_flags(tmp_path):
    """Each level sets `processes` and one thing of its own, which the next ones leave alone."""
    file = write(tmp_path / "mine.yaml", "processes: 2\nsft: {epochs: 7}\n")
    by_preset = resolve()
    assert (by_preset.processes, by_preset.sft.epochs, by_preset.seed) == (1, 1, 1)
    assert by_preset.sft.max_steps == 6  # the preset's, not the default's 0
    by_file = resolve(config=[file])
    assert (by_file.processes, by_file.sft.epochs, by_file.seed) == (2, 7, 1)
    by_set = resolve(config=[file], overrides=["processes=4", "seed=5"])
    assert (by_set.processes, by_set.sft.epochs, by_set.seed) == (4, 7, 5)
    by_flag = resolve(config=[file], overrides=["processes=4", "seed=5"], flags={"processes": 8, "data": None})
    assert (by_flag.processes, by_flag.sft.epochs, by_flag.seed) == (8, 7, 5)
    assert by_flag.sft.max_steps == 6 and by_flag.sft.batch_size == 16  # a group is merged, not replaced


def test_what_was_not_typed_and_what_is_no_setting_is_not_given():
    flags = {"data": [], "eval_data": None, "seed": 0, "plan": "auto", "fusion": "auto"}
    assert given_of(flags) == {"seed": 0, "fusion": "auto"}


def test_the_later_file_and_the_later_set_win(tmp_path):
    first = write(tmp_path / "first.yaml", "seed: 3\nsft: {epochs: 2}\n")
    second = write(tmp_path / "second.yaml", "seed: 4\n")
    settings = resolve(config=[first, second])
    assert (settings.seed, settings.sft.epochs) == (4, 2)
    assert resolve(overrides=["seed=6", "seed=8"]).seed == 8


def test_a_file_may_name_the_model(tmp_path):
    file = write(tmp_path / "mine.yaml", "model: tiny\n")
    settings = resolve(model=None, config=[file])
    assert settings.model == "tiny" and settings.sft.max_steps == 0  # no preset: the model's name alone


@pytest.mark.parametrize("given", [{"flags": {"data": "rows.jsonl"}}, {"overrides": ["data.source=rows.jsonl"]}])
def test_a_relative_data_path_becomes_absolute(tmp_path, monkeypatch, given):
    """The stages may run in other directories."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", "")
    assert resolve(**given).data.source == str(tmp_path.resolve() / "rows.jsonl")


def test_a_data_directory_and_a_path_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows").mkdir()
    for given in ("rows", "./rows/", "~/rows"):
        assert resolve(flags={"data": given}).data.source == str(tmp_path.resolve() / "rows")


def test_data_that_is_not_there_keeps_the_name_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve(flags={"data": "missing.jsonl"}).data.source == "missing.jsonl"


@pytest.mark.parametrize("name", ["my rows #2.jsonl", "2024", "a: b.jsonl", "yes", "1e5"])
def test_a_file_name_is_taken_as_it_is(tmp_path, monkeypatch, name):
    """YAML would read a comment, a number, a mapping, a truth."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name, "")
    assert resolve(flags={"data": name}).data.source == str(tmp_path.resolve() / name)


def test_what_holds_for_the_embedded_data_alone_ends_with_it(tmp_path):
    """The rule behind the embedded pairs is known; a user's own pairs have none."""
    rows = str(write(tmp_path / "rows.jsonl", ""))
    embedded = resolve()
    assert embedded.data.source == "chitchat" and embedded.evaluation.true_score == "upbeat" and embedded.announce
    own = resolve(flags={"data": rows})
    assert own.evaluation.true_score == "none" and own.announce == ""
    assert own.evaluation.prompts == 8  # the rest of the group stays
    assert resolve(overrides=[f"data.source={rows}"]).evaluation == own.evaluation
    file = write(tmp_path / "mine.yaml", "evaluation: {true_score: upbeat}\n")
    assert resolve(flags={"data": rows}, config=[file]).evaluation.true_score == "upbeat"
    assert resolve(flags={"data": rows}, overrides=["evaluation.true_score=upbeat"]).evaluation.true_score == "upbeat"


def test_reward_model_by_flag():
    assert resolve(flags={"reward_model": "some/where"}).reward_model == "some/where"


def test_values_of_set_are_numbers_truths_lists_and_texts():
    rate = "rlhf.actor.learning_rate=1e-5"  # a string to YAML
    targets = "rlhf.actor.lora.targets=[q_proj, v_proj]"
    settings = resolve(overrides=[rate, targets, "rlhf.whiten_advantages=false", "data.split=[1,1,2]", "announce="])
    assert settings.rlhf.actor.learning_rate == 1e-5 and settings.rlhf.actor.lora.targets == ["q_proj", "v_proj"]
    assert settings.rlhf.whiten_advantages is False and settings.data.split == (1, 1, 2) and settings.announce == ""


def test_a_key_that_does_not_exist_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"no setting 'sft\.epoch': did you mean 'sft\.epochs'"):
        resolve(overrides=["sft.epoch=3"])
    file = write(tmp_path / "mine.yaml", "rlhf: {kl: {targets: 3}}\n")
    with pytest.raises(UserError, match=r"no setting 'rlhf\.kl\.targets': did you mean 'rlhf\.kl\.target'"):
        resolve(config=[file])


def test_set_without_a_value_is_refused():
    with pytest.raises(UserError, match=r"--set takes key=value, not 'seed'"):
        resolve(overrides=["seed"])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"overrides": ["seed=3"]}, "--set"),
        ({"flags": {"seed": 3}}, "--seed"),
        ({"flags": {"reward_model": "tiny"}, "overrides": ["seed=3"]}, "--set, --reward-model"),
        ({"flags": {"trained_reward_model": "tiny"}}, "--reward-model"),
    ],
)
def test_settings_without_a_model_are_refused(given, named):
    with pytest.raises(UserError, match=f"{named} needs --model or --config"):
        resolve(model=None, **given)


def test_settings_are_laid_over_those_of_a_run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.write_config(resolve(overrides=["sft.epochs=5"]), {})
    settings = resolve(model=None, overrides=["rlhf.micro_batch_tokens=64"], flags={"processes": 2}, run=run)
    assert (settings.sft.epochs, settings.rlhf.micro_batch_tokens, settings.processes) == (5, 64, 2)


def test_nothing_given_leaves_a_run_its_own_settings():
    assert resolve(model=None) is None
    assert resolve(model=None, config=[], overrides=[], flags={"data": None, "seed": None}) is None


def test_several_sources_keep_their_weights_and_revisions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.csv"):
        write(tmp_path / name, "")
    here = str(tmp_path.resolve())
    given = ["a.jsonl", "b.csv=2", "Dahoas/rm-static@main=0.5"]
    expected = [f"{here}/a.jsonl", f"{here}/b.csv=2", "Dahoas/rm-static@main=0.5"]
    assert resolve(flags={"data": given}).data.source == expected
    assert resolve(overrides=["data.source=[a.jsonl, b.csv=2, Dahoas/rm-static@main=0.5]"]).data.source == expected
    assert resolve(flags={"data": ["a.jsonl"]}).data.source == f"{here}/a.jsonl"


def test_the_embedded_data_cannot_be_blended():
    with pytest.raises(
        UserError, match=r"data\.source .--data.: 'chitchat' has a split of its own and cannot be blended"
    ):
        resolve(flags={"data": ["chitchat", "a.jsonl"]})


def test_files_of_step_3_are_found_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "rows.jsonl").write_text("")
    settings = resolve(overrides=["rlhf.reward_function=mine.py:score", "rlhf.ptx.source=rows.jsonl"])
    assert settings.rlhf.reward_function == f"{tmp_path}/mine.py:score"
    assert settings.rlhf.ptx.source == f"{tmp_path}/rows.jsonl"


def make_models(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)


@pytest.mark.parametrize("given", ["m", "./m", "m/", "~/m", "../home/m", "{home}/m"])
def test_models_are_kept_with_absolute_paths(tmp_path, monkeypatch, given):
    """From an option, a file and --set; a run then goes on from any directory."""
    home = tmp_path.resolve() / "home"
    make_models(home, "m", "elsewhere")
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    given, expected = given.format(home=home), str(home / "m")
    assert resolve(model=given).model == expected
    file = write(home / "mine.yaml", f"model: {given}\nsft_model: {given}\n")
    by_file = resolve(model=None, config=[file])
    assert (by_file.model, by_file.sft_model) == (expected, expected)
    names = ["reward_model", "sft_model", "trained_reward_model"]
    by_flags, by_set = (
        resolve(flags=dict.fromkeys(names, given)),
        resolve(overrides=[f"{name}={given}" for name in ["model", *names]]),
    )
    for settings in (by_flags, by_set):
        assert [getattr(settings, name) for name in names] == [expected] * 3
    assert by_set.model == expected


def test_names_that_are_no_paths_stay_as_they_are(tmp_path, monkeypatch):
    make_models(tmp_path, "tiny", "smollm2-135m", "package:mine")
    monkeypatch.chdir(tmp_path)
    assert resolve(model="tiny").model == "tiny"  # a preset, as before the directory was there
    assert resolve(model="./tiny").model == str(tmp_path.resolve() / "tiny")
    assert resolve(model="smollm2-135m").model != str(tmp_path.resolve() / "smollm2-135m")
    assert resolve(overrides=["model=package:mine"]).model == "package:mine"
    assert resolve(flags={"reward_model": "owner/name"}).reward_model == "owner/name"


def test_what_is_laid_over_a_run_is_absolute_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_models(tmp_path, "m", "s")
    write(tmp_path / "rows.jsonl", "")
    run = RunDirectory(tmp_path / "run")
    run.write_config(resolve(), {})
    given = {"overrides": ["data.source=rows.jsonl", "reward_model=m"], "flags": {"sft_model": "./s"}}
    settings = resolve(model=None, run=run, **given)
    here = str(tmp_path.resolve())
    assert settings.data.source == f"{here}/rows.jsonl"
    assert (settings.reward_model, settings.sft_model) == (f"{here}/m", f"{here}/s")


def test_a_run_that_kept_a_relative_path_goes_on_where_it_began(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_models(tmp_path, "m")
    run = RunDirectory(tmp_path / "run")
    run.write_config(load_config([], ["model=m"]), {})
    assert "model: m\n" in run.config_file.read_text()
    assert run.read_config() == resolve(model="./m", run=run)
    monkeypatch.chdir(tmp_path.parent)
    assert run.read_config().model == "m"
