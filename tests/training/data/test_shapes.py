"""Columns and messages as other tools have them, each against the row that it must become."""

import json

import pytest

from tests.training.data.parsing import parse_row
from training.data.entries import BadRow


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


DEMONSTRATION = {"prompt": [user("q")], "response": "r"}
WITH_SYSTEM = {"prompt": [system("s"), user("q")], "response": "r"}
WITH_HISTORY = {"prompt": [system("s"), user("a"), assistant("b"), user("q")], "response": "r"}
PAIR = {"prompt": [user("q")], "chosen": "good", "rejected": "bad"}
PAIR_WITH_SYSTEM = {**PAIR, "prompt": [system("s"), user("q")]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # ShareGPT
        ({"conversations": [human("q"), gpt("r")]}, DEMONSTRATION),
        ({"id": "x", "system": "s", "conversations": [human("q"), gpt("r")]}, WITH_SYSTEM),
        ({"conversations": [{"from": "system", "value": "s"}, human("q"), gpt("r")]}, WITH_SYSTEM),
        ({"conversations": [user("q"), assistant("r")]}, DEMONSTRATION),
        ({"conversation": [user("q"), assistant("r")]}, DEMONSTRATION),
        ({"messages": [{"from": "User", "value": "q"}, {"from": "ChatGPT", "value": "r"}]}, DEMONSTRATION),
        ({"conversations": [human("q")], "chosen": gpt("good"), "rejected": gpt("bad")}, PAIR),
        ({"conversations": {"from": ["human", "gpt"], "value": ["q", "r"], "weight": [None, 1]}}, DEMONSTRATION),
        # Alpaca
        ({"instruction": "q", "input": "", "output": "r"}, DEMONSTRATION),
        ({"instruction": "q", "output": "r", "text": "Below is an instruction ..."}, DEMONSTRATION),
        ({"instruction": "add", "input": "1 2", "output": "3"}, {"prompt": [user("add\n\n1 2")], "response": "3"}),
        ({"instruction": "q", "output": "r", "system": "s", "history": []}, WITH_SYSTEM),
        ({"instruction": "q", "input": "", "output": "r", "system": "s", "history": [["a", "b"]]}, WITH_HISTORY),
        ({"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"}, PAIR),
        ({"input": "q", "output": "r"}, DEMONSTRATION),
        ({"instruction": "q", "context": "", "response": "r", "category": "x"}, DEMONSTRATION),  # Dolly
        ({"system_prompt": "s", "question": "q", "response": "r"}, WITH_SYSTEM),  # OpenOrca
        ({"instruction": "q"}, {"prompt": [user("q")]}),
        # columns beside TRL's
        ({"system": "s", "prompt": "q", "response": "r"}, WITH_SYSTEM),
        ({"system": "s", "prompt": "q", "response": "r", "history": '[["a", "b"]]'}, WITH_HISTORY),
        ({"system": "s", "prompt": [user("q")], "response": "r", "history": [user("a"), assistant("b")]}, WITH_HISTORY),
        ({"system": "s", "messages": [system("s"), user("q"), assistant("r")]}, WITH_SYSTEM),
        ({"system": "s", "text": "Human: q\n\nAssistant: r"}, WITH_SYSTEM),
        ({"system": "s", "prompt": "q", "answer": 4}, {"prompt": [system("s"), user("q")], "extra": {"answer": 4}}),
        (
            {"system": "s", "prompt": "q", "chosen": "good", "rejected": "bad"},
            PAIR_WITH_SYSTEM,
        ),
        (
            {"system": "s", "chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
            PAIR_WITH_SYSTEM,
        ),
        (
            {
                "system": "s",
                "prompt": "q",
                "chosen": [user("q"), assistant("good")],
                "rejected": [user("q"), assistant("bad")],
            },
            PAIR_WITH_SYSTEM,
        ),
        (
            {"system": "s", "chosen": "Human: q\n\nAssistant: good", "rejected": "Human: q\n\nAssistant: bad"},
            PAIR_WITH_SYSTEM,
        ),
        # other spellings
        ({"Prompt": "q", " RESPONSE ": "r", "": "7", "Unnamed: 0": "7", "__index_level_0__": 7}, DEMONSTRATION),
        (
            {"prompt": "q", "answer": 4, "": "7", "__index_level_0__": 7},
            {"prompt": [user("q")], "extra": {"answer": 4}},
        ),
        ({"messages": [{"role": "developer", "content": "s"}, user("q"), assistant("r")]}, WITH_SYSTEM),
        ({"messages": [system(""), user("q"), assistant("r")]}, DEMONSTRATION),
        ({"messages": [system(" \n"), user("q"), assistant("r")]}, DEMONSTRATION),
        ({"system": "s", "input": "q", "chosen": "good", "rejected": "bad"}, PAIR_WITH_SYSTEM),  # as distilabel has it
        ({"input": "q", "response": "r"}, DEMONSTRATION),
        ({"messages": [user([{"type": "text", "text": "q"}]), assistant("r")]}, DEMONSTRATION),
        ({"messages": [user("q"), {**assistant("r"), "tool_calls": []}], "tools": "[]"}, DEMONSTRATION),
        (
            {
                "input": {"messages": [user("q")], "tools": []},
                "preferred_output": [assistant("good")],
                "non_preferred_output": [assistant("bad")],
            },
            PAIR,
        ),
    ],
)
def test_shapes(row, expected):
    assert parse_row(row) == [expected]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tools": [{"name": "w"}], "messages": [user("q"), assistant("r")]}, "'tools' beside the messages"),
        ({"messages": [user("q"), {**assistant(None), "tool_calls": [{"id": "1"}]}]}, "calls or answers a tool"),
        ({"messages": [user("q"), {"role": "assistant", "function_call": {"name": "f"}}]}, "calls or answers a tool"),
        ({"conversations": [human("q"), {"from": "function_call", "value": "{}"}]}, "calls or answers a tool"),
        ({"messages": [user("q"), {"role": "tool", "content": "x"}, assistant("r")]}, "calls or answers a tool"),
        (
            {"messages": [user([{"type": "image_url", "image_url": {}}]), assistant("r")]},
            "is no text .image_url.: only",
        ),
        ({"system": "s", "prompt": [system("t"), user("q")], "response": "r"}, "there are two system messages"),
        ({"messages": repr([[user("q")], [user("p")]])}, "'messages' is the text of several lists of messages"),
        ({"prompt": "q", "response": b"\xff"}, "'response' is not UTF-8 text"),
        ({"question": "q", "answer": "a"}, "no known keys .found: question, answer"),
        ({"instruction": "q", "output": ""}, "'response' is empty"),
        ({"prompt": "q", "response": "r", "history": [["a", None]]}, "'history' has a turn that is not a"),
    ],
)
def test_what_is_refused(row, reason):
    with pytest.raises(BadRow, match=reason):
        parse_row(row)


# Messages in a text

MESSAGES = [system('a "b" it\'s'), user("q\n1 [x] {y}"), assistant("r")]
EXPECTED = [{"prompt": MESSAGES[:2], "response": "r"}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(MESSAGES),
        json.dumps(MESSAGES, indent=2),
        repr(MESSAGES),
        f"  {MESSAGES!r}\n",
        repr([{**message, "name": None} for message in MESSAGES]),
        repr([{"weight": 1, **message} for message in MESSAGES]),
        json.dumps(json.dumps(MESSAGES)),
        repr(tuple(MESSAGES)),
        repr([MESSAGES]),
        json.dumps({"messages": MESSAGES}),
    ],
)
def test_messages_in_a_text(text):
    assert parse_row({"messages": text}) == EXPECTED
    assert parse_row({"conversations": text}) == EXPECTED
    assert parse_row({"text": text}) == EXPECTED


def test_sharegpts_messages_and_single_ones_in_a_text():
    assert parse_row({"conversations": repr([human("q"), gpt("r")])}) == [DEMONSTRATION]
    row = {"prompt": repr([user("q")]), "chosen": json.dumps(assistant("good")), "rejected": str(assistant("bad"))}
    assert parse_row(row) == [PAIR]


@pytest.mark.parametrize(
    "text",
    [
        str([user("q")])[:-1],  # cut
        json.dumps([user("q")])[:30],
        "[{'role': 'user', 'content': 'q'}\n {'role': 'assistant', 'content': 'r'}]",  # as numpy prints them
        "array([{'content': 'q', 'role': 'user'}], dtype=object)",
        "[{'role': 'user', 'content': 'it's'}]",
        "[Message(role='user', content='q')]",
    ],
)
@pytest.mark.parametrize("key", ["prompt", "response", "chosen"])
def test_messages_in_a_text_that_cannot_be_read(text, key):
    with pytest.raises(BadRow, match=f"'{key}' is the text of a list of messages that is neither JSON nor Python"):
        parse_row({"prompt": "q", "rejected": "b", **({} if key == "chosen" else {"response": "r"}), key: text})


@pytest.mark.parametrize(
    "text",
    [
        '[{"role": "user", "content": "hi"}] is a list. Explain it.',
        "[{'role': 'user', 'content': 'hi'}]\n\nWhat is [this]?",
        '{"role": "admin", "content": "all"}',
        '[{"name": "user", "value": 3}]',
        "[{x",
        "[print(x) for x in range(3)]",
        '{"model": "m", "messages": [{"role": "user", "content": "hi"}]}',
        '{"from": "a@b.org", "value": 3}',
        "{% for message in messages %}{{ message['role'] }}",
    ],
)
def test_other_texts_stay_texts(text):
    assert parse_row({"prompt": text, "response": "r"}) == [{"prompt": [user(text)], "response": "r"}]
