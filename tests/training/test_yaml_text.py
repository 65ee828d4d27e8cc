"""Settings files as people write them, as in hiyouga/LlamaFactory #4014 and #8505: keys that are there twice, dots."""

import pytest

from applications.preset_store import PRESETS
from inference.errors import UserError
from training import merging
from training.config_files import load_config, read_yaml
from training.merging import load_yaml
from training.plan import from_yaml
from training.planner.hardware import read_profile


def read(tmp_path, text: str, *overrides: str):
    (tmp_path / "mine.yaml").write_text(text)
    return load_config([tmp_path / "mine.yaml"], list(overrides))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: m\nsft:\n  epochs: 7\nsft:\n  batch_size: 8\n", r"'sft' is there twice \(lines 2 and 4\)"),
        ("model: m\nsft:\n  optimizer:\n    warmup: 0\n    warmup: 1\n", r"'warmup' is there twice \(lines 4 and 5\)"),
        ("model: m\nsft: {epochs: 1, 'epochs': 1}\n", r"'epochs' is there twice \(line 2\)"),
        ("model: m\nsft.epochs: 1\nsft: {epochs: 2}\n", "'sft.epochs' is there twice"),
        ("model: m\nsft: {optimizer: {warmup: 0}}\nsft.optimizer.warmup: 1\n", "'sft.optimizer.warmup' is there twice"),
        ("model: m\nsft: 3\nsft.epochs: 2\n", "'sft' is there twice"),
    ],
)
def test_a_key_that_is_there_twice_is_named(tmp_path, text, said):
    with pytest.raises(UserError, match=rf"mine\.yaml is not valid YAML: .*{said}.*: put both together"):
        read(tmp_path, text)


def test_dotted_keys_are_groups_in_files_too(tmp_path):
    config = read(tmp_path, "model: m\nsft.epochs: 3\nsft: {optimizer.warmup: 0.5, batch_size: 8}\nsft.max_steps: 2\n")
    assert (config.sft.epochs, config.sft.batch_size, config.sft.max_steps) == (3, 8, 2)
    assert config.sft.optimizer.warmup == 0.5


def test_keys_that_are_not_ours_keep_their_dots(tmp_path):
    config = read(tmp_path, "model: m\narchitecture: {model: {'layers.0': 3}}\n")
    assert config.architecture == {"model": {"layers.0": 3}}


def test_blocks_that_others_build_on_may_be_laid_over(tmp_path):
    text = "model: m\nsft: {optimizer: &slow {warmup: 0.5, epsilon: 1}}\nreward: {optimizer: {<<: *slow, warmup: 0}}\n"
    config = read(tmp_path, text)
    assert (config.reward.optimizer.warmup, config.reward.optimizer.epsilon) == (0, 1)
    assert config.sft.optimizer.warmup == 0.5


def test_one_override_with_a_key_twice():
    with pytest.raises(UserError, match=r"--set sft=\{.*'epochs' is there twice"):
        load_config([], ["model=m", "sft={epochs: 1, epochs: 2}"])
    assert load_config([], ["model=m", "sft={optimizer.warmup: 1}"]).sft.optimizer.warmup == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("model=", "Setting model: is empty; give a preset, a hub id or a directory"),
        ("model='  '", "Setting model: is empty"),
        ("data.source=", r"Setting data.source .--data.: is empty; give a file"),
        ("data.source=[a.jsonl, '']", r"Setting data.source .--data.: is empty"),
        ("sft=3", r"'sft' is a group of settings, as in sft: \{\.\.\.\} \(got 3\)"),
        ("seed=-1", "Setting seed: must be greater than or equal to 0"),
        ("seed=9223372036854775808", "Setting seed: must be less than 9223372036854775808"),
        ("seed=99999999999999999999", "Setting seed: "),
    ],
)
def test_values_that_are_none(given, said):
    with pytest.raises(UserError, match=said):
        load_config([], ["model=m", given])


@pytest.mark.parametrize("text", ["sft:\n", "reward_model:\n", "sft: {epochs: null}\n"])
def test_a_key_without_a_value_is_named(tmp_path, text):
    with pytest.raises(UserError, match=r"The setting '(sft|reward_model|sft.epochs)' has no value"):
        read(tmp_path, f"model: m\n{text}")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("model: caf\u00e9\n".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_yaml(tmp_path / "latin.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(tmp_path)
    with pytest.raises(UserError, match="line 2: found character"):
        read(tmp_path, "sft:\n\tepochs: 2\n")
    with pytest.raises(UserError, match="which extends it"):
        read(tmp_path, "extends: mine\n")
    with pytest.raises(UserError, match="a block in it contains itself"):
        read(tmp_path, "sft: &a {optimizer: *a}\n")


def test_numbers_are_what_they_look_like():
    assert load_yaml("{a: 010, b: 2:4:4, c: -7, d: 0, e: 1_000, f: 0x10}") == {
        **{"a": "010", "b": "2:4:4", "c": -7, "d": 0, "e": 1000, "f": 16}
    }
    assert load_config([], ["model=m", "seed=010"]).seed == 10
    with pytest.raises(UserError, match=r"data\.split: must be a list, as in \[2, 4, 4\] \(got '2:4:4'\)"):
        load_config([], ["model=m", "data.split=2:4:4"])
    with pytest.raises(UserError, match=r"Setting data\.source .--data.: .*string \(got 123\)"):
        load_config([], ["model=m", "data.source=123"])


def test_plans_and_profiles_are_read_the_same_way(tmp_path):
    block = "generate:\n  mesh: 0\n"
    with pytest.raises(UserError, match=r"'generate' is there twice \(lines 1 and 3\)"):
        from_yaml(block * 2)
    (tmp_path / "profile.yaml").write_text("ranks: 1\nranks: 2\n")
    with pytest.raises(UserError, match="'ranks' is there twice"):
        read_profile(tmp_path / "profile.yaml")


def test_no_preset_has_a_key_twice():
    for file in PRESETS.glob("*.yaml"):
        assert load_yaml(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", ["", "a: 010\nb: [1, 2:4:4, {c: 1e-5, d: yes}]", "a: &x {b: 1}\nc: {<<: *x, b: 2}"])
def test_libyaml_reads_the_same(text, monkeypatch):
    quick = load_yaml(text)
    monkeypatch.setattr(merging, "DEEP", 0)
    assert load_yaml(text) == quick


def test_what_is_very_deep_is_not_read_by_libyaml(monkeypatch):
    monkeypatch.setattr(merging.yaml, "load", lambda text, Loader: Loader)
    assert load_yaml("[" * 9) is merging._Quick
    for text in ("[" * 500 + "{" * 500, "- " * 500):
        assert load_yaml(text) is merging._Loader


@pytest.mark.parametrize("other", ["../private", "/etc/private", "a/b", "[1]", "''"])
def test_a_file_extends_its_neighbours_alone(tmp_path, other):
    (tmp_path / "a.yaml").write_text(f"extends: {other}\n")
    with pytest.raises(UserError, match=r"give the name of a file beside it|There is no configuration file"):
        read_yaml(tmp_path / "a.yaml")
