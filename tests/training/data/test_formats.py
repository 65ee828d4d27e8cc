import pytest

from tests.training.data.parsing import parse_row
from training.data.entries import BadRow, LeftOut
from training.data.files import parse_line
from training.data.formats import format_of, read_row, trl_row
from training.data.split import split_rows


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


PAIR_OF_TEXTS = {"prompt": "q", "chosen": "good", "rejected": "bad"}
PAIR = {"prompt": [user("q")], "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": " good", "rejected": "bad\n", "source": "ignored"},
        {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"prompt": "q", "chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
        {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " good", "rejected": " bad"},
        {
            "prompt": "\n\nHuman: q\n\nAssistant:",
            "chosen": "\n\nHuman: q\n\nAssistant: good",
            "rejected": "\n\nHuman: q\n\nAssistant: bad",
        },
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        {
            "prompt": "q",
            "chosen": "good",
            "rejected": "bad",
            "messages": [user("q"), assistant("good")],  # as in ultrafeedback_binarized
        },
    ],
)
def test_pairs(row):
    assert parse_row(row) == [PAIR]


def test_pair_of_conversations_keeps_the_system_message_that_the_prompt_text_lacks():
    start = [system("s"), user("q")]
    row = {"prompt": "q", "chosen": [*start, assistant("good")], "rejected": [*start, assistant("bad")]}
    assert parse_row(row) == [{**PAIR, "prompt": start}]


def test_pair_with_several_turns_in_the_common_beginning():
    start = [user("a"), assistant("b"), user("c")]
    row = {"chosen": [*start, assistant("good")], "rejected": [*start, assistant("bad")]}
    assert parse_row(row) == [{**PAIR, "prompt": start}]
    text = "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert parse_row({"prompt": text, "chosen": "good", "rejected": "bad"}) == [{**PAIR, "prompt": start}]


@pytest.mark.parametrize("prompt", ["a", [user("a")], "c"])
def test_pair_whose_conversations_go_on_behind_the_prompt(prompt):
    """As in orpo-dpo-mix, where the prompt is the first or the last question of several."""
    start = [user("a"), assistant("b"), user("c")]
    row = {"prompt": prompt, "chosen": [*start, assistant("good")], "rejected": [*start, assistant("bad")]}
    assert parse_row(row) == [{**PAIR, "prompt": start}]
    if prompt != "c":
        assert parse_row({**row, "chosen": row["chosen"][1:]}) == [{**PAIR, "prompt": start}]


def test_an_answer_that_quotes_another_dialogue_is_text():
    quoted = "Human: x\n\nAssistant: y"
    assert parse_row({"prompt": "q", "response": quoted}) == [{"prompt": [user("q")], "response": quoted}]
    with pytest.raises(BadRow, match="not one answer"):
        parse_row({"prompt": "q", "response": [user("x"), assistant("y")]})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "response": "r"},
        {"prompt": "q", "completion": " r"},
        {"prompt": [user("q")], "completion": [assistant("r")]},
        {"messages": [user("q"), assistant("r")]},
        {"text": "Human: q\n\nAssistant: r"},
        {"prompt": "q", "completion": "r", "label": True},
    ],
)
def test_demonstrations(row):
    assert parse_row(row) == [{"prompt": [user("q")], "response": "r"}]


def test_each_answer_of_a_conversation_is_a_row():
    turns = [system("s"), user("a"), assistant("b"), user("c"), assistant("d")]
    assert parse_row({"messages": turns}) == [
        {"prompt": turns[:2], "response": "b"},
        {"prompt": turns[:4], "response": "d"},
    ]


def test_a_greeting_of_the_assistant_is_context_only():
    turns = [assistant("hello"), user("a"), assistant("b")]
    assert parse_row({"messages": turns}) == [{"prompt": turns[:2], "response": "b"}]


def test_other_keys_of_a_prompt_are_kept_for_a_reward_function():
    row = {"prompt": "2 + 2?", "answer": 4, "level": "easy"}
    parsed = parse_row(row)
    assert parsed == [{"prompt": [user("2 + 2?")], "extra": {"answer": 4, "level": "easy"}}]
    sets = split_rows(parsed * 3, (1, 1, 1), 0.1, seed=0)
    assert sets.prompts_train + sets.prompts_eval == parsed * 3


def test_prompt_alone():
    assert parse_row({"prompt": "q"}) == [{"prompt": [user("q")]}]
    assert parse_row({"prompt": [system("s"), user("q")]}) == [{"prompt": [system("s"), user("q")]}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b"[1]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"text": "x"}', "'text' is not of the form Human"),
        (b'{"title": "x"}', "no known keys"),
        (b"{}", "no known keys"),
        (b'{"prompt": " "}', "'prompt' is empty"),
        (b'{"prompt": []}', "'prompt' is empty"),
        (b'{"prompt": 3}', "'prompt' is not text or a list of messages"),
        (b'{"prompt": null}', "no known keys .it is empty"),
        (b'{"title": "x", "Body": "y"}', "no known keys .found: title, Body; there must be"),
        (b'{"prompt": "\\ud83d"}', "half a character"),
        (b'{"prompt": "q", "answer": "\\ud83d"}', "a value beside the prompt has half a character"),
        (b'{"prompt": "q", "response": "r", "label": "\\ud83d"}', "the label is [?], which says neither"),
        (b'{"\\ud83d": 1}', "no known keys .found: [?];"),
        (b'{"prompt": ["x"]}', "a message without role and content"),
        (b'{"prompt": [{"role": "user", "content": 1}]}', "'content' is not text"),
        (b'{"prompt": [{"role": "narrator", "content": "x"}]}', "the role 'narrator' is none of system, user, assist"),
        (b'{"prompt": [{"role": ["user"], "content": "x"}]}', "is none of system, user, assistant"),
        (b'{"prompt": [{"role": "assistant", "content": "x"}]}', "does not end with a message of the user"),
        (
            b'{"prompt": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}',
            "system message is not the first",
        ),
        (b'{"prompt": "q", "chosen": "a"}', "'rejected' is missing"),
        (b'{"prompt": "q", "chosen": "a", "rejected": ""}', "'rejected' is empty"),
        (b'{"prompt": "q", "chosen": "a", "rejected": 5}', "'rejected' is not text"),
        (b'{"prompt": "q", "chosen": "a", "rejected": " a "}', "are the same"),
        (b'{"chosen": "a", "rejected": "b"}', "no prompt that both"),
        (b'{"response": "a"}', "'response' without a prompt"),
        (b'{"prompt": "q", "response": ""}', "'response' is empty"),
        (b'{"messages": "x"}', "'messages' is not a list of messages"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "the last message is not the assistant's"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "no message of the assistant answers"),
        (
            b'{"prompt": "q", "chosen": [{"role": "user", "content": "x"}], "rejected": "b"}',
            "no prompt that both",
        ),
    ],
)
def test_bad_rows(line, reason):
    with pytest.raises(BadRow, match=reason):
        value = parse_line(line)
        if isinstance(value, BadRow):
            raise value
        parse_row(value)


def test_answers_that_are_two_messages_are_refused():
    long = [user("q"), assistant("a"), user("b"), assistant("c")]
    with pytest.raises(BadRow, match="not each the prompt and one answer"):
        parse_row({"chosen": long, "rejected": [user("q"), assistant("x")]})


# Labels of unpaired feedback


@pytest.mark.parametrize(
    "label", [True, 1, 1.0, "True", "TRUE", "1", "1.0", "1.00", "+1", " yes", "Good", "thumbs up", "👍"]
)
def test_an_answer_that_is_labelled_as_good_is_a_demonstration(label):
    assert parse_row({"prompt": "q", "completion": "r", "label": label}) == [{"prompt": [user("q")], "response": "r"}]


@pytest.mark.parametrize(
    "label", [False, 0, 0.0, -1, -1.0, "False", "0", "-1", "-1.0", "no", "Bad", "rejected", "thumbs-down", "👎"]
)
def test_an_answer_that_is_labelled_as_bad_is_no_demonstration(label):
    for key in ("label", "kto_tag"):
        with pytest.raises(LeftOut, match="labelled as bad"):
            parse_row({"prompt": "q", "completion": "r", key: label})
        with pytest.raises(LeftOut, match="labelled as bad"):
            parse_row({"messages": [user("q"), assistant("r")], key: label})


@pytest.mark.parametrize(
    ("label", "shown"), [(None, "empty"), (float("nan"), "empty"), (2, "2"), (0.5, "0.5"), ("hm", "hm"), ([1], "[1]")]
)
def test_a_label_that_says_neither_is_a_bad_row(label, shown):
    with pytest.raises(BadRow, match="which says neither good nor bad") as error:
        parse_row({"prompt": "q", "response": "r", "label": label})
    with pytest.raises(BadRow, match="which says neither good nor bad"):
        parse_row({"Prompt": "q", "Response": "r", " Label": label})
    assert f"the label is {shown}, " in str(error.value) and not isinstance(error.value, LeftOut)


def test_a_label_that_is_empty_says_nothing_of_other_rows():
    assert parse_row({"messages": [user("q"), assistant("r")], "label": None}) == parse_row(
        {"prompt": "q", "response": "r"}
    )
    assert parse_row({"prompt": "q", "label": None}) == [{"prompt": [user("q")]}]
    assert parse_row({"prompt": "q", "label": 7}) == [{"prompt": [user("q")], "extra": {"label": 7}}]


# What has no value


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_a_key_without_a_value_is_absent(nothing):
    assert parse_row({**PAIR_OF_TEXTS, "response": nothing, "messages": nothing}) == [PAIR]
    assert parse_row({"prompt": "q", "response": "r", "chosen": nothing}) == parse_row({"prompt": "q", "response": "r"})
    messages = [{**user("q"), "name": nothing, "weight": nothing}, {**assistant("r"), "tool_calls": nothing}]
    assert parse_row({"prompt": nothing, "messages": messages}) == parse_row({"prompt": "q", "response": "r"})
    extra = {"answer": nothing, "info": {"level": 1, "unit": nothing}, "values": [1, nothing]}
    assert parse_row({"prompt": "q", **extra})[0]["extra"] == {"info": {"level": 1}, "values": [1, None]}


# Which answers of a conversation are trained on


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"train": "false"}, {"loss": False}]
)
def test_an_answer_that_is_not_to_be_trained_on_is_context(mark):
    turns = [user("a"), {**assistant("wrong"), **mark}, user("b"), {**assistant("right"), "weight": 1, "train": True}]
    rows = parse_row({"messages": turns})
    assert rows == [{"prompt": [user("a"), assistant("wrong"), user("b")], "response": "right"}]
    with pytest.raises(LeftOut, match="no answer in it is to be trained on"):
        parse_row({"messages": turns[:2]})
    with pytest.raises(LeftOut, match="no answer in it is to be trained on"):
        parse_row({"prompt": "a", "completion": turns[1:2]})
    with pytest.raises(LeftOut, match="no answer in it is to be trained on"):
        parse_row({"prompt": "a", "chosen": turns[1:2], "rejected": "no"})


def test_a_weight_between_is_a_bad_row():
    with pytest.raises(BadRow, match=r"the 'weight' of a message is 0\.5: only 0 and 1"):
        parse_row({"messages": [user("a"), {**assistant("b"), "weight": 0.5}]})


# Keys that say nothing


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b", "score": 1, "id": "x", "tags": []}, {"score", "id"}),
        ({"prompt": "q", "response": "r", "label": True, "lang": "en", "system": ""}, {"lang"}),
        ({"messages": [{**user("q"), "name": "Ann"}, {**assistant("r"), "weight": 1}]}, {"messages.name"}),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}], "id": 1}, {"id"}),
        ({"prompt": "q", "response": "r", "\ud83d": 1}, {"?"}),
        ({"prompt": "q", "answer": 4, "info": [{"a": 1}]}, set()),  # they go to the reward function
        ({"prompt": "q", "response": "r", "history": "long ago"}, {"history"}),
    ],
)
def test_keys_that_are_not_used(row, unused):
    assert read_row(row).unused == unused


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference, text"),
        ({"chosen": [user("q")], "rejected": []}, "preference with implicit prompt, messages"),
        ({"prompt": [user("q")], "completion": [assistant("r")]}, "prompt-completion, messages"),
        ({"prompt": "q", "completion": "r", "label": True}, "unpaired preference, text"),
        ({"messages": [user("q")]}, "language modeling, messages"),
        ({"text": "Human: q"}, "language modeling, text"),
        ({"prompt": "q"}, "prompt-only, text"),
    ],
)
def test_what_trl_calls_a_format(row, name):
    assert format_of(trl_row(row)) == name
