import gc
import gzip
import json
from dataclasses import replace

import pyarrow
import pytest
from pyarrow import parquet

from inference.errors import UserError
from tests.training.evaluation.preferences import preference
from training.data.reading import read_sources
from training.data.sources import Source, absolute, parse_source
from training.data_settings import DataSettings

PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}


def prompt(text):
    return [{"role": "user", "content": text}]


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(source, **settings):
    """The only source."""
    (found,) = read_sources(DataSettings(source=str(source), **settings), lambda line: None)
    return found


def texts(found):
    return [row["prompt"][0]["content"] for row in found.rows]


def test_refuse_names_file_line_reason_and_the_way_out(tmp_path):
    source = write(tmp_path / "a.jsonl", {"prompt": "q"}, "\n", {"prompt": ""})
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: 'prompt' is empty; .*data\.bad_rows=skip"):
        read(source)
    assert gc.isenabled()


def test_skip_counts_by_reason_and_keeps_the_places(tmp_path):
    source = write(tmp_path / "a.jsonl", {"prompt": "q"}, {"prompt": ""}, "oops\n", {"prompt": "  "})
    found = read(source, bad_rows="skip")
    assert found.rows == [{"prompt": prompt("q")}] and found.locations == [f"{source}, line 1"]
    assert found.reasons == {"'prompt' is empty": 2, "the line is not JSON": 1}
    assert [place for place, _, wrong in found.left_out if wrong] == [f"{source}, line {n}" for n in (2, 3, 4)]


def test_directory_in_order_of_names_up_to_the_limit(tmp_path):
    write(tmp_path / "b.jsonl", {"prompt": "3"})
    write(tmp_path / "a.jsonl", {"prompt": "1"}, {"prompt": "2"})
    write(tmp_path / "c.txt", "not read")
    write(tmp_path / "dataset_infos.json", {"about": "the data"})
    assert texts(read(tmp_path)) == ["1", "2", "3"]
    assert len(read(tmp_path, limit=2).rows) == 2


def test_byte_order_mark_and_odd_line_separators(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a\xe2\x80\xa8b"}\r\n')
    assert texts(read(file)) == ["a\u2028b"]


# The kinds of files


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([PAIR, PAIR], indent=1),
        json.dumps({"data": [PAIR, PAIR]}),
        json.dumps(PAIR) + "\n\n" + json.dumps(PAIR),  # JSON lines by another name, as in stanfordnlp/SHP
    ],
)
def test_json(tmp_path, content):
    found = read(write(tmp_path / "a.json", content))
    assert len(found.rows) == 2 and found.formats == {"preference, text": 2}


def test_json_with_one_object_is_one_row(tmp_path):
    assert len(read(write(tmp_path / "a.json", json.dumps(PAIR, indent=2))).rows) == 1


def test_json_names_the_row(tmp_path):
    with pytest.raises(UserError, match=r"a\.json, row 2: 'rejected' is missing"):
        read(write(tmp_path / "a.json", json.dumps([PAIR, {"prompt": "q", "chosen": "a"}])))


def test_broken_json_names_the_line(tmp_path):
    with pytest.raises(UserError, match=r"a\.json is not JSON \(line 2: "):
        read(write(tmp_path / "a.json", '[{"prompt": "a"},\n{"prompt": }]'))


def test_compressed_lines(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps(PAIR))
    assert len(read(tmp_path / "a.jsonl.gz").rows) == 1
    (tmp_path / "b.jsonl.gz").write_bytes((tmp_path / "a.jsonl.gz").read_bytes()[:30])
    with pytest.raises(UserError, match=r"b\.jsonl\.gz cannot be read"):
        read(tmp_path / "b.jsonl.gz")


def test_csv_with_several_lines_in_a_cell_and_messages(tmp_path):
    messages = json.dumps(prompt("hi")).replace('"', '""')
    lines = ["prompt,response", '"two\nlines",yes', f'"{messages}","a ""b"""', '"[{x",c']
    found = read(write(tmp_path / "a.csv", "\n".join(lines)))
    assert [(row["prompt"][0]["content"], row["response"]) for row in found.rows] == [
        ("two\nlines", "yes"),
        ("hi", 'a "b"'),
        ("[{x", "c"),
    ]
    assert found.locations[1] == f"{tmp_path / 'a.csv'}, row 2 (line 4)"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"a", "the row has 1 cells and the first line 2"),
        (b"a,b,c", "the row has 3 cells and the first line 2"),
        (b"a, ", "'response' is empty"),
        (b"\xff,b", "the line is not UTF-8 text"),
    ],
)
def test_bad_rows_of_a_csv_file(tmp_path, line, reason):
    (tmp_path / "a.csv").write_bytes(b"prompt,response\nq,r\n" + line + b"\n")
    with pytest.raises(UserError, match=rf"a\.csv, row 2 \(line 3\): {reason}"):
        read(tmp_path / "a.csv")
    assert read(tmp_path / "a.csv", bad_rows="skip").reasons == {reason: 1}


def test_csv_with_an_open_quote_and_an_answer_longer_than_the_csv_module_takes(tmp_path):
    with pytest.raises(UserError, match=r"a\.csv, line 2: .*correct the quotes"):
        read(write(tmp_path / "a.csv", 'prompt,response\n"q,r\n'))
    assert len(read(write(tmp_path / "b.csv", f"prompt,response\nq,{'x' * 200_000}\n")).rows[0]["response"]) == 200_000


def test_tsv(tmp_path):
    assert texts(read(write(tmp_path / "a.tsv", "prompt\tx\na, b\tc\n"))) == ["a, b"]


def test_parquet_names_the_row(tmp_path):
    parquet.write_table(pyarrow.table({"prompt": ["a", " "]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 2: 'prompt' is empty"):
        read(tmp_path / "a.parquet")
    assert texts(read(tmp_path / "a.parquet", bad_rows="skip")) == ["a"]


def test_a_broken_parquet_file(tmp_path):
    with pytest.raises(UserError, match="is not a whole Parquet file"):
        read(write(tmp_path / "a.parquet", "PAR1 and nothing else"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty.jsonl", "empty.jsonl gives no data, it is empty"),
        ("bad.jsonl", "none of its rows can be used .the line is not JSON."),
        ("folder", "has no data files"),
        ("data.txt", "data.txt is none of .jsonl"),
        ("org/hub-set", "There is no data source .*hub"),
        ("missing.jsonl", "There is no data source"),
    ],
)
def test_sources_that_cannot_be_used(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "empty.jsonl", "")
    write(tmp_path / "data.txt", "")
    write(tmp_path / "bad.jsonl", "x\n")
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / name, bad_rows="skip")
    assert "\n" not in str(error.value)


def test_pairs_that_are_all_the_same(tmp_path):
    write(tmp_path / "same.jsonl", *[{"prompt": f"q{i}", "chosen": "a", "rejected": "a "} for i in range(3)])
    with pytest.raises(UserError, match=r"same\.jsonl, line 1: chosen and rejected are the same; correct the row, or"):
        read(tmp_path / "same.jsonl")
    with pytest.raises(UserError, match=r"none of its rows can be used \(chosen and rejected are the same\)"):
        read(tmp_path / "same.jsonl", bad_rows="skip")


def test_what_is_reported_of_a_source(tmp_path):
    turns = [*prompt("a"), {"role": "assistant", "content": "b"}, *prompt("c"), {"role": "assistant", "content": "d"}]
    source = write(tmp_path / "a.jsonl", *[PAIR] * 3, {"messages": turns})
    expected = f"{source}: 3 pairs, 2 demonstrations (preference, text; language modeling, messages)"
    assert read(source).describe() == expected


# What a source is called


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("a.jsonl", Source("a.jsonl")),
        ("a.jsonl=2", Source("a.jsonl", "", 2.0)),
        ("a.jsonl=.5", Source("a.jsonl", "", 0.5)),
        ("a=b.jsonl", Source("a=b.jsonl")),
        ("org/name@v1", Source("org/name", "v1")),
        ("org/name@refs/pr/1=0.25", Source("org/name", "refs/pr/1", 0.25)),
        ("me@home/x.jsonl", Source("me", "home/x.jsonl")),
    ],
)
def test_what_a_source_is_called(text, source):
    assert parse_source(text) == source
    assert parse_source(str(source)) == source


def test_a_path_that_is_there_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=2", "me@home.jsonl"):
        write(tmp_path / name, "")
        assert parse_source(name) == Source(name)
    assert parse_source("a=2=3") == Source("a=2", "", 3.0)
    assert absolute("a=2=3") == f"{tmp_path.resolve()}/a=2=3"
    assert absolute("stanfordnlp/SHP@a=2") == f"stanfordnlp/SHP@{tmp_path.resolve()}/a=2"


def test_a_weight_of_nothing(tmp_path):
    with pytest.raises(UserError, match=r"The weight of a\.jsonl is 0: leave the source out"):
        parse_source("a.jsonl=0")


def test_one_source_given_twice(tmp_path):
    source = write(tmp_path / "a.jsonl", PAIR)
    with pytest.raises(UserError, match=r"is given twice as a data source: give it once, with a weight"):
        read_sources(DataSettings(source=[source, source]))


def test_a_preference_for_an_empty_answer_is_left_out(tmp_path):
    empty = replace(preference("ann", "one", "How?"), response_a=" ")
    write(tmp_path / "a.jsonl", *(each.line + "\n" for each in (preference("ann", "one"), empty)))
    found = read(tmp_path)
    assert len(found.rows) == 1 and "one of the two answers is empty" in str(found)


def test_of_a_persons_preferences_on_two_answers_the_last_one_is_trained_on(tmp_path):
    preferences = [
        preference("ann", "one"),
        preference("ben", "one"),
        preference("ann", "tie", "How?"),
        preference("ann", "one", "Why?"),
        preference("ann", "other", swapped=True),
        preference("ann", "other", "How?"),
        preference("ann", "both bad", "Why?"),
    ]
    scored = [{"prompt": "Rated", "response": text, "score": score} for text, score in (("good", 2), ("bad", 1))]
    write(tmp_path / "a.jsonl", *scored)
    source = write(tmp_path / "b.jsonl", *(each.line + "\n" for each in preferences))
    found = read(tmp_path)
    assert [(row["prompt"][0]["content"], row["chosen"]) for row in found.rows] == [
        *(("Rated", "good"), ("Hi?", "No."), ("Hi?", "Yes!"), ("How?", "Yes!")),
    ]
    assert found.locations[1:] == [f"{source}, line {line}" for line in (2, 5, 6)]
    assert "2 left out that the same person judged again" in found.notes
