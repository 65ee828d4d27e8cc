import json

import pytest

from inference.errors import UserError
from training.data.prepare import DataCounts, prepare_data
from training.data.rows import read_rows, require_rows, write_rows
from training.data_settings import DataSettings
from training.steps import PPO, REWARD

FILES = ["pairs_eval", "pairs_train", "prompts_eval", "prompts_train", "sft_eval", "sft_train"]


def write_source(path, count=40):
    lines = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DataSettings(source=str(path), split=(1, 1, 2), held_out=0.1)


def test_files_counts_and_report(tmp_path, word_format):
    lines = []
    directory = tmp_path / "run" / "data"
    counts = prepare_data(write_source(tmp_path / "a.jsonl"), 1, directory, word_format, lines.append)
    assert sorted(file.name for file in directory.iterdir()) == ["counts.json", *(f"{name}.jsonl" for name in FILES)]
    assert counts.rows == {name: len(read_rows(directory / f"{name}.jsonl")) for name in counts.rows}
    assert (counts.rows["sft_train"], counts.rows["pairs_train"], counts.rows["prompts_train"]) == (9, 9, 18)
    assert "step 2 (reward model): 9 rows, 4 held out" in "\n".join(lines)


def test_done_once(tmp_path, word_format):
    settings = write_source(tmp_path / "a.jsonl")
    first = prepare_data(settings, 1, tmp_path / "data", word_format, print)
    (tmp_path / "a.jsonl").unlink()
    lines = []
    assert prepare_data(settings, 1, tmp_path / "data", word_format, lines.append) == first
    assert lines == []


def test_what_a_killed_preparation_left_is_replaced(tmp_path, word_format):
    settings = write_source(tmp_path / "a.jsonl")
    for half in (tmp_path / "data", tmp_path / ".data.tmp"):
        half.mkdir()
        (half / "sft_train.jsonl").write_text('{"prompt"')
    prepare_data(settings, 1, tmp_path / "data", word_format, lambda line: None)
    assert len(read_rows(tmp_path / "data" / "sft_train.jsonl")) == 9
    assert not (tmp_path / ".data.tmp").exists()


def test_a_bad_source_leaves_no_directory(tmp_path, word_format):
    (tmp_path / "a.jsonl").write_text("oops\n")
    with pytest.raises(UserError, match="line 1"):
        prepare_data(DataSettings(source=str(tmp_path / "a.jsonl")), 1, tmp_path / "data", word_format, print)
    assert not (tmp_path / "data").exists()


def test_missing_kinds_are_empty_files(tmp_path, word_format):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    prepare_data(DataSettings(source=str(tmp_path / "a.jsonl")), 1, tmp_path / "data", word_format, lambda line: None)
    assert read_rows(tmp_path / "data" / "pairs_train.jsonl") == []
    with pytest.raises(
        UserError, match=r"Step 2 needs .* the data's 2 rows are prompts alone: .*--steps 1, or a reward function"
    ):
        require_rows(tmp_path / "data", REWARD)
    require_rows(tmp_path / "data", PPO)


def test_pairs_that_are_the_same_where_a_model_reads_them(tmp_path, word_format):
    rows = [{"prompt": f"q{i}", "chosen": f"one two three {i}", "rejected": "one two"} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DataSettings(source=str(tmp_path / "a.jsonl"), split=(0, 1, 0), max_response_tokens=2)
    sentence = r"In all 19 pairs chosen and rejected are the same in their first 2 tokens, .* raise data\.max_response"
    with pytest.raises(UserError, match=sentence):
        prepare_data(settings, 1, tmp_path / "data", word_format, print)
    assert not (tmp_path / "data").exists()
    settings.max_response_tokens = 3
    assert prepare_data(settings, 1, tmp_path / "data", word_format, lambda line: None).rows["pairs_train"] == 19


def test_left_out_rows_are_reported():
    counts = DataCounts(rows={"sft_train": 1234}, skipped={"the line is not JSON": 2}, notes=["a note"])
    assert counts.lines() == [
        "step 1 (supervised fine-tuning): 1,234 rows, 0 held out",
        "step 2 (reward model): 0 rows, 0 held out",
        "step 3 (PPO): 0 rows, 0 held out",
        "left out: the line is not JSON (2)",
        "a note",
    ]


def test_rows_survive_the_file(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "a\u2028b\u0085 \n\U0001f600"}], "response": "x"}]
    write_rows(tmp_path / "r.jsonl", rows)
    assert read_rows(tmp_path / "r.jsonl") == rows
