import json
from collections import Counter

import pytest

from inference.errors import UserError
from training.data.prepare import prepare_data
from training.data.reading import blend
from training.data.rows import RowSets, read_rows
from training.data_settings import DataSettings


def rows(source, count):
    return [{"prompt": [{"role": "user", "content": f"{source}{i}"}], "source": source} for i in range(count)]


def names(chosen):
    return Counter(row["prompt"][0]["content"] for row in chosen)


def test_whole_weights_repeat_and_parts_of_one_draw():
    sets = RowSets(prompts_train=[*rows("a", 10), *rows("b", 10), *rows("c", 10)], prompts_eval=rows("a", 4))
    counts = names(blend(sets, {"a": 2.0, "b": 0.5, "c": 1.3}, seed=1).prompts_train)
    assert [counts[f"a{i}"] for i in range(10)] == [2] * 10
    assert sorted(counts[f"b{i}"] for i in range(10)) == [0] * 5 + [1] * 5
    assert sorted(counts[f"c{i}"] for i in range(10)) == [1] * 7 + [2] * 3


def test_held_out_rows_are_there_once_at_most():
    sets = RowSets(pairs_eval=[*rows("a", 6), *rows("b", 6)])
    counts = names(blend(sets, {"a": 3.0, "b": 0.5}, seed=1).pairs_eval)
    assert [counts[f"a{i}"] for i in range(6)] == [1] * 6 and sum(counts[f"b{i}"] for i in range(6)) == 3


def test_the_seed_decides():
    sets = RowSets(sft_train=[*rows("a", 40), *rows("b", 40)])
    weights = {"a": 0.5, "b": 1.0}
    assert blend(sets, weights, 1).sft_train == blend(sets, weights, 1).sft_train
    assert blend(sets, weights, 1).sft_train != blend(sets, weights, 2).sft_train
    assert names(blend(sets, weights, 1).sft_train) != names(blend(sets, weights, 2).sft_train)


def test_a_small_share_leaves_at_least_a_row():
    assert len(blend(RowSets(sft_train=rows("a", 3)), {"a": 0.01}, 1).sft_train) == 1


def write(file, count):
    file.write_text("".join(f'{{"prompt": "{file.stem}{i}", "response": "r"}}\n' for i in range(count)))
    return str(file)


def test_several_sources_are_split_together_and_told_apart(tmp_path, word_format):
    sources = [write(tmp_path / "a.jsonl", 40), write(tmp_path / "b.jsonl", 20) + "=3"]
    lines = []
    prepare_data(DataSettings(source=sources, held_out=0.1), 1, tmp_path / "data", word_format, lines.append)
    train, held_out = (read_rows(tmp_path / "data" / f"sft_{part}.jsonl") for part in ("train", "eval"))
    assert {row["source"] for row in train} == {str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")}
    assert set(names(train).values()) == {1, 3} and set(names(held_out).values()) == {1}
    assert len(held_out) == 6 and not names(train) & names(held_out)
    assert all(names(train)[name] == (3 if name.startswith("b") else 1) for name in names(train))
    assert f"  {sources[1]}: 20 demonstrations (prompt-completion, text)" in lines


def test_the_weight_of_an_only_source(tmp_path, word_format):
    with pytest.raises(UserError, match="is the only source, so its weight says nothing"):
        prepare_data(
            DataSettings(source=write(tmp_path / "a.jsonl", 3) + "=2"), 1, tmp_path / "data", word_format, print
        )


def test_the_embedded_data_stand_alone():
    with pytest.raises(ValueError, match="cannot be blended"):
        DataSettings(source=["chitchat", "a.jsonl"])
    assert DataSettings(source=["chitchat"]).source == "chitchat"


def test_a_row_of_two_sources_is_there_as_often_as_the_larger_weight_says(tmp_path, word_format):
    for name in "ab":
        lines = [{"prompt": f"q{i}", "response": "r"} for i in range(20)] * 3
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = DataSettings(source=[str(tmp_path / "a.jsonl"), f"{tmp_path / 'b.jsonl'}=2"])
    said = []
    prepare_data(settings, 1, tmp_path / "data", word_format, said.append)
    for name, often in {"sft_train": 2, "sft_eval": 1, "prompts_train": 2, "prompts_eval": 1}.items():
        assert set(names(read_rows(tmp_path / "data" / f"{name}.jsonl")).values()) == {often}
    assert "each prompt or pair is in a set once: 200 repeats are left out" in said[-1]  # of 2 x 120 rows 40 are left
