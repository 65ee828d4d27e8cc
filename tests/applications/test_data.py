"""`rlhf-chat data show | lint`, in this process; the model is `tiny`."""

import json
from pathlib import Path

import pytest

from applications.cli import main
from applications.data import lint_command, show_command
from inference.chat_format import ChatFormat
from inference.errors import UserError
from inference.model_store import resolve_model
from inference.preferences import PreferenceFile
from tests.training.evaluation.preferences import preference
from training.config import RunConfig
from training.data.prepare import prepare_data
from training.data.reading import read_sources
from training.data_settings import DataSettings
from training.run_directory import RunDirectory

PAIR = {"prompt": "How are you?", "chosen": "Very well!", "rejected": "Go away."}


def write(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def prepared(tmp_path):
    """A run whose data are prepared and that has not trained yet."""
    rows = [{**PAIR, "prompt": f"How is number {i}?"} for i in range(30)]
    source = write(tmp_path / "rows.jsonl", *rows)
    run = RunDirectory(tmp_path / "run")
    run.write_config(RunConfig(model="tiny", data=DataSettings(source=source)), {})
    chat_format = ChatFormat.load(resolve_model("tiny", lambda line: None))
    prepare_data(DataSettings(source=source), 1, run.data, chat_format, lambda line: None)
    return run


def test_show_marks_what_is_trained_on(tmp_path, capsys):
    source = write(tmp_path / "a.jsonl", {"prompt": "Name a colour.", "response": "Blue."}, PAIR)
    show_command(source, "tiny", None, 1, None)
    said = capsys.readouterr().out
    assert f"{source}: 1 demonstration, 1 pair" in said
    assert "Name a colour.\n\nAssistant:⟦ Blue." in said
    assert "chosen:" in said and "rejected:" in said and "Very well!" in said
    assert said.count("⟦") == said.count("⟧") == 4  # the legend, one demonstration, two answers


def test_show_says_what_is_cut(tmp_path, capsys):
    source = write(tmp_path / "a.jsonl", {"prompt": "Name a colour.", "response": "Blue. " * 50})
    show_command(source, "tiny", "sft", 1, ["data.max_response_tokens=5"])
    assert "response 5 of " in capsys.readouterr().out


def test_show_without_a_model_shows_the_text(tmp_path, capsys):
    show_command(write(tmp_path / "a.jsonl", PAIR, PAIR), None, "pairs", 1, None)
    said = capsys.readouterr().out
    assert "user: How are you?\nassistant: ⟦Very well!⟧" in said and "Give --model" in said
    assert said.count("Very well!") == 1


def test_show_says_why_other_rows_cannot_be_used(tmp_path, capsys):
    source = write(tmp_path / "a.jsonl", PAIR, {"prompt": ""}, {"Title": "x", "body": "y"})
    show_command(source, None, None, 1, None)
    said = capsys.readouterr().out
    assert f"bad row: 'prompt' is empty (1 row: {source}, line 2)" in said
    assert "bad row: no known keys (found: Title, body; there must be " in said and "Very well!" in said
    with pytest.raises(UserError, match="has no rows that can be used"):
        show_command(write(tmp_path / "b.jsonl", {"prompt": ""}), None, None, 1, None)
    assert "bad row: 'prompt' is empty (1 row: " in capsys.readouterr().out


def test_show_reads_a_run(prepared, capsys):
    show_command(str(prepared.path), None, "pairs", 2, None)
    said = capsys.readouterr().out
    assert said.count("pair · ") == 2 and "pairs_train.jsonl, line 2" in said


@pytest.mark.parametrize(
    ("kind", "message"), [("pair", "--kind takes sft, pairs, prompts"), ("sft", "no rows of kind 'sft'")]
)
def test_kinds_that_are_not_there(tmp_path, kind, message):
    with pytest.raises(UserError, match=message):
        show_command(write(tmp_path / "a.jsonl", PAIR), None, kind, 1, None)


def test_lint_exit_codes(tmp_path, capsys):
    assert lint_command(write(tmp_path / "good.jsonl", PAIR), "tiny", False, None) == 0
    assert "1 rows, 0 errors" in capsys.readouterr().out
    assert lint_command(write(tmp_path / "twice.jsonl", PAIR, PAIR), None, False, None) == 0
    assert "warning: duplicates: the same row is there before (1 row: " in capsys.readouterr().out
    assert lint_command(write(tmp_path / "bad.jsonl", PAIR, {**PAIR, "chosen": ""}), None, False, None) == 1
    said = capsys.readouterr().out
    assert "error: bad row: 'chosen' is empty (1 row: " in said and "bad.jsonl, line 2" in said


def test_lint_as_data(tmp_path, capsys):
    source = write(tmp_path / "bad.jsonl", PAIR, PAIR, {"prompt": 3})
    assert lint_command(source, None, True, None) == 1
    values = json.loads(capsys.readouterr().out)
    assert values["rows"] == {"pairs": 2} and values["errors"] == 1
    assert [(each["level"], each["check"]) for each in values["findings"]] == [
        ("error", "bad row"),
        ("warning", "duplicates"),
    ]


def test_lint_of_a_run_finds_a_prompt_on_both_sides(prepared, capsys):
    assert lint_command(str(prepared.path), None, True, None) == 0
    capsys.readouterr()
    held_out = prepared.data / "pairs_eval.jsonl"
    held_out.write_text(held_out.read_text() + (prepared.data / "pairs_train.jsonl").read_text().splitlines()[0] + "\n")
    assert lint_command(str(prepared.path), None, True, None) == 1
    assert json.loads(capsys.readouterr().out)["findings"][0]["check"] == "leak"


def test_a_run_keeps_its_settings(prepared):
    with pytest.raises(UserError, match="leave --set out"):
        lint_command(str(prepared.path), None, False, ["data.limit=3"])


def test_the_embedded_data_need_a_model():
    with pytest.raises(UserError, match="--model smollm2-135m"):
        lint_command("chitchat", None, False, None)


def test_the_command_line(tmp_path, monkeypatch, capsys):
    source = write(tmp_path / "bad.jsonl", {"prompt": 3})
    monkeypatch.setattr("sys.argv", ["rlhf-chat", "data", "lint", source])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and "error: no rows" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["rlhf-chat", "data", "show", str(tmp_path / "none.jsonl")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "There is no data source" in capsys.readouterr().err


# What people preferred


@pytest.fixture
def preferred(tmp_path) -> str:
    file = PreferenceFile(tmp_path / "preferences.jsonl")
    for i, winner in enumerate(("one", "other", "tie", "tie", "both bad")):
        file.add(preference("ann", winner, f"question {i}"))
    return str(file.path)


def test_preferences_are_shown_as_pairs_and_no_column_is_called_unused(preferred, capsys):
    show_command(preferred, None, None, 3, None)
    said = capsys.readouterr().out
    assert said.startswith(
        f"{preferred}: 2 pairs (preference, text); 2 about the same and 1 bad, which teach nothing\n"
    )
    assert "left out" not in said and "not used" not in said and "bad row" not in said
    assert said.count("rejected:") == 2 and "question 1?" not in said
    assert "chosen:\nuser: question 1\nassistant: ⟦Yes!⟧" in said


def test_lint_tells_who_preferred_what(preferred, capsys):
    assert lint_command(preferred, None, False, None) == 0
    said = capsys.readouterr().out
    assert "5 preferences (ann 5): 40% about the same, 20% both bad" in said
    assert "ann prefers the left answer in 50.0% (9.5% to 90.5%) of 2 preferences" in said
    assert "2 rows, 0 errors, 0 warnings" in said
    assert lint_command(preferred, None, True, None) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["preferences"]["by"] == {"ann": 5} and found["preferences"]["ties"] == 2 and found["findings"] == []


def test_a_preference_that_a_kill_has_cut_is_left_out_and_no_error(preferred, capsys):
    Path(preferred).write_bytes(Path(preferred).read_bytes() + '{"id": "ü'.encode()[:-1])
    (found,) = read_sources(DataSettings(source=preferred))
    assert found.left_out[-1] == (f"{preferred}, line 6", "the last line was cut short", False) and len(found.rows) == 2
    source = write(Path(preferred).with_name("rows.jsonl"), PAIR)
    Path(source).write_bytes(Path(source).read_bytes() + b'{"prompt": ')
    with pytest.raises(UserError, match="line 2: the line is not JSON"):
        read_sources(DataSettings(source=source))


def test_preferences_alone_that_teach_nothing_are_no_data(tmp_path, capsys):
    file = PreferenceFile(tmp_path / "ties.jsonl")
    file.add(preference("ann", "tie"))
    assert lint_command(str(file.path), None, False, None) == 1
    assert "1 about the same, which teach nothing" in capsys.readouterr().out


def test_other_files_with_such_columns_say_what_they_do_not_use(tmp_path, capsys):
    row = {"prompt": "Hi", "response_a": "a", "response_b": "b", "winner": "a", "by": "ann"}
    show_command(write(tmp_path / "a.jsonl", row), None, None, 1, None)
    assert "not used: by" in capsys.readouterr().out
