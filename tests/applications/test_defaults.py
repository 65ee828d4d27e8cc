"""A default is a default: that of docs/configuration.md holds after any other setting was set, wherever it was set."""

from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

from applications.preset_store import load_preset, preset_names
from applications.settings import resolve_settings
from training.config_reference import defaults, groups, settings_of
from training.plan import from_blocks, to_blocks
from training.run_directory import RunDirectory

MODEL = "someone/their-model"  # no preset
ANNOTATIONS = {
    f"{prefix}.{name}".lstrip("."): info.annotation
    for group in groups()
    for prefix in group.prefixes
    if prefix.partition(".")[0] != "optimizer"  # which is there to change others (test_config.py)
    for name, info in settings_of(group.model)
    if not info.is_required()
}
PLAN = to_blocks(from_blocks({"actor_generate": {"mesh": "0-1", "data": 2}}))
ALLOWED_VALUE = {
    "rlhf.generation_batch": 8,
    "rlhf.reward_function": "a.py:f",
    "rlhf.reward_url": "http://localhost/score",
    "rlhf.plan": PLAN,
}
ALLOWED_VALUE |= {"rlhf.advantage": "reinforce++", "rlhf.reward_normalization": "none", "dpo.loss": "ipo"}
ALONE_REFUSED = {key for key in ANNOTATIONS if key.endswith((".offload", ".keep", ".undesirable_weight"))}
"""They need a ZeRO stage, evaluations or an unpaired loss beside them."""


def own_defaults() -> dict[str, Any]:
    return {key: value for key, value in defaults().items() if not key.startswith("optimizer.")}


def another(key: str) -> Any:
    """A value that the setting has not by default; its default where another one is refused alone."""
    value, annotation = own_defaults()[key], ANNOTATIONS[key]
    if key in ALONE_REFUSED:
        return value
    if get_origin(annotation) is Literal:
        return next(option for option in reversed(get_args(annotation)) if option != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return (value or 1.0) / 4
    if isinstance(value, tuple):
        return tuple(part / 2 for part in value)
    return ALLOWED_VALUE.get(key, {"some": {}} if isinstance(value, dict) else "other")


def in_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True)


def written_defaults() -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in own_defaults().items()}


def by_set(key, value, folder):
    return resolve_settings(MODEL, None, [f"{key}={in_yaml(value)}"], {})


def by_file(key, value, folder):
    """Over another file that sets it too."""
    (folder / "below.yaml").write_text(in_yaml({"model": MODEL, key: own_defaults()[key]}))
    (folder / "above.yaml").write_text(in_yaml({"extends": "below", key: value}))
    return resolve_settings(None, [folder / "above.yaml"], None, {})


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        result |= {key: value} if key in ANNOTATIONS or key == "model" else flat(value, f"{key}.")
    return result


@pytest.mark.parametrize("source", [by_set, by_file])
def test_no_setting_changes_another_one(source, tmp_path):
    assert ANNOTATIONS.keys() == own_defaults().keys() - {"model"}
    for key in ANNOTATIONS:
        value = another(key)
        found = flat(source(key, value, tmp_path).model_dump())
        assert found == {**own_defaults(), "model": MODEL, key: value}, f"after {key} was set to {value!r}"


@pytest.mark.parametrize("name", preset_names())
def test_what_a_preset_does_not_say_is_the_documented_default(name):
    said = flat(load_preset(name))
    assert flat(resolve_settings(name, None, None, {}).model_dump(mode="json")) == {**written_defaults(), **said}


def test_a_setting_changes_no_other_one_of_a_preset():
    preset = flat(resolve_settings("opt-1.3b", None, None, {}).model_dump())
    for key in ANNOTATIONS.keys() - {"data.source"}:  # other data end what the preset says of the embedded ones
        found = flat(resolve_settings("opt-1.3b", None, [f"{key}={in_yaml(preset[key])}"], {}).model_dump())
        assert found == preset, f"after {key} was set"


def test_an_empty_group_is_the_default_one():
    for prefix in {prefix for group in groups() for prefix in group.prefixes} - {""}:
        found = flat(resolve_settings(MODEL, None, [f"{prefix}={{}}"], {}).model_dump())
        assert found == {**own_defaults(), "model": MODEL}, prefix


def test_a_run_keeps_the_values_it_was_written_with(tmp_path):
    """Those of a run whose group was once reset by one of its settings."""
    run = RunDirectory(tmp_path)
    config = resolve_settings(MODEL, None, ["rlhf.actor.learning_rate=1e-5", "rlhf.actor.epsilon=1e-8"], {})
    run.write_config(config, {})
    assert run.read_config() == config
    changed = resolve_settings(None, None, ["rlhf.actor.zero_stage=1"], {}, run)
    assert (changed.rlhf.actor.learning_rate, changed.rlhf.actor.epsilon) == (1e-5, 1e-8)
