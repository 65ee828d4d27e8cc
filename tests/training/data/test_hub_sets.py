"""Each known data set on a small fixture: rows of our own in the columns and types of the original.

`SCHEMAS` names for each where its columns were read (page and revision on the hub). The hub is replaced at its one
call, `snapshot_download`, by a directory with the files that the repository has.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import constants, errors
from pyarrow import parquet

from inference.errors import UserError
from training.data.find_files import HUB_SETS, find_set
from training.data.reading import read_sources
from training.data_settings import DataSettings

TEXT = pyarrow.string()
PASSAGES = pyarrow.list_(pyarrow.struct([("docid", TEXT), ("text", TEXT), ("title", TEXT)]))
MKQA_ANSWERS = pyarrow.list_(
    pyarrow.struct([("type", pyarrow.int64()), ("entity", TEXT), ("text", TEXT), ("aliases", pyarrow.list_(TEXT))])
)
QUOTES = pyarrow.struct([("title", pyarrow.list_(TEXT)), ("extract", pyarrow.list_(TEXT))])
QUESTION = pyarrow.struct([("dataset", TEXT), ("id", TEXT), ("full_text", TEXT)])


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def texts(*names):
    return {name: TEXT for name in names}


HH_PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: How do I boil an egg?\n\nAssistant:"
HH_ROW = {"prompt": HH_PROMPT, "response": " Nine minutes.", "chosen": " Nine minutes.", "rejected": " No idea."}
HH_PAIR = {
    "prompt": [user("Hi"), assistant("Hello!"), user("How do I boil an egg?")],
    "chosen": "Nine minutes.",
    "rejected": "No idea.",
}
WEBGPT = {
    "question": {"dataset": "eli5", "id": "x1", "full_text": "Why is the sky blue?"},
    "quotes_0": {"title": ["Sky"], "extract": ["..."]},
    "answer_0": "It is painted [1].",
    "score_0": -0.5,
    "quotes_1": {"title": ["Light"], "extract": ["..."]},
    "answer_1": "Short waves scatter most [1, 2], red ones less [3].",
    "score_1": 0.5,
}
SHP = {
    "post_id": "qt3nxl",
    "domain": "askculinary_train",
    "upvote_ratio": 0.98,
    "history": "How do I keep rice from sticking?",
    "c_root_id_A": "a",
    "c_root_id_B": "b",
    "score_A": 9,
    "score_B": 57,
    "human_ref_A": "Stir it.",
    "human_ref_B": "Rinse it first.",
    "labels": 0,
    "score_ratio": 6.3,
}
JAQUAD = {
    "question": "富士山の高さは?",
    "paragraph_id": "tr-1",
    "paragraph": "富士山は日本の山である。高さは3776mである。",
    "answer": "3776m",
    "sentence": "高さは3776mである。",
    "paragraph_sentence": "富士山は日本の山である。<hl>高さは3776mである。<hl>",
}
MIRACL = {
    "query_id": "1#0",
    "query": "富士山はどこ?",
    "positive_passages": [{"docid": "1#1", "text": "静岡県と山梨県にある。", "title": "富士山"}],
    "negative_passages": [{"docid": "2#1", "text": "琵琶湖は湖である。", "title": "琵琶湖"}],
    "emb": [0.25, 0.5],
}
MIRACL_TYPES = {
    **texts("query_id", "query"),
    "positive_passages": PASSAGES,
    "negative_passages": PASSAGES,
    "emb": pyarrow.list_(pyarrow.float32()),
}
MIRACL_PAIR = {"prompt": [user("富士山はどこ?")], "chosen": "静岡県と山梨県にある。", "rejected": "琵琶湖は湖である。"}
MKQA = {
    "example_id": "563260143484355911",
    "queries": {"en": "how high is mount fuji", "ja": "富士山の高さは", "zh_cn": "富士山有多高"},
    "answers": {
        "ja": [{"type": 5, "entity": "", "text": "3776 m", "aliases": []}],
        "zh_cn": [{"type": 5, "entity": "", "text": "3776米", "aliases": []}],
    },
}
MKQA_TYPES = {
    "example_id": TEXT,
    "queries": pyarrow.struct([("en", TEXT), ("ja", TEXT), ("zh_cn", TEXT)]),
    "answers": pyarrow.struct([("ja", MKQA_ANSWERS), ("zh_cn", MKQA_ANSWERS)]),
}
CONVERTED = "refs/convert/parquet"

SCHEMAS = {
    # name: (page, revision, file in the repository, row, columns' types for Parquet, what it becomes)
    "Dahoas/rm-static": (
        "dataset_infos.json at 7e687518c26ef1c8eeabcf625a4e8428dd728814, files at main 64fd53c",
        "main",
        "data/train-00000-of-00001-2a1df75c6bce91ab.parquet",
        HH_ROW,
        texts("prompt", "response", "chosen", "rejected"),
        HH_PAIR,
    ),
    "Dahoas/full-hh-rlhf": (
        "README.md at main 273ff2a",
        "main",
        "data/train-00000-of-00001.parquet",
        HH_ROW,
        texts("prompt", "response", "chosen", "rejected"),
        HH_PAIR,
    ),
    "Dahoas/synthetic-instruct-gptj-pairwise": (
        "dataset_infos.json at cc92d8d; columns as in d0rj/synthetic-instruct-gptj-pairwise-ru at d9bdf74",
        "main",
        "data/train-00000-of-00001-1e5d57b93c448e7a.parquet",
        {"prompt": "Name a fruit.", "chosen": "A pear.", "rejected": "Fruit is good."},
        texts("prompt", "chosen", "rejected"),
        {"prompt": [user("Name a fruit.")], "chosen": "A pear.", "rejected": "Fruit is good."},
    ),
    "yitingxie/rlhf-reward-datasets": (
        "files at main eaf94e8; the form of the texts from DeepSpeed-Chat's use of them",
        "main",
        "data/train-00000-of-00001-2ea3039ca4da89f8.parquet",
        {"prompt": "\n\nHuman: Name a fruit.\n\n", "chosen": "Assistant: A pear.", "rejected": "Assistant: Fruit?"},
        texts("prompt", "chosen", "rejected"),
        {"prompt": [user("Name a fruit.")], "chosen": "A pear.", "rejected": "Fruit?"},
    ),
    "openai/webgpt_comparisons": (
        "webgpt_comparisons.py (a loading script) at f30e1bd, converted branch at 8193c7b",
        CONVERTED,
        "default/train/0000.parquet",
        WEBGPT,
        {
            "question": QUESTION,
            "quotes_0": QUOTES,
            "answer_0": TEXT,
            "score_0": pyarrow.float32(),
            "quotes_1": QUOTES,
            "answer_1": TEXT,
            "score_1": pyarrow.float32(),
        },
        {
            "prompt": [user("Why is the sky blue?")],
            "chosen": "Short waves scatter most, red ones less.",
            "rejected": "It is painted.",
            "margin": 1.0,
        },
    ),
    "stanfordnlp/SHP": (
        "README.md at main e94b5f3",
        "main",
        "askculinary/train.json",
        SHP,
        None,
        {"prompt": [user(SHP["history"])], "chosen": "Rinse it first.", "rejected": "Stir it."},
    ),
    "sharegpt_alpaca_oa_vicuna": (
        "README.md at main 37b38dc",
        "main",
        "data/train-00000-of-00001-23ed8d98fe776723.parquet",
        {"prompt": "Be kind. USER: Hi ASSISTANT: Hello!</s>USER: And you? ASSISTANT:", "label": "Fine.</s>"},
        texts("prompt", "label"),
        {
            "prompt": [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello!"), user("And you?")],
            "response": "Fine.",
        },
    ),
    "wangrui6/Zhihu-KOL": (
        "README.md at 9c4a816059f2924f414a5896b4f214c5655b9df1",
        "main",
        "data/train-00000-of-00005-a1278ede4e8c5cdb.parquet",
        {"INSTRUCTION": "怎么煮鸡蛋?", "RESPONSE": "九分钟。", "SOURCE": "Zhihu", "METADATA": "{}"},
        texts("INSTRUCTION", "RESPONSE", "SOURCE", "METADATA"),
        {"prompt": [user("怎么煮鸡蛋?")], "response": "九分钟。"},
    ),
    "Hello-SimpleAI/HC3-Chinese": (
        "HC3-Chinese.py (a loading script) and all.jsonl beside it at main 09a687b",
        "main",
        "all.jsonl",
        {"question": "怎么煮鸡蛋?", "human_answers": ["九分钟。"], "chatgpt_answers": ["..."], "source": "baike"},
        None,
        {"prompt": [user("怎么煮鸡蛋?")], "response": "九分钟。"},
    ),
    "mkqa-Chinese": (
        "apple/mkqa README.md and mkqa.py (a loading script, its data elsewhere) at main 3251318",
        CONVERTED,
        "mkqa/train/0000.parquet",
        MKQA,
        MKQA_TYPES,
        {"prompt": [user("富士山有多高")], "response": "3776米"},
    ),
    "mkqa-Japanese": (
        "apple/mkqa README.md and mkqa.py (a loading script, its data elsewhere) at main 3251318",
        CONVERTED,
        "mkqa/train/0000.parquet",
        MKQA,
        MKQA_TYPES,
        {"prompt": [user("富士山の高さは")], "response": "3776 m"},
    ),
    "lmqg/qg_jaquad": (
        "qg_jaquad.py (a loading script) at 3fef4e9e7a6596c9f7b145f1639b7233910fb447, README.md at 2cbadf7",
        "main",
        "data/processed/train00.jsonl",
        JAQUAD,
        None,
        {"prompt": [user("富士山の高さは?")], "response": "高さは3776mである。"},
    ),
    "lmqg/qag_jaquad": (
        "process.py at main, qag_jaquad.py (a loading script) at 1382b500053d4f5a155b8868c5e218cc8b677316",
        "main",
        "data/processed/train.jsonl",
        {
            "paragraph": JAQUAD["paragraph"],
            "questions": ["富士山の高さは?", "富士山とは?"],
            "answers": ["3776m", "日本の山"],
            "questions_answers": "question: 富士山の高さは?, answer: 3776m | question: 富士山とは?, answer: 日本の山",
        },
        None,
        {"prompt": [user("富士山の高さは?")], "response": JAQUAD["paragraph"]},
    ),
    "Cohere/miracl-zh-queries-22-12": (
        "README.md at main 125f282 (the same columns as the Japanese one)",
        "main",
        "data/train-00000-of-00001.parquet",
        MIRACL,
        MIRACL_TYPES,
        MIRACL_PAIR,
    ),
    "Cohere/miracl-ja-queries-22-12": (
        "README.md at 46d49461b36bf03945d8ced94b62f7a90bc9acae",
        "main",
        "data/train-00000-of-00001.parquet",
        MIRACL,
        MIRACL_TYPES,
        MIRACL_PAIR,
    ),
}


def write_file(file: Path, rows, types):
    file.parent.mkdir(parents=True, exist_ok=True)
    if types is not None:
        columns = {name: pyarrow.array([row[name] for row in rows], kind) for name, kind in types.items()}
        parquet.write_table(pyarrow.table(columns), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_fixture(directory: Path, name: str, *more) -> Path:
    """The set's training file (its row, and `more`), with a test file beside it that must not be read."""
    _, _, path, row, types, _ = SCHEMAS[name]
    write_file(directory / path, [row, *more], types)
    other = Path(path.replace("train", "test", 1))
    if other != Path(path):
        write_file(directory / other, [row] * 5, types)
    return directory


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub: a directory for each repository and revision. Remembers what was asked."""
    asked = []

    def snapshot_download(repository, *, repo_type, revision, allow_patterns):
        assert repo_type == "dataset"
        asked.append((repository, revision or "main"))
        directory = tmp_path / "hub" / repository.replace("/", "--") / (revision or "main").replace("/", "--")
        if not directory.exists():
            raise errors.RevisionNotFoundError.__new__(errors.RevisionNotFoundError)
        snapshot = tmp_path / "cache" / repository.replace("/", "--") / "0123456789abcdef"
        files = [file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()]
        for file in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / file).write_bytes((directory / file).read_bytes())
        snapshot.mkdir(parents=True, exist_ok=True)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return tmp_path / "hub", asked


def repository(hub, name, revision="main"):
    directory = hub[0] / name.replace("/", "--") / revision.replace("/", "--")
    directory.mkdir(parents=True)
    return directory


def read(source, **settings):
    (found,) = read_sources(DataSettings(source=source, **settings), lambda line: None)
    return found


def test_the_table_is_whole():
    assert {id(find_set(name)) for name in SCHEMAS} == {id(each) for each in HUB_SETS}


@pytest.mark.parametrize("name", SCHEMAS)
def test_from_the_hub(hub, name):
    _, revision, _, _, _, expected = SCHEMAS[name]
    known = find_set(name)
    directory = repository(hub, known.repository, revision)
    if revision == CONVERTED:
        (repository(hub, known.repository) / "script.py").write_text("raise SystemExit('never run')")
    write_fixture(directory, name)
    found = read(name)
    assert found.rows == [expected]
    assert hub[1][-1] == (known.repository, revision)
    assert found.notes == [f"revision {CONVERTED + ' at ' if revision == CONVERTED else ''}0123456789ab"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_from_a_copy(tmp_path, monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    found = read(f"{name}@{write_fixture(tmp_path / 'copy', name)}")
    assert found.rows == [SCHEMAS[name][5]]


def test_mkqas_own_file(tmp_path):
    """The original, which its loading script fetches: answers by language, types as words."""
    row = {**MKQA, "answers": {"ja": [{"type": "number", "entity": None, "text": "3776 m", "aliases": []}]}}
    (tmp_path / "mkqa.jsonl").write_text(json.dumps(row))
    assert read(f"mkqa-Japanese@{tmp_path / 'mkqa.jsonl'}").rows[0]["response"] == "3776 m"


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("openai/webgpt_comparisons", {"score_0": 0.5}, "both answers have the same score"),
        ("Cohere/miracl-ja-queries-22-12", {"negative_passages": []}, "'negative_passages.0.text' is empty in the set"),
        ("sharegpt_alpaca_oa_vicuna", {"label": None}, "'label' is empty in the set"),
        (
            "mkqa-Japanese",
            {"answers": {"ja": [{"text": None}], "zh_cn": []}},
            "'answers.ja.0.text' is empty in the set",
        ),
    ],
)
def test_what_a_set_leaves_open_is_left_out_and_counted(tmp_path, name, changes, reason):
    directory = write_fixture(tmp_path, name, {**SCHEMAS[name][3], **changes})
    found = read(f"{name}@{directory}", bad_rows="refuse")
    assert found.rows == [SCHEMAS[name][5]] and found.reasons == {reason: 1}
    assert found.left_out[0][0].endswith("row 2")


def test_a_column_that_is_missing_is_named(tmp_path):
    (tmp_path / "all.jsonl").write_text('{"question": "q", "answers": ["a"]}')
    with pytest.raises(UserError, match=r"all\.jsonl, line 1: there is no 'human_answers\.0'"):
        read(f"Hello-SimpleAI/HC3-Chinese@{tmp_path}")


def test_a_preference_the_other_way_round(tmp_path):
    write_file(tmp_path / "x" / "train.json", [SHP, {**SHP, "labels": 1}], None)
    assert read(f"stanfordnlp/SHP@{tmp_path}").rows[1]["chosen"] == "Stir it."


# Data sets that we do not know


def test_any_other_data_set_in_trls_formats(hub):
    directory = repository(hub, "org/mine", "v2")
    write_file(directory / "data" / "train-00000-of-00001.parquet", [HH_ROW], texts("prompt", "chosen", "rejected"))
    write_file(directory / "data" / "test-00000-of-00001.parquet", [HH_ROW] * 3, texts("prompt", "chosen", "rejected"))
    (directory / "dataset_infos.json").write_text("{}")
    assert read("org/mine@v2").rows == [HH_PAIR]
    assert set(hub[1]) == {("org/mine", "v2")}


def test_a_data_set_without_a_training_split(hub):
    write_file(repository(hub, "org/mine") / "rows.jsonl", [HH_ROW], None)
    assert read("org/mine").rows == [HH_PAIR]


def test_a_data_set_that_was_saved_and_then_put_on_the_hub(hub):
    rows = {"train": Dataset.from_list([HH_ROW]), "test": Dataset.from_list([HH_ROW] * 3)}
    DatasetDict(rows).save_to_disk(str(repository(hub, "org/mine")))
    found = read("org/mine")
    assert found.rows == [HH_PAIR] and found.notes[1] == "read: train/*.arrow"


@pytest.mark.parametrize(
    ("read_file", "left"),
    [
        ("Train.jsonl", ("Test.jsonl",)),
        ("hh_train.jsonl", ("hh_val.jsonl", "constraints.jsonl")),
        ("TRAIN/a.jsonl", ("DEV/b.jsonl",)),
        ("rows.jsonl", ("rows_test.jsonl", "constraints_eval.jsonl")),
    ],
)
def test_held_out_files_of_the_hub_are_not_read(hub, read_file, left):
    directory = repository(hub, "org/mine")
    write_file(directory / read_file, [HH_ROW], None)
    for name in left:
        write_file(directory / name, [HH_ROW] * 3, None)
    found = read("org/mine")
    assert found.rows == [HH_PAIR]
    assert found.notes[1].startswith(f"read: {read_file}")
    if "train" in read_file.lower():  # nor loaded
        assert not any((hub[0].parent / "cache").rglob(Path(left[0]).name))


def test_a_converted_data_set_with_several_configurations(hub):
    repository(hub, "org/mine")
    for name in ("a", "b"):
        file = hub[0] / "org--mine" / CONVERTED.replace("/", "--") / name / "train" / "0000.parquet"
        write_file(file, [HH_ROW], texts("prompt"))
    with pytest.raises(UserError, match=r"several configurations \(a, b\): download the one that you want"):
        read("org/mine")


def test_a_script_without_a_converted_branch(hub):
    (repository(hub, "apple/mkqa") / "mkqa.py").write_text("")
    with pytest.raises(UserError, match=r"apple/mkqa has no data files .*give --data mkqa-Japanese@FILE"):
        read("mkqa-Japanese")


def test_a_revision_that_is_not_there(hub):
    with pytest.raises(UserError, match="org/mine has no revision 'v9': give a branch, a tag or a whole commit"):
        read("org/mine@v9")


@pytest.mark.parametrize("name", ["Dahoas/rm-static", "org/mine"])
def test_without_a_network(monkeypatch, name):
    """What the hub's library raised on a machine without one."""

    def fail(*arguments, **options):
        raise errors.LocalEntryNotFoundError(
            "An error happened while trying to locate the files on the Hub and we cannot find the appropriate snapshot "
            "folder for the specified revision on the local disk."
        )

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="the hub cannot be reached for it: check the network") as caught:
        read(name)
    assert f"--local-dir DIR, then --data {name}@DIR" in str(caught.value) and "\n" not in str(caught.value)


def test_offline_with_the_hubs_own_library_and_its_cache(tmp_path):
    """The real library, in a process of its own: it reads HF_HUB_OFFLINE and HF_HOME when imported."""
    commit = "0" * 40
    folder = tmp_path / "hub" / "datasets--Dahoas--rm-static"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    write_fixture(folder / "snapshots" / commit, "Dahoas/rm-static")
    code = (
        "from training.config import DataSettings; from training.data.reading import read_sources\n"
        "from inference.errors import UserError\n"
        "for name in ('Dahoas/rm-static', 'Dahoas/full-hh-rlhf'):\n"
        "    try: print(len(read_sources(DataSettings(source=name), lambda line: None)[0].rows))\n"
        "    except UserError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    first, second = done.stdout.strip().splitlines()
    assert first == "1" and "HF_HUB_OFFLINE is set: unset it once, or use a copy" in second
