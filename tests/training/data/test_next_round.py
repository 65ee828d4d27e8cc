"""Rows of a run that goes on from another one."""

import json

import pytest

from inference.errors import UserError
from tests.tiny_runs import messages
from training.data.prepare import prepare_data
from training.data.rows import PANEL_FILE, RowSets, read_rows, write_rows
from training.data_settings import DataSettings

HELD_OUT, TRAINED = [f"held out {i}" for i in range(6)], [f"trained on {i}" for i in range(6)]


@pytest.fixture
def parent(tmp_path):
    """A run whose rows are known."""
    (tmp_path / "parent" / "data").mkdir(parents=True)
    answers = {"chosen": "yes", "rejected": "no"}
    sets = RowSets(
        sft_train=[{"prompt": messages("a lesson"), "response": "yes"}],
        sft_eval=[{"prompt": messages("a test"), "response": "yes"}],
        pairs_eval=[{"prompt": messages("an old pair"), **answers}],
        prompts_train=[{"prompt": messages(text)} for text in TRAINED],
        prompts_eval=[{"prompt": messages(text), "held_out_question": i < 2} for i, text in enumerate(HELD_OUT)],
    )
    for name, rows in sets.items():
        write_rows(tmp_path / "parent" / "data" / f"{name}.jsonl", rows)
    return tmp_path / "parent"


def prepared(parent, questions, word_format, weight="", **settings):
    """The sets of the next round, whose pairs ask these questions, and what was said."""
    file, said = parent.parent / "pairs.jsonl", []
    rows = [{"prompt": text, "chosen": "a good answer", "rejected": "bad"} for text in questions]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (parent.parent / "more.jsonl").write_text(json.dumps({"prompt": "more?", "chosen": "a", "rejected": "b"}))
    source = [f"{file}={weight}", str(parent.parent / "more.jsonl")] if weight else str(file)
    asked = DataSettings(source=source, parent=str(parent), **settings)
    prepare_data(asked, 1, parent.parent / "data", word_format, said.append)
    return {f.stem: read_rows(f) for f in (parent.parent / "data").glob("*_*.jsonl")}, "\n".join(said)


def asks(rows):
    return [row["prompt"][-1]["content"] for row in rows]


def test_all_pairs_serve_steps_2_and_3_beside_the_prompts_of_before(parent, word_format):
    sets, said = prepared(parent, [f"new {i}" for i in range(40)] + TRAINED[:1], word_format, held_out=0.1)
    assert len(sets["pairs_train"]) == 37 and len(sets["pairs_eval"]) == 4
    theirs = set(TRAINED) - set(asks(sets["pairs_eval"]))
    assert sorted(asks(sets["prompts_train"])) == sorted({*asks(sets["pairs_train"]), *theirs})
    assert [row["response"] for row in sets["sft_train"]] == ["yes"] and f"are those of {parent}" in said
    assert "shared out" not in said and "too few" not in said
    for name in ("sft_train.jsonl", "sft_eval.jsonl"):  # so that step 1 of a fork is its parent's
        assert (parent.parent / "data" / name).read_bytes() == (parent / "data" / name).read_bytes()


def test_what_was_held_out_stays_held_out_in_its_order(parent, word_format):
    sets, said = prepared(parent, ["new?", "newer?", "Held out 3", "an old pair", "a test"], word_format)
    assert sets["prompts_eval"] == read_rows(parent / "data" / "prompts_eval.jsonl")
    assert asks(sets["sft_eval"]) == ["a test"]
    assert sorted(asks(sets["pairs_eval"])) == ["Held out 3", "a test", "an old pair"]  # the draw held one out too
    assert set(asks(sets["prompts_train"])) == {*TRAINED, "new?", "newer?"}
    assert "whose question was held out there, and so is here: 2" in said


def test_weights_still_count(parent, word_format):
    sets, _ = prepared(parent, ["one", "two", "held out 1"], word_format, weight="3")
    counts = {text: asks(sets["pairs_train"]).count(text) for text in asks(sets["pairs_train"])}
    assert set(counts.values()) <= {1, 3} and 3 in counts.values()
    assert asks(sets["pairs_eval"]).count("held out 1") == 1


def test_a_parent_without_its_rows_is_named(parent, word_format):
    (parent / "data" / "prompts_eval.jsonl").unlink()
    with pytest.raises(UserError, match=r"prompts_eval.jsonl is missing.*bring the rows of .*parent back"):
        prepared(parent, ["new?"], word_format)
    assert not (parent.parent / "data").exists()


TALKS = [[*messages("Hello!"), {"role": "assistant", "content": "Hi."}, *messages(f"and then {i}?")] for i in range(40)]
GREETED = [[{"role": "system", "content": f"You are {name}."}, *messages("Hello!")] for name in ("ann", "bob", "cid")]


@pytest.mark.parametrize(("asked", "held_out"), [(TALKS, 4), (GREETED, 1)], ids=["messages", "systems"])
def test_pairs_that_begin_with_one_message_are_shared_out_by_what_follows(parent, word_format, asked, held_out):
    sets, _ = prepared(parent, asked, word_format, held_out=0.1)
    assert len(sets["pairs_eval"]) == held_out and len(sets["pairs_train"]) == len(asked) - held_out
    trained, aside = ([json.dumps(row["prompt"]) for row in sets[f"pairs_{part}"]] for part in ("train", "eval"))
    prompts = {json.dumps(row["prompt"]) for row in sets["prompts_train"]}
    assert prompts >= set(trained) and not prompts & set(aside)


@pytest.mark.parametrize("asked", [HELD_OUT, HELD_OUT[:1], [[*messages(HELD_OUT[0]), *talk[1:]] for talk in TALKS]])
def test_pairs_whose_questions_were_all_held_out_are_refused(parent, word_format, asked):
    with pytest.raises(UserError, match=r"No pair is left to train on, as .*parent held out .*: give pairs on other"):
        prepared(parent, asked, word_format)
    assert not (parent.parent / "data").exists()


def test_where_the_parent_held_out_no_prompts_there_are_those_of_the_new_rows(parent, word_format):
    write_rows(parent / "data" / "prompts_eval.jsonl", [])
    write_rows(parent / "data" / "prompts_train.jsonl", [{"prompt": messages(f"new {i}")} for i in range(9)])
    sets, _ = prepared(parent, [f"new {i}" for i in range(5)], word_format)
    assert len(sets["prompts_eval"]) == 1 and not set(asks(sets["prompts_eval"])) & set(asks(sets["prompts_train"]))


def test_texts_that_people_rated_go_from_round_to_round(parent, word_format):
    rated = [{"prompt": messages("?"), "response": "Fine", "domain": "tweets", "mean": 1.0, "ratings": [1]}]
    write_rows(parent / "data" / PANEL_FILE, rated)
    prepared(parent, ["new?", "newer?"], word_format)
    assert read_rows(parent.parent / "data" / PANEL_FILE) == rated
