"""`rlhf-chat settings`: what it says of settings, alone and in groups, and whose values it shows."""

import json

import pytest

from applications.settings import settings_command, settings_named
from inference.errors import UserError
from training.config_reference import defaults
from training.run_directory import RunDirectory


def shown(capsys, *keys: str, source: str | None = None) -> list[dict]:
    settings_command(list(keys), source, as_json=True)
    return json.loads(capsys.readouterr().out)


def test_a_setting_with_default_value_unit_and_meaning(capsys):
    (setting,) = shown(capsys, "rlhf.iterations", source="tiny")
    meaning = "PPO rounds: each generates new samples and trains on them."
    kind = "whole number, at least 1"
    assert setting == {
        "key": "rlhf.iterations", "value": 3, "default": 100, "type": kind, "unit": "iterations", "meaning": meaning,
    }  # fmt: skip
    settings_command(["rlhf.iterations"], "tiny", as_json=False)
    assert capsys.readouterr().out == f"rlhf.iterations  3  (default 100; iterations; {kind})\n    {meaning}\n"
    settings_command(["model", "rlhf.iterations"], None, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "model  required  (text)" and lines[2] == f"rlhf.iterations  default 100  (iterations; {kind})"


def test_a_group_and_all(capsys):
    keys = [setting["key"] for setting in shown(capsys, "rlhf.kl", "sft.epochs")]
    assert keys[0] == "sft.epochs" and len(keys) > 5 and all(key.startswith("rlhf.kl.") for key in keys[1:])
    assert {setting["key"] for setting in shown(capsys)} == set(defaults())


def test_values_of_a_run_and_of_a_file(capsys, tmp_path):
    settings = settings_named("tiny", {"sft.epochs": 7, "rlhf": {"kl.target": 2}})
    RunDirectory(tmp_path / "run").write_config(settings, {"rlhf-chat": "0"})
    (tmp_path / "mine.yaml").write_text("model: tiny\nsft.epochs: 9\n")
    for source, value in ((tmp_path / "run", 7), (tmp_path / "mine.yaml", 9)):
        (setting,) = shown(capsys, "sft.epochs", source=str(source))
        assert (setting["value"], setting["default"]) == (value, 1)


def test_the_optimizer_block_shows_what_all_its_roles_have(capsys, tmp_path):
    settings = settings_named("tiny", {"optimizer.warmup": 0.25, "rlhf.critic.zero_stage": 1})
    RunDirectory(tmp_path / "run").write_config(settings, {"rlhf-chat": "0"})
    values = {setting["key"]: setting["value"] for setting in shown(capsys, "optimizer", source=str(tmp_path / "run"))}
    assert (values["optimizer.warmup"], values["optimizer.zero_stage"]) == (0.25, "by role")


@pytest.mark.parametrize(
    ("key", "says"),
    [("rlhf.kl.coef", "did you mean 'rlhf.kl.coefficient'?"), ("xyzzy", "rlhf-chat settings lists all.")],
)
def test_a_key_that_does_not_exist(key, says):
    with pytest.raises(UserError) as refused:
        settings_command([key], None, as_json=False)
    assert str(refused.value) == f"There is no setting '{key}': {says}"


def test_a_run_that_is_not_there_is_no_model_of_the_hub(tmp_path):
    with pytest.raises(UserError, match="neither a run nor a file"):
        settings_named(str(tmp_path / "run"))
