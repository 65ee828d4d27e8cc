"""What `rlhf.reward_function` names, how it is kept, and what its parts are called."""

import pytest

from training.config_files import load_config, with_absolute_paths
from training.inputs import paths_of
from training.reward_specs import RewardSpec, names_of, specs_of, stored_specs


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("", ""),
        ([], ""),
        ("a.py:f", "a.py:f"),
        (["a.py:f"], "a.py:f"),
        ("length:9=0.5", "length:9=0.5"),
        (["length:9", "a.py:f=2"], ["length:9", "a.py:f=2"]),
    ],
)
def test_a_list_of_one_is_that_one(given, kept):
    assert stored_specs(given) == kept


@pytest.mark.parametrize("text", ["a.py:f", "length:9=0.5", "regex:x=2=1", r"regex:\?$", "json"])
def test_a_spec_is_written_as_it_was_read(text):
    assert str(RewardSpec.of(text)) == text and RewardSpec.of(str(RewardSpec.of(text))) == RewardSpec.of(text)


def test_names_are_apart_and_that_of_a_single_function_is_the_old_one():
    assert names_of(specs_of("x/mine.py:score")) == ["function"]
    assert names_of(specs_of(["regex:a", "x/mine.py:score", "regex:b"])) == ["regex", "function", "regex_2"]
    several = ["x/mine.py:score", "x/mine.py:other", "y/mine.py:score", "json"]
    assert names_of(specs_of(several)) == ["mine.score", "mine.other", "mine.score_2", "json"]


def test_weights_multiply_and_files_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["model=m", "rlhf.reward_function=[mine.py:f=0.5, 'regex:a: b', json=3]", "rlhf.reward_weights.function=2"]
    (tmp_path / "mine.py").touch()
    config = with_absolute_paths(load_config([], given))
    assert config.rlhf.reward_function == [f"{tmp_path}/mine.py:f=0.5", "regex:a: b", "json=3"]
    assert [each.weight for each in config.rlhf.asked_functions] == [1.0, 2.0, 6.0]
    assert paths_of(config)["reward_function"] == [tmp_path / "mine.py"]
    config.rlhf.reward_weights.function = 0
    assert config.rlhf.asked_functions == [] and len(config.rlhf.reward_functions) == 3


def test_a_reward_by_name_needs_no_reward_model():
    config = load_config([], ["model=m", "rlhf.reward_function=length:..40", "rlhf.reward_weights.model=0"])
    assert [step.command for step in config.steps] == ["sft", "rlhf"]


TASK = "data.source=reasoning:chain_sum(size=9)"


@pytest.mark.parametrize(
    ("settings", "function", "model"),
    [
        ([TASK], "reasoning", 0.0),
        (["data.source=[rows.jsonl, reasoning:gcd=2]"], "reasoning", 0.0),
        ([TASK, "rlhf.reward_weights.model=0.5"], "reasoning", 0.5),
        ([TASK, "trained_reward_model=mine"], "reasoning", 1.0),
        ([TASK, "rlhf.reward_function=[reasoning, length:..40=0.1]"], ["reasoning", "length:..40=0.1"], 1.0),
        ([TASK, "rlhf.reward_url=http://127.0.0.1:9"], "", 1.0),
        (["data.source=rows.jsonl"], "", 1.0),
    ],
)
def test_tasks_bring_their_reward_where_nothing_else_is_named(settings, function, model):
    config = load_config([], ["model=m", *settings])
    assert (config.rlhf.reward_function, config.rlhf.reward_weights.model) == (function, model)
    again = load_config([], [], config.model_dump(mode="json"))
    assert again == config
