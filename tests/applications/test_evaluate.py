"""`rlhf-chat eval` before it starts anything, and its tables."""

import json

import pytest

from applications.evaluate import JUDGES, evaluate, file_name, known
from applications.report_table import evaluation_table
from inference.errors import UserError
from tests.pages import command_named
from training.config import RunConfig
from training.run_directory import RunDirectory

MEASURES = {"kl": 0.0, "length": 5.0}


def test_files_are_named_by_what_was_asked():
    assert file_name("sft", "base", "", 0, None) == "sft-against-base"
    assert file_name("", "", "learned", 50, 3) == "model-by-learned-50-prompts-seed-3"
    assert file_name("runs/../other", "org/model", "", 0, None) == "runs_.._other-against-org_model"


@pytest.mark.parametrize("judge", ["true", "learned", "reward"])
def test_who_can_judge_is_what_the_help_says(judge):
    assert known(judge, JUDGES) == judge
    said = next(option.help for option in command_named("eval").params if option.name == "judge")
    assert f"{judge} (" in said


def test_words_stay_presets_become_models_and_the_rest_is_refused(tmp_path):
    assert [known(word) for word in ("sft", "rlhf", "base", "", str(tmp_path))] == [
        "sft",
        "rlhf",
        "base",
        "",
        str(tmp_path),
    ]
    assert known("opt-125m") == "facebook/opt-125m"
    with pytest.raises(UserError, match="Of the run itself: base, sft, rlhf, dpo"):
        known("sfft")


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        evaluate(tmp_path, "", "", "", 0, None, False)


def test_any_pair_has_its_names_in_the_table(tmp_path):
    answers = tmp_path / "a.jsonl"
    row = {"prompt": [{"role": "user", "content": "Hi?"}], "base": "No.", "model": "Yes!"}
    answers.write_text(json.dumps(row) + "\n")
    group = {"pairs": 8, "rate": 0.75, "low": 0.409, "high": 0.929}
    result = {
        "prompts": 1,
        "sampling": {"temperature": 0.7, "max_tokens": 12},
        "pair": {"base": "base model", "model": "other [RLHF]"},
        "base": MEASURES,
        "model": {"kl": 1.5, "length": 6.0},
        "judge_accuracy": {"all": group, "up_to_8_tokens": group},
    }
    text = " ".join(evaluation_table(result, answers, width=120).split())
    assert "KL to base model (nats a reply) │ 0.00 │ 1.50" in text and "other [RLHF]" in text
    assert (
        "The judge: 75.0% of 8 held-out pairs ranked right (95 % interval 40.9% to 92.9%; up to 8 tokens 75.0% of 8)"
        in text
    )
    assert "No win rate" in text and "│ Hi? │ No. │ Yes! │" in text


def test_a_judge_that_is_none_is_told_what_can_be_one(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_config(RunConfig(model="tiny"), {})
    with pytest.raises(UserError, match="no judge 'upbeat': --judge takes true, learned, reward, or a reward model"):
        evaluate(tmp_path, "", "", "upbeat", 0, None, False)
