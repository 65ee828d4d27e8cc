"""--eval-data: what it evaluates, what is no longer held out, and what is no longer trained on."""

import json
from pathlib import Path

import pytest

from inference.chat_format import ChatFormat
from inference.errors import UserError
from inference.families import build_tiny_model
from training.config_files import load_config
from training.data.prepare import LEFT_OUT_FILE, prepare_data
from training.data.rows import read_rows
from training.data_settings import DataSettings
from training.opening import open_run
from training.run_directory import RunDirectory


@pytest.fixture(scope="module")
def chat_format(tmp_path_factory) -> ChatFormat:
    directory = tmp_path_factory.mktemp("eval-data") / "tiny"
    build_tiny_model(directory)
    return ChatFormat.load(directory)


def pair(question: str) -> dict:
    return {"prompt": question, "chosen": f"Yes, {question}", "rejected": "No."}


def prepared(place: Path, chat_format: ChatFormat, rows: list[dict], held: list[dict], **more) -> dict[str, list[str]]:
    """The questions of each set."""
    for name, some in (("rows", rows), ("held", held)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    settings = DataSettings(source=str(place / "rows.jsonl"), eval_source=str(place / "held.jsonl"), **more)
    prepare_data(settings, 1, place / "data", chat_format, [].append)
    files = sorted((place / "data").glob("*_*.jsonl"))
    return {f.stem: [r["prompt"][-1]["content"] for r in read_rows(f)] for f in files if f.name != LEFT_OUT_FILE}


ROWS = [pair(f"question {n}?") for n in range(20)]


def test_its_rows_are_evaluated_and_all_others_are_trained_on(tmp_path, chat_format):
    held = [pair(f"held {n}?") for n in range(3)]
    found = prepared(tmp_path, chat_format, ROWS, held)
    for kind in ("sft", "pairs", "prompts"):
        assert sorted(found[f"{kind}_eval"]) == ["held 0?", "held 1?", "held 2?"]
    trained = [question for name, questions in found.items() if name.endswith("_train") for question in questions]
    assert sorted(trained) == sorted(row["prompt"] for row in ROWS)


def test_what_it_lacks_is_held_out_of_the_data_as_before(tmp_path, chat_format):
    found = prepared(tmp_path, chat_format, ROWS, [{"prompt": "held?"}], held_out=0.2)
    assert found["prompts_eval"] == ["held?"]
    assert len(found["pairs_eval"]) == len(found["sft_eval"]) == 4 and "held?" not in found["pairs_eval"]


def test_demonstrations_alone_give_prompts_as_well_but_not_beside_prompts(tmp_path, chat_format):
    answered = {"prompt": "told?", "response": "Yes."}
    found = prepared(tmp_path, chat_format, ROWS, [answered])
    assert found["sft_eval"] == found["prompts_eval"] == ["told?"] and found["pairs_eval"]
    (tmp_path / "mixed").mkdir()
    found = prepared(tmp_path / "mixed", chat_format, ROWS, [answered, {"prompt": "held?"}])
    assert (found["sft_eval"], found["prompts_eval"]) == (["told?"], ["held?"])


def test_its_questions_are_not_trained_on_however_they_are_written(tmp_path, chat_format):
    found = prepared(tmp_path, chat_format, ROWS, [pair("Question  3?"), pair("held?")])
    trained = [question for name, questions in found.items() if name.endswith("_train") for question in questions]
    assert len(trained) == 19 and "question 3?" not in trained
    (note,) = [n for n in json.loads((tmp_path / "data" / "counts.json").read_text())["notes"] if "evaluation" in n]
    assert note.endswith("for evaluation alone; 1 training rows with a question of it are left out")


def test_where_it_holds_every_question_nothing_is_left(tmp_path, chat_format):
    with pytest.raises(UserError, match="Every question of the data is in the evaluation data too"):
        prepared(tmp_path, chat_format, ROWS, ROWS)


@pytest.mark.parametrize(
    ("held", "sentence"),
    [([{"prompt": "held?", "chosen": 3}], r"held\.jsonl, line 1"), ([], "held.jsonl gives no data, it is empty")],
)
def test_a_bad_file_is_a_sentence(tmp_path, chat_format, held, sentence):
    with pytest.raises(UserError, match=sentence):
        prepared(tmp_path, chat_format, ROWS, held)
    assert not (tmp_path / "data").exists()


def test_a_run_keeps_its_evaluation_data(tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text("{}")
    run, settings = RunDirectory(tmp_path / "run"), ["model=tiny", f"data.eval_source={held}"]
    run.path.mkdir()
    open_run(run, load_config([], settings))
    with pytest.raises(UserError, match="was made with other settings"):
        open_run(run, load_config([], settings[:1]))


def test_the_embedded_default_evaluates_nothing_else():
    with pytest.raises(UserError, match="has a split of its own"):
        load_config([], ["model=tiny", "data.eval_source=chitchat"])
