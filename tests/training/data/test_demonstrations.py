"""Where the demonstrations of PPO-ptx come from."""

import json

import pytest

from inference.errors import UserError
from training.config import RunConfig
from training.data.prepare import demonstrations, store_demonstrations


def config(**ptx) -> RunConfig:
    return RunConfig(model="m", data={"limit": 1}, rlhf={"ptx": ptx})


def test_they_are_those_of_step_1_unless_a_file_is_named(tmp_path):
    row = {"prompt": [{"role": "user", "content": "a"}], "response": "b"}
    (tmp_path / "sft_train.jsonl").write_text(json.dumps(row) + "\n")
    assert demonstrations(config(), tmp_path) == [row]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": p, "response": "d"}) + "\n" for p in "xy") + '{"prompt": "z"}\n')
    found = demonstrations(config(source=str(other)), tmp_path)
    assert [row["prompt"][0]["content"] for row in found] == ["x", "y"]  # data.limit is for data.source


@pytest.mark.parametrize("named", [True, False])
def test_without_any_there_is_a_sentence(tmp_path, named):
    (tmp_path / "sft_train.jsonl").write_text("")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "z"}\n')
    source = str(tmp_path / "prompts.jsonl") if named else ""
    with pytest.raises(UserError, match=r"rlhf\.ptx needs rows with a prompt and a response"):
        demonstrations(config(source=source), tmp_path)


def test_questions_that_the_run_holds_out_are_not_trained_on(tmp_path):
    (tmp_path / "prompts_eval.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "What is tea?"}]}))
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": p, "response": "d"}) + "\n" for p in ("what is  tea", "x")))
    found = demonstrations(config(source=str(other)), tmp_path)
    assert [row["prompt"][0]["content"] for row in found] == ["x"]


def test_those_of_another_file_are_kept_with_the_run(tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "x", "response": "d"}')
    (data := tmp_path / "data").mkdir()
    store_demonstrations(config(source=str(other)), data, None)
    other.unlink()
    assert [row["prompt"][0]["content"] for row in demonstrations(config(source=str(other)), data)] == ["x"]
