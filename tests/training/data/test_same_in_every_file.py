"""The same rows in every kind of file, against the rows as JSON lines have them."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import zipfile
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal

import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import feather, parquet

from inference.errors import UserError
from training.data.reading import read_sources
from training.data_settings import DataSettings

MESSAGES = [{"role": "user", "content": 'a "q" it\'s'}, {"role": "assistant", "content": "r"}]
MIXED = [
    {"prompt": "q 007", "chosen": "True", "rejected": "NA"},
    {"messages": MESSAGES},
    {"prompt": "q2", "response": "3.10\nnull"},
    {"prompt": "only, this", "ground_truth": "0042"},
]
KEYS = ("prompt", "chosen", "rejected", "messages", "response", "ground_truth")
EXPECTED = [
    {"prompt": [{"role": "user", "content": "q 007"}], "chosen": "True", "rejected": "NA"},
    {"prompt": MESSAGES[:1], "response": "r"},
    {"prompt": [{"role": "user", "content": "q2"}], "response": "3.10\nnull"},
    {"prompt": [{"role": "user", "content": "only, this"}], "extra": {"ground_truth": "0042"}},
]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows, separator=",", messages=json.dumps):
    out = io.StringIO()
    writer = csv.DictWriter(out, KEYS, delimiter=separator)
    writer.writeheader()
    writer.writerows({**row, "messages": messages(row["messages"])} if "messages" in row else row for row in rows)
    return out.getvalue()


def arrow(rows):
    return pyarrow.Table.from_pylist([{key: row.get(key) for key in KEYS} for row in rows])


def zipped(file, content, *more):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("rows/a", "__MACOSX/rows/._a", *more):
            archive.writestr(name, content)


def columns(rows):
    return {key: [row.get(key) for row in rows] for key in KEYS}


WRITERS = {
    "a.jsonl": lambda file: file.write_text(lines(MIXED)),
    "nulls.jsonl": lambda file: file.write_text(lines(arrow(MIXED).to_pylist())),
    "nan.jsonl": lambda file: file.write_text(lines([{**dict.fromkeys(KEYS, float("nan")), **row} for row in MIXED])),
    "utf16.jsonl": lambda file: file.write_text(lines(MIXED), encoding="utf-16"),
    "packed.jsonl": lambda file: file.write_bytes(gzip.compress(lines(MIXED).encode())),
    "a.jsonl.bz2": lambda file: file.write_bytes(bz2.compress(lines(MIXED).encode())),
    "a.csv.xz": lambda file: file.write_bytes(lzma.compress(table(MIXED).encode())),
    "utf16.json.zip": lambda file: zipped(file, json.dumps(MIXED).encode("utf-16")),
    "list.jsonl": lambda file: file.write_text(json.dumps(MIXED)),
    "indented list.jsonl": lambda file: file.write_text(json.dumps(MIXED, indent=2)),
    "indented.jsonl": lambda file: file.write_text("\n".join(json.dumps(row, indent=2) for row in MIXED)),
    "a.json": lambda file: file.write_text(json.dumps(MIXED, indent=2)),
    "lines.json": lambda file: file.write_text(lines(MIXED)),
    "wrapped.json": lambda file: file.write_text(json.dumps({"version": 1, "data": MIXED})),
    "map.json": lambda file: file.write_text(json.dumps({f"x{i}": row for i, row in enumerate(MIXED)})),
    "columns.json": lambda file: file.write_text(json.dumps(columns(MIXED))),
    "pandas.json": lambda file: file.write_text(
        json.dumps({key: dict(enumerate(values)) for key, values in columns(MIXED).items()})
    ),
    "a.csv": lambda file: file.write_text(table(MIXED), newline=""),
    "python.csv": lambda file: file.write_text(table(MIXED, messages=str), newline=""),
    "mark.csv": lambda file: file.write_text("\ufeff" + table(MIXED), newline=""),
    "semicolon.csv": lambda file: file.write_text(table(MIXED, ";"), newline=""),
    "excel.csv": lambda file: file.write_text("sep=;\r\n" + table(MIXED, ";"), newline=""),
    "tab.csv": lambda file: file.write_text(table(MIXED, "\t"), newline=""),
    "bar.csv": lambda file: file.write_text(table(MIXED, "|"), newline=""),
    "a.tsv": lambda file: file.write_text(table(MIXED, "\t"), newline=""),
    "utf16.tsv": lambda file: file.write_text(table(MIXED, "\t"), newline="", encoding="utf-16"),
    "a.parquet": lambda file: parquet.write_table(arrow(MIXED), file),
    "dictionary.parquet": lambda file: parquet.write_table(
        arrow(MIXED).set_column(0, "prompt", arrow(MIXED)["prompt"].dictionary_encode()), file
    ),
    "bytes.parquet": lambda file: parquet.write_table(
        arrow(MIXED).set_column(0, "prompt", arrow(MIXED)["prompt"].cast(pyarrow.binary())), file
    ),
    "file.arrow": lambda file: feather.write_feather(arrow(MIXED), str(file), compression="uncompressed"),
    "saved": lambda file: Dataset(arrow(MIXED)).save_to_disk(str(file)),
    "splits": lambda file: DatasetDict(
        train=Dataset(arrow(MIXED)), validation=Dataset(arrow([*MIXED, *MIXED]))
    ).save_to_disk(str(file)),
}


def read(source, **settings):
    (found,) = read_sources(DataSettings(source=str(source), **settings), lambda line: None)
    return found


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_rows(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name).rows == EXPECTED


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (4, 4),
        (0.1, 0.1),
        (True, True),
        ("007", "007"),
        (date(2026, 1, 31), "2026-01-31"),
        (datetime(2026, 1, 31, 12, 30, tzinfo=UTC), "2026-01-31T12:30:00+00:00"),
        (time(12, 30), "12:30:00"),
        (timedelta(minutes=2), 120.0),
        (Decimal("1.10"), 1.1),
        (Decimal("0.12345678901234567890"), "0.12345678901234567890"),
        (b"caf\xc3\xa9", "café"),
        (b"\xff\x00", "/wA="),
        ({"index": 1, "split": None, "when": date(2026, 1, 31)}, {"index": 1, "when": "2026-01-31"}),
        ([Decimal("2"), Decimal("3.5")], [2.0, 3.5]),
        ([{"a": 1, "b": None}, {"a": None, "b": 2}], [{"a": 1}, {"b": 2}]),
    ],
)
def test_what_a_reward_function_gets(tmp_path, value, expected):
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "q", "x": value}]), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(lines([{"prompt": "q", "x": expected}]))
    for name in ("a.parquet", "a.jsonl"):
        extra = read(tmp_path / name).rows[0]["extra"]
        assert extra == {"x": expected} and type(extra["x"]) is type(expected)
        assert json.loads(json.dumps(extra)) == extra


def test_a_map_is_an_object(tmp_path):
    values = pyarrow.array([[("a", 1), ("b", 2)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    parquet.write_table(pyarrow.table({"prompt": ["q"], "x": values}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet").rows[0]["extra"] == {"x": {"a": 1, "b": 2}}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"])
def test_a_pointer_of_git_lfs(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError, match=rf"{name} is a pointer of Git LFS and not the file itself: run git lfs pull"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("pack", "name"), [(gzip.compress, "a.jsonl.gz"), (bz2.compress, "a.jsonl.bz2"), (lzma.compress, "a.jsonl.xz")]
)
def test_packed_files_that_are_damaged(tmp_path, pack, name):
    """Cut, and with other bytes in the middle."""
    whole = pack(random.Random(1).randbytes(9000).hex().encode())
    for content in (whole[:5000], whole[:4000] + bytes(50) + whole[4050:]):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} cannot be read .*; check its permissions, or copy it again"):
            read(tmp_path / name)


def test_zip_files_that_cannot_be_read(tmp_path):
    file = tmp_path / "a.jsonl.zip"
    zipped(file, lines(MIXED), "rows/b")
    with pytest.raises(UserError, match=r"a\.jsonl\.zip has 2 files in it: unpack it, and give one of them"):
        read(file)
    zipped(file, lines(MIXED * 9))
    whole = file.read_bytes()
    for content in (whole[:-30], whole.replace(b"rows/a", b"rows/c", 1)):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.jsonl\.zip cannot be read"):
            read(file)
    file.write_bytes(whole.replace(b"\x08\0", b"\x63\0"))  # another kind of packing
    with pytest.raises(UserError, match=r"a\.jsonl\.zip cannot be unpacked"):
        read(file)


def test_a_saved_data_set(tmp_path):
    """Rows are counted as the data set itself counts them, not in each of its files."""
    folder = tmp_path / "saved [1]"
    Dataset.from_dict({"prompt": ["a", "b", " "]}).save_to_disk(str(folder), num_shards=3)
    (folder / "cache-1f.arrow").write_bytes((folder / "data-00000-of-00003.arrow").read_bytes())
    assert read(folder, bad_rows="skip").left_out == [(f"{folder}, row 3", "'prompt' is empty", True)]
    whole = (folder / "data-00002-of-00003.arrow").read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        (folder / "data-00002-of-00003.arrow").write_bytes(content)
        with pytest.raises(UserError, match=r"saved in .*saved \[1\] cannot be read \(.*\): copy it again or"):
            read(folder)
    (folder / "data-00002-of-00003.arrow").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    with pytest.raises(UserError, match=r"data-00002-of-00003\.arrow is a pointer of Git LFS"):
        read(folder)
    (folder / "data-00002-of-00003.arrow").unlink()
    with pytest.raises(UserError, match=r"saved \[1\] cannot be read \(.*data-00002-of-00003\.arrow"):
        read(folder)
    (folder / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"saved \[1\] cannot be read"):
        read(folder)


# Tables in text, and JSON documents, of other kinds


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (",prompt,response\n0,a,b\n", [("a", "b")]),
        ('prompt, response\na, "b, c"\n', [("a", "b, c")]),
        ("prompt,response,\na,b,\n,,\n", [("a", "b")]),
        ("prompt,response\na,b\nprompt,response\nc,d\n", [("a", "b"), ("c", "d")]),
        ('Prompt;Response\n"a;b";"c ""d"""\n', [("a;b", 'c "d"')]),
        ("prompt,response\ra,b\r", [("a", "b")]),
    ],
)
def test_tables(tmp_path, content, rows):
    (tmp_path / "a.csv").write_text(content, newline="")
    assert [(row["prompt"][0]["content"], row["response"]) for row in read(tmp_path / "a.csv").rows] == rows


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.arrow"])
def test_a_table_with_a_column_twice(tmp_path, name):
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["prompt", "response", "prompt"])
    (tmp_path / "a.csv").write_text("prompt,response,prompt\na,b,c\n")
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as stream:
        stream.write_table(table)
    with pytest.raises(UserError, match=rf"{name} has two columns named 'prompt': give one of them another name"):
        read(tmp_path / name)


def test_a_key_twice_in_json_is_a_bad_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "response": "b", "prompt": "c"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: 'prompt' is there twice in one object; correct the row"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text('[{"prompt": "a", "prompt": "c"}]')
    with pytest.raises(UserError, match=r"a\.json: 'prompt' is there twice in one object; leave one of the two out"):
        read(tmp_path / "a.json")


def test_a_table_whose_names_are_not_utf8(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"prompt,response,\xe9t\xe9\na,b,c\n")
    with pytest.raises(UserError, match=r"a\.csv is not UTF-8 text in the line with its columns' names"):
        read(tmp_path / "a.csv")


def test_json_with_several_lists_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"train": MIXED, "test": MIXED}))
    with pytest.raises(UserError, match=r"a\.json has several lists of rows \(train, test\): save one in a file"):
        read(tmp_path / "a.json")


def test_json_with_one_conversation_is_one_row(tmp_path):
    for value in ({"messages": MESSAGES}, {"messages": MESSAGES, "notes": [{"by": "me"}]}, MESSAGES):
        (tmp_path / "a.json").write_text(json.dumps(value, indent=1))
        assert read(tmp_path / "a.json").rows == EXPECTED[1:2]


def test_lines_that_are_lists_of_messages(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines([MESSAGES, MESSAGES]))
    assert read(tmp_path / "a.jsonl").rows == EXPECTED[1:2] * 2


def test_a_first_line_that_is_broken_is_one_bad_row(tmp_path):
    (tmp_path / "a.jsonl").write_text("[oops\n" + lines(MIXED))
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: the line is not JSON"):
        read(tmp_path / "a.jsonl")


def test_columns_that_are_not_used_are_named_once(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,response,score,id\na,b,1,x\nc,d,2,y\n")
    assert read(tmp_path / "a.csv").describe().endswith("(prompt-completion, text); not used: id, score")
    (tmp_path / "a.jsonl").write_text(lines([{"prompt": "q", "response": "r", **{f"k{i:02}": 1 for i in range(15)}}]))
    assert read(tmp_path / "a.jsonl").describe().endswith("k10, k11 and 3 more")
    (tmp_path / "a.jsonl").write_text(lines([{"prompt": "q", "output": "r"}, {"prompt": "p", "score": 1}]))
    assert read(tmp_path / "a.jsonl").describe().endswith("only, text); for a reward function only: output, score")
