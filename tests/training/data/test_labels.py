"""Answers with a label each that keep it, for DPO with an unpaired loss (`dpo.loss=kto`)."""

import json
from dataclasses import replace

import pytest

from inference.errors import UserError
from tests.training.evaluation.preferences import preference
from training.config import RunConfig
from training.data.lint import Lines, lint
from training.data.prepare import prepare_data
from training.data.reading import read_sources
from training.data.rows import read_rows
from training.data.split import kind_of, split_rows
from training.data_settings import DataSettings


def settings(path, *rows, **given) -> DataSettings:
    """Those of a run whose loss is unpaired."""
    file = path / "rows.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return RunConfig(model="m", method="dpo", dpo={"loss": "kto"}, data={"source": str(file), **given}).data


def labelled(prompt, answer, label):
    return {"prompt": prompt, "completion": answer, "label": label}


def read(path, *rows):
    (found,) = read_sources(settings(path, *rows), lambda line: None)
    return found


def told(rows):
    return [(row["prompt"][-1]["content"], row["response"], row.get("label")) for row in rows]


def test_each_answer_is_a_row_of_its_own(tmp_path):
    found = read(
        tmp_path,
        labelled("p", "good", "thumbs up"),
        labelled("p", "bad", 0),
        labelled("alone", "bad", False),
        {"prompt": "q", "response": "r"},
        {"prompt": "q", "chosen": "c", "rejected": "r"},
    )
    assert told(found.rows[:4]) == [("p", "good", True), ("p", "bad", False), ("alone", "bad", False), ("q", "r", None)]
    assert [kind_of(row) for row in found.rows] == ["good", "bad", "bad", "sft", "pair"]
    assert found.left_out == [] and "2 bad answers, 1 good answer," in found.describe()


def test_of_a_conversation_the_label_is_about_the_last_answer(tmp_path):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": text} for role, text in turns]
    found = read(tmp_path, {"messages": messages, "label": True}, {"messages": messages, "label": False})
    assert told(found.rows) == [("a", "b", None), ("c", "d", True), ("c", "d", False)]
    assert set(found.formats) == {"unpaired preference, messages"}


def test_both_answers_of_a_preference_may_be_bad_until_the_same_person_says_otherwise(tmp_path):
    asked = [preference("ann", "both bad", "How?"), preference("ben", "both bad", "Why?"), preference("ann", "tie")]
    found = read(tmp_path, *(each.line for each in asked))
    assert len(found.rows) == 4 and {kind_of(row) for row in found.rows} == {"bad"}
    assert dict(found.reasons) == {"both answers are about the same": 1}
    later = replace(asked[0], winner="a", time="2099-01-31T12:00:00.000Z")
    found = read(tmp_path, *(each.line for each in (*asked, later)))
    assert sorted(kind_of(row) for row in found.rows) == ["bad", "bad", "pair"]
    assert found.reasons["the same person has judged these answers again"] == 2


def test_paired_losses_and_other_methods_make_pairs(tmp_path):
    file = settings(tmp_path, labelled("p", "good", 1), labelled("p", "bad", 0)).source
    for given in ({"method": "dpo"}, {"method": "ppo", "dpo": {"loss": "kto"}}):
        (found,) = read_sources(RunConfig(model="m", data={"source": file}, **given).data, lambda line: None)
        assert [kind_of(row) for row in found.rows] == ["pair"]


def test_step_1_learns_good_answers_alone_and_no_bad_one_is_lost():
    rows = [
        {"prompt": [{"role": "user", "content": f"{kind} {n}"}], "response": f"{n}", "label": kind == "good"}
        for kind in ("good", "bad")
        for n in range(20)
    ]
    sets = split_rows(rows, (1, 1, 0), 0.1, seed=1)
    assert all("good" in row["prompt"][0]["content"] for row in sets.sft_train) and len(sets.sft_train) == 9
    kinds = [kind_of(row) for row in sets.pairs_train]
    assert (kinds.count("good"), kinds.count("bad"), len(sets.pairs_eval)) == (9, 18, 4)


def test_a_run_has_them_in_the_file_of_pairs(tmp_path, word_format):
    rows = [labelled(f"q{n}", "yes" if n % 2 else "no", n % 2) for n in range(40)]
    prepare_data(settings(tmp_path, *rows, rows[0]), 1, tmp_path / "data", word_format, lambda line: None)
    train, held_out = (read_rows(tmp_path / "data" / f"pairs_{part}.jsonl") for part in ("train", "eval"))
    assert {(row["response"], row["label"]) for row in train + held_out} == {("yes", True), ("no", False)}


@pytest.mark.parametrize(("label", "name"), [(True, "good"), (False, "bad")])
def test_labels_of_one_kind_are_refused(tmp_path, word_format, label, name):
    rows = [labelled(f"q{n}", "r", label) for n in range(9)]
    with pytest.raises(UserError, match=rf"answers .* are labelled as {name}, so .* or pairs\.$"):
        prepare_data(settings(tmp_path, *rows), 1, tmp_path / "data", word_format, print)
    rows.append({"prompt": "p", "chosen": "c", "rejected": "r"})
    prepare_data(settings(tmp_path, *rows, split=(0, 1, 0)), 1, tmp_path / "data", word_format, lambda line: None)


def test_lint_finds_both_labels_on_one_answer_and_one_label_on_all(tmp_path):
    def found(*rows):
        read_ = read(tmp_path, *rows)
        findings = lint(Lines(read_.rows, read_.locations), None, DataSettings())
        return {(each.level, each.check): each.count for each in findings}

    both = labelled("p", "r", True), labelled("p", "r", False), labelled("p", "s", False)
    assert found(*both) == {("warning", "contradictions"): 2}
    assert found(both[1], both[2]) == {("error", "one label"): 2}
    assert found(both[1], both[1], both[0]) == {("warning", "contradictions"): 3, ("warning", "duplicates"): 1}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"undesirable_weight": 2}, "loss=sigmoid reads no undesirable_weight"),
        ({"loss": "kto", "label_smoothing": 0.1}, "loss=kto reads no label_smoothing"),
        ({"loss": "kto", "by_prompt": True}, "loss=kto has answers, not pairs of a prompt"),
        ({"loss": "kto", "sft_coefficient": 0.1}, "loss=kto has no chosen response for sft_coefficient"),
        ({"loss": "kto", "batch_size": 1}, "batch_size=1 leaves loss=kto no other answer"),
    ],
)
def test_settings_that_say_nothing_to_the_loss_are_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        RunConfig(model="m", dpo=given)
