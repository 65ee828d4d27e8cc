import pytest

from inference.errors import UserError
from training.data.find_files import find_files, split_of


def make(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")


def names(root):
    files, notes = find_files(root)
    return [file.relative_to(root).as_posix() for file in files], notes


@pytest.mark.parametrize(
    ("read", "left"),
    [
        ("train.jsonl", "test.jsonl"),
        ("Train.jsonl", "Test.jsonl"),
        ("TRAIN.csv", "VAL.csv"),
        ("my_train.jsonl", "my_test.jsonl"),
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"),
        ("hh.train.jsonl", "hh.dev.jsonl.gz"),
        ("training data.json", "evaluation data.json"),
        ("trainSet1.json", "testSet1.json"),
        ("traindata.json", "testdata.json"),
        ("TRAIN/rows.jsonl", "TEST/rows.jsonl"),
        ("train_sft/rows.jsonl", "test_sft/rows.jsonl"),
        ("train/test_questions.jsonl", "valid/train_questions.jsonl"),
        ("train.jsonl", "held-out.jsonl"),
        ("train.jsonl", "train_test.jsonl"),
        ("train.jsonl", "more.jsonl"),
        ("rows.jsonl", "rows_eval.jsonl"),
        ("sub/train.jsonl", "test.jsonl"),
    ],
)
def test_held_out_files_are_not_read(tmp_path, read, left):
    make(tmp_path, read, left)
    assert names(tmp_path) == ([read], [f"read: {read}; not read, as not of the training split: {left}"])


@pytest.mark.parametrize(
    "name",
    ["latest.jsonl", "contest.jsonl", "devices.csv", "values.json", "testimony.json", "constraints.json", "evil.csv"],
)
def test_names_that_only_look_like_splits(tmp_path, name):
    assert split_of(tmp_path.relative_to(tmp_path) / name) == ""


def test_the_directorys_own_path_says_nothing(tmp_path):
    make(tmp_path / "test", "a.jsonl")
    assert names(tmp_path / "test") == (["a.jsonl"], ["read: a.jsonl"])


def test_files_in_folders_where_there_are_others_right_there(tmp_path):
    make(tmp_path, "a.jsonl", "b.csv", "old/a.jsonl", ".cache/a.jsonl", "dataset_infos.json", "notes.txt")
    assert names(tmp_path) == (["a.jsonl", "b.csv"], ["read: a.jsonl, b.csv; not read: old/a.jsonl"])


def test_many_files_are_counted(tmp_path):
    make(tmp_path, *(f"train-{i}.jsonl" for i in range(5)), *(f"test-{i}.jsonl" for i in range(3)))
    assert names(tmp_path)[1] == [
        "read: train-0.jsonl, train-1.jsonl, train-2.jsonl and 2 more; not read, as not of the training split: "
        "test-0.jsonl, test-1.jsonl, test-2.jsonl"
    ]


def test_only_held_out_files(tmp_path):
    make(tmp_path, "test.jsonl", "dev/a.jsonl")
    with pytest.raises(UserError, match=r"only files that are named as validation or test data \(dev/a\.jsonl, test"):
        find_files(tmp_path)
    assert find_files(tmp_path / "test.jsonl") == ([tmp_path / "test.jsonl"], [])  # as it was asked for


def test_parts_that_are_missing_are_said(tmp_path):
    make(tmp_path, *(f"data/train-0000{i}-of-00003.parquet" for i in (0, 2)), "data/test-00000-of-00002.parquet")
    assert names(tmp_path)[1][1:] == ["only 2 of 3 parts of train"]
    make(tmp_path, "data/train-00001-of-00003.parquet")
    assert names(tmp_path)[1][1:] == []


@pytest.mark.parametrize("name", ["train.jsonl.zst", "train.zip", "train.tar.gz"])
def test_files_that_are_packed_otherwise_are_said(tmp_path, name):
    make(tmp_path, name, "test.jsonl")
    with pytest.raises(UserError, match=rf"no data files to train on .*; {name}: not read, unpack it first"):
        find_files(tmp_path)
    with pytest.raises(UserError, match=rf"{name} is packed in a way that is not read: unpack it, and give"):
        find_files(tmp_path / name)
    make(tmp_path, "train.jsonl.xz")
    assert names(tmp_path)[1][1:] == [f"{name}: not read, unpack it first"]


def test_of_a_saved_data_set_its_own_files(tmp_path):
    """`map` leaves caches there, and an older save with more parts leaves those."""
    make(tmp_path, "data-00000-of-00001.arrow", "data-00001-of-00002.arrow", "cache-1f2e.arrow", "dataset_info.json")
    assert len(names(tmp_path)[0]) == 3
    make(tmp_path, "state.json")
    assert names(tmp_path) == (["state.json"], ["read: *.arrow"])
    make(tmp_path / "more", "state.json", "rows.jsonl")
    assert names(tmp_path / "more")[0] == ["rows.jsonl", "state.json"]
