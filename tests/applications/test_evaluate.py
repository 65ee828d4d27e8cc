"""`rlhf-chat eval` before it starts anything, and its tables."""

import json

import pytest

from applications.evaluate import JUDGES, evaluate, file_name, known
from applications.report_table import evaluation_table
from inference.errors import UserError
from inference.preferences import PreferenceFile
from tests.pages import command_named
from tests.training.evaluation.preferences import preference
from training.config import RunConfig
from training.evaluation.preferences import win_rates
from training.run_directory import RunDirectory

MEASURES = {"kl": 0.0, "length": 5.0}


def test_files_are_named_by_what_was_asked():
    assert file_name("sft", "base", "", 0, None) == "sft-against-base"
    assert file_name("", "", "learned", 50, 3) == "model-by-learned-50-prompts-seed-3"
    assert file_name("runs/../other", "org/model", "", 0, None) == "runs_.._other-against-org_model"


@pytest.mark.parametrize("judge", ["true", "learned", "reward", "people"])
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


def test_any_pair_has_its_names_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
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
    text = " ".join(evaluation_table(result, answers).split())
    assert "KL to base model (nats a reply) │ 0.00 │ 1.50" in text and "other [RLHF]" in text
    assert (
        "The judge: 75.0% of 8 held-out pairs ranked right (95 % interval 40.9% to 92.9%; up to 8 tokens 75.0% of 8)"
        in text
    )
    assert "No win rate" in text and "│ Hi? │ No. │ Yes! │" in text


def test_a_judge_that_is_none_is_told_what_can_be_one(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_config(RunConfig(model="tiny"), {})
    with pytest.raises(
        UserError, match="no judge 'upbeat': --judge takes true, learned, reward, people, or a reward model"
    ):
        evaluate(tmp_path, "", "", "upbeat", 0, None, False)


# By preferences


@pytest.fixture
def preferred(tmp_path) -> RunDirectory:
    """A run of settings and preferences alone: 8 of 10 for RLHF by ann, and some on other pairs."""
    run = RunDirectory(tmp_path / "demo")
    run.write_config(RunConfig(model="tiny"), {})
    found = [preference("ann", "other" if i < 8 else "one", f"question {i}") for i in range(10)]
    found += [
        preference("ben", "both bad", "question 0"),
        preference("ann", "one", one=("demo/rlhf", "a"), other=("demo/rlhf", "b")),
    ]
    found += [preference("ann", "one", one=("demo/base", "a"), other=("old/rlhf", "b"))]
    for each in found:
        PreferenceFile(run.preferences).add(each)
    return run


def by_people(run, model="", against="", **given) -> dict:
    evaluate(run.path, model, against, given.get("judge", "people"), given.get("prompts", 0), given.get("seed"), False)
    return json.loads((run.path / "evaluations" / f"{file_name(model, against, 'people', 0, None)}.json").read_text())


@pytest.mark.parametrize("judge", ["people", "clicks"])
def test_preferences_are_counted_without_a_model(judge, preferred, capsys):
    result = by_people(preferred, judge=judge)
    assert [(each["model"], each["against"]) for each in result["pairs"]] == [
        ("demo/rlhf", "demo/sft"),
        ("demo/base", "old/rlhf"),
    ]
    assert result["pairs"][0]["by"]["ann"]["rate"] == 0.8 and result["pairs"][0]["together"]["preferences"] == 11
    assert result["preferences"] == 13 and result["agreement"][0]["people"] == ["ann", "ben"]
    text = " ".join(capsys.readouterr().out.split())
    assert "│ ann │ 10 │ 0 │ 0 │ 80.0% (" in text and "│ ben │ 1 │ 0 │ 1 │ 50.0% (" in text
    assert "demo/rlhf wins against demo/sft in 77.3% of prompts by 11 preferences of 2 people" in text
    assert "ann and ben say the same of 0.0%" in text


@pytest.mark.parametrize(
    ("model", "against", "pair"),
    [
        ("sft", "", ("demo/sft", "demo/rlhf")),
        ("", "rlhf", ("demo/sft", "demo/rlhf")),
        ("rlhf", "sft", ("demo/rlhf", "demo/sft")),
        ("old/rlhf", "", ("old/rlhf", "demo/base")),
        ("base", "", ("demo/base", "old/rlhf")),
    ],
)
def test_preferences_of_the_models_that_are_named(preferred, model, against, pair):
    (rates,) = by_people(preferred, model, against)["pairs"]
    assert (rates["model"], rates["against"]) == pair


def test_without_preferences_there_is_a_sentence(preferred, tmp_path, capsys):
    with pytest.raises(
        UserError, match=r"Nobody has judged demo/sft against demo/base in .* demo/rlhf against demo/sft"
    ):
        by_people(preferred, "sft", "base")
    with pytest.raises(UserError, match="leave --prompts, --seed and --eval-data out"):
        by_people(preferred, seed=1)
    run = RunDirectory(tmp_path / "new")
    run.write_config(RunConfig(model="tiny"), {})
    with pytest.raises(UserError, match="has no preferences yet: rlhf-chat prefer"):
        by_people(run)
    PreferenceFile(run.preferences).add(preference("ann", "one", one=("new/rlhf", "a"), other=("new/rlhf", "b")))
    assert by_people(run)["pairs"] == []
    assert "All preferences are between two answers of one model" in " ".join(capsys.readouterr().out.split())


def test_the_table_of_an_evaluation_has_what_people_preferred(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    answers = tmp_path / "a.jsonl"
    answers.write_text("")
    rates = win_rates([preference("ann", "other"), preference("ben", "other")], "demo/rlhf", "demo/sft")
    result = {"prompts": 1, "sampling": {"temperature": 0.7, "max_tokens": 12}, "sft": MEASURES, "rlhf": MEASURES}
    text = " ".join(evaluation_table({**result, "preferences": rates}, answers).split())
    early = {"clicks" if key == "preferences" else key: value for key, value in rates["together"].items()}
    early_rates = {**rates, "together": early, "by": dict.fromkeys(("ann", "ben"), early)}
    assert "prompts by 2 preferences of" in evaluation_table({**result, "clicks": early_rates}, answers)
    assert "demo/rlhf wins against demo/sft in 100.0% of prompts by 2 preferences of 2 people" in text
    assert "ann and ben say the same of 100.0%" in text and "│ ben │" in text
