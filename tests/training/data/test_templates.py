"""Rows that the model's chat template refuses, as in unslothai/unsloth #334 (roles that do not alternate) and
hiyouga/LlamaFactory #8217 (no system message)."""

import json
from pathlib import Path

import pytest

from applications.data import Target, accepted
from inference.chat_format import ChatFormat
from inference.errors import UserError
from training.config import RunConfig
from training.data.chitchat import build_chitchat
from training.data.prepare import demonstrations, prepare_data
from training.data.reading import read_sources
from training.data.rows import read_rows
from training.data_settings import DataSettings

TURNS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' </s> ' }}{% endfor %}assistant: "
IN_TURN = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + TURNS
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
)
PICKY = "{% for m in messages %}{% if 'x' in m['content'] %}{{ m['content'] + 1 }}{% endif %}{% endfor %}" + TURNS
"""Fails without raise_exception, and not by the roles."""


def turns(*texts, first="user"):
    """A conversation of texts; one that begins with `system: ` or `user: ` is that one's."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [
        {"role": text.partition(": ")[0], "content": text.partition(": ")[2]}
        if ": " in text
        else {"role": roles[i % 2], "content": text}
        for i, text in enumerate(texts)
    ]


GOOD = [{"messages": turns(f"q{i}", f"a{i}")} for i in range(10)]
TWICE = {"messages": turns("hello", "user: still there?", "assistant: yes")}
GREETING = {"messages": turns("Welcome!", "hi", "hello", first="assistant")}
SYSTEM = {"messages": turns("system: Be kind.", "user: hi", "assistant: hello")}
LATER = {"messages": turns("system: Be kind.", "user: hi", "assistant: a", "user: b", "user: c", "assistant: d")}
PAIR = {"prompt": turns("system: Be kind.", "user: hi"), "chosen": "a", "rejected": "b"}
PROMPT = {"prompt": turns("hello", "user: still there?")}


@pytest.fixture
def format_with(word_format, monkeypatch):
    def change(template: str) -> ChatFormat:
        monkeypatch.setattr(word_format.tokenizer, "chat_template", template)
        return word_format

    return change


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("template", "row", "said"),
    [
        (IN_TURN, TWICE, r"refuses the row \(roles must alternate\)"),
        (IN_TURN, GREETING, r"refuses the row \(roles must alternate\)"),
        (IN_TURN, PROMPT, r"refuses the row \(roles must alternate\)"),
        (IN_TURN, SYSTEM, r"refuses a system message, whose text can stand before the question \(roles must"),
        (IN_TURN, LATER, r"refuses the row \(roles must alternate\)"),  # without the system message too
        (NO_SYSTEM, SYSTEM, r"refuses a system message, .* \(System role not supported\)"),
        (NO_SYSTEM, PAIR, r"refuses a system message, .* \(System role not supported\)"),
        (PICKY, {"prompt": "x", "response": "y"}, r"refuses the row \(can only concatenate str"),
    ],
)
def test_a_refused_row_is_named_with_its_file_and_line_and_the_way_out(tmp_path, format_with, template, row, said):
    source = write(tmp_path / "a.jsonl", [*GOOD, row])
    with pytest.raises(UserError, match=rf"a\.jsonl, line 11: the model's chat template {said}.*data\.bad_rows=skip"):
        prepare_data(DataSettings(source=source), 1, tmp_path / "data", format_with(template), print)
    assert not (tmp_path / "data").exists()


def test_skipped_rows_are_counted_with_their_places(tmp_path, format_with):
    source = write(tmp_path / "a.jsonl", [*GOOD, TWICE, GREETING, SYSTEM])
    settings = DataSettings(source=source, bad_rows="skip")
    counts = prepare_data(settings, 1, tmp_path / "data", format_with(IN_TURN), lambda line: None)
    assert list(counts.skipped.values()) == [2, 1]
    assert counts.places["the model's chat template refuses the row (roles must alternate)"] == [
        f"{source}, line 11",
        f"{source}, line 12",
    ]
    rows = [row for name in ("sft_train", "sft_eval") for row in read_rows(tmp_path / "data" / f"{name}.jsonl")]
    assert len(rows) == 10


def test_without_a_tokenizer_nothing_is_refused(tmp_path):
    (found,) = read_sources(DataSettings(source=write(tmp_path / "a.jsonl", [TWICE])), lambda line: None)
    assert len(found.rows) == 1 and not found.left_out


def test_demonstrations_beside_ppo_are_judged_too(tmp_path, format_with):
    source = write(tmp_path / "a.jsonl", [*GOOD, TWICE])
    config = RunConfig(model="m", rlhf={"ptx": {"source": source}})
    with pytest.raises(UserError, match="line 11: the model's chat template refuses"):
        demonstrations(config, tmp_path, format_with(IN_TURN))


def test_rows_of_a_run_that_began_before_templates_were_asked_are_kept_apart(tmp_path, format_with):
    prompts = [turns("hi"), TWICE["messages"][:2]]
    file = write(tmp_path / "sft_train.jsonl", [{"prompt": prompt, "response": "yes"} for prompt in prompts])
    opened = Target(DataSettings(), format_with(IN_TURN))
    lines = accepted(opened, Path(file))
    assert [row["prompt"] for row in lines.rows] == prompts[:1] and lines.locations == [f"{file}, line 1"]
    assert opened.left_out == [
        (f"{file}, line 2", "the model's chat template refuses the row (roles must alternate)", True)
    ]


def test_the_embedded_dialogues_say_what_the_template_refuses(format_with):
    with pytest.raises(UserError, match=r"chitchat begin with a system message.*System role not supp.*--data"):
        build_chitchat([], {}, DataSettings(), 1, format_with(NO_SYSTEM))
