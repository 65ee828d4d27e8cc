"""A value of a file -> rows. The formats are those of TRL, and each value says by its keys which it has.

    {"prompt": ..., "chosen": ..., "rejected": ...}    text or messages; without a prompt, chosen and rejected are
                                                       whole conversations with the same beginning; perhaps a "margin"
    {"messages": [...]}                                a conversation; each answer in it becomes a row
    {"text": ...}                                      a conversation as text
    {"prompt": ..., "response": ...}                   or "completion"; with a "label" beside it (TRL's unpaired
                                                       preference) or a score as reading.py pairs the rows, unless
                                                       answers keep their labels (dpo.loss=kto)
    {"prompt": ...}                                    for step 3 only; other keys go to the reward function

Other names of these columns are known to shapes.py, other spellings of messages to messages.py.
"""

import base64
import json
import math
import re
from dataclasses import dataclass, replace
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, cast

from inference.chat_template import Message
from training.data.entries import BadRow, LeftOut, printable
from training.data.messages import (
    MESSAGE_KEYS,
    check_text,
    is_trained,
    looks_like_messages,
    message_items,
    read_message,
    read_messages,
    read_transcript,
)
from training.data.rated_answers import Rating, each_pair, number, rating_of
from training.data.rows import LabelledRow, PairRow, PromptRow, Row, SFTRow
from training.data.shapes import ANSWERS, LABELS, QUESTIONS, TEXTS, both_bad, in_trls_columns, usual_name

TEXT = frozenset([str])


def plain(value: Any) -> Any:
    """`value` in text, numbers, truth values, lists and objects; what has no value (null, NaN) is None.

    Keys without a value are left out, also further in: a table has a value for every column of every row, and JSON
    lines only for those that a row has.
    """
    if isinstance(value, dict):
        if TEXT.issuperset(map(type, value.values())):  # as of most messages
            return value
        return {key: new for key, old in value.items() if (new := plain(old)) is not None}
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], tuple) and all(len(item) == 2 for item in value):  # a map of Arrow
            return plain({str(key): item for key, item in value})
        return [plain(item) for item in value]
    return plain_scalar(value)


def plain_scalar(value: Any) -> Any:
    """Dates and times as ISO 8601 writes them, durations in seconds, bytes as the text they hold, or in base64."""
    if value != value:  # NaT, a Decimal that is no number
        return None
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        number = float(value)
        return number if Decimal(repr(number)) == value else str(value)  # all digits, if a float loses some
    if isinstance(value, (bytes, bytearray)):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return plain(value.item()) if hasattr(value, "item") else str(value)


KNOWN_KEYS = (
    "prompt + chosen + rejected, messages, prompt + response, or prompt; or ShareGPT's conversations, or Alpaca's "
    "instruction + output"
)
HINTS = [
    (
        {question, answer},
        f"call them prompt and response to learn the {answer}, or prompt and {answer} for a reward function",
    )
    for question in QUESTIONS
    for answer in ("answer", "solution", "answers", "final_answer")
]
"""Keys that may be meant in several ways -> what to do."""
UNPAIRED = "unpaired preference"
KEYS_NAMED = 6
NOTHING: tuple[Any, ...] = ("", [], {}, "[]", "{}", "null")
"""Values of a column that need no word when it is not used."""
NOT_TRAINED = "no answer in it is to be trained on (weight 0, or train false)"
MARGIN_BELOW_0 = "its margin is below 0, so the chosen answer is not said to be the better one"
GOOD_LABELS = frozenset(
    "true t yes y 1 +1 good positive pos chosen accepted accept preferred desirable desired correct right win "
    "like liked thumbs_up thumbsup thumb_up up upvote upvoted helpful 👍".split()
)
BAD_LABELS = frozenset(
    "false f no n 0 -1 bad negative neg rejected reject dispreferred undesirable undesired incorrect wrong "
    "lose loss dislike disliked thumbs_down thumbsdown thumb_down down downvote downvoted unhelpful 👎".split()
)
"""Spellings of a label, in small letters and with _ between words."""


@dataclass(frozen=True)
class ReadRow:
    rows: list[Row]  # several for a conversation with several answers
    format: str
    unused: frozenset[str] = frozenset()  # keys that say nothing here; those of messages with `messages.` before them
    extra: frozenset[str] = frozenset()  # keys beside a prompt, which a reward function gets
    rating: Rating | None = None  # of the last answer


def read_row(value: Any, every: bool = False, keeps_labels: bool = False) -> ReadRow:
    """Read what a value gives: `every` pair of rated answers, or best and worst; labels may stay. Raises BadRow."""
    values = (keeps_labels and both_bad(value)) or each_pair(value, every)
    first, *others = [read_one(row, keeps_labels) for row in values]
    return replace(first, rows=[*first.rows, *(row for read in others for row in read.rows)])


def read_one(value: Any, keeps_labels: bool = False) -> ReadRow:
    row = trl_row(value)
    rows = parse_trl_row(row)
    extra = frozenset(cast(PromptRow, rows[0]).get("extra", ()))
    rating = read_rating(row)
    if rating is not None and rating.is_bad:
        rows = rows[-1:]
    if rating is not None and rating.is_label and keeps_labels:
        rows[-1] = cast(LabelledRow, {**rows[-1], "label": not rating.is_bad})
        rating = None
    return ReadRow(rows, format_of(row), unused_keys(row), extra, rating)


def trl_row(value: Any) -> dict[str, Any]:
    """Return the value under TRL's names and without keys that have no value; only a label may have none."""
    if looks_like_messages(value):
        value = {"messages": value}
    if not isinstance(value, dict):
        raise BadRow("the line is not a JSON object")
    for key, cell in value.items():
        if isinstance(cell, bytes) and key in TEXTS:
            require_utf8(cell, key)
    row = plain(value)
    labels = {name: None for name in value.keys() - row.keys() if usual_name(str(name)) in LABELS}
    row = in_trls_columns({**row, **labels})
    return row if any(name in row for name in ANSWERS) else {k: v for k, v in row.items() if v is not None}


def require_utf8(cell: bytes, key: str) -> None:
    try:
        cell.decode()
    except UnicodeDecodeError:
        raise BadRow(f"'{key}' is not UTF-8 text") from None


def parse_trl_row(row: dict[str, Any]) -> list[Row]:
    if "chosen" in row or "rejected" in row:
        return [parse_pair(row)]
    for key in ANSWERS:
        if key in row:
            return [parse_answer(row, key)]
    if "messages" in row:
        return parse_conversation(row["messages"])
    if "prompt" in row:
        prompt = PromptRow(prompt=check_prompt(read_prompt(row["prompt"])))
        extra = {key: value for key, value in row.items() if key != "prompt"}
        if printable(text := json.dumps(extra, ensure_ascii=False)) != text:
            raise BadRow("a value beside the prompt has half a character")
        return [{**prompt, "extra": extra} if extra else prompt]
    if "text" in row:
        messages = read_transcript(check_text(row["text"], "text"))
        if not messages:
            raise BadRow("'text' is not of the form Human: ... Assistant: ...")
        return parse_conversation(messages)
    keys = ", ".join(str(key)[:30] for key in list(row)[:KEYS_NAMED]) + ", ..." * (len(row) > KEYS_NAMED)
    hint = next(
        (hint for keys, hint in HINTS if keys <= {str(key).lower() for key in row}), f"there must be {KNOWN_KEYS}"
    )
    raise BadRow(f"no known keys ({f'found: {keys}' if row else 'it is empty'}; {hint})")


def format_of(row: dict[str, Any]) -> str:
    """Say what TRL calls the format of a row that parse_trl_row takes, and how its texts are given."""
    has_label = any(name in row for name in LABELS)
    if "chosen" in row:
        name, text = "preference" if "prompt" in row else "preference with implicit prompt", row["chosen"]
    elif answer := next((key for key in ANSWERS if key in row), None):
        name = UNPAIRED if has_label else "prompt-completion"
        text = row[answer]
    elif "prompt" in row and "messages" not in row:
        name, text = "prompt-only", row["prompt"]
    else:
        name, text = UNPAIRED if has_label and "messages" in row else "language modeling", row.get("messages", "")
    return f"{name}, {'messages' if isinstance(text, list) else 'text'}"


def unused_keys(row: dict[str, Any]) -> frozenset[str]:
    """List the keys that have a value and change nothing. Those beside a prompt alone all go to the reward function."""
    if "chosen" in row:
        used: tuple[str, ...] = ("prompt", "chosen", "rejected", *["margin"] * (number(row.get("margin")) is not None))
    elif answer := next((key for key in ANSWERS if key in row), None):
        used = ("prompt", answer, *LABELS)
    elif "messages" in row:
        used = ("messages", *LABELS)
    else:
        used = ("prompt",) if "prompt" in row else ("text",)
    columns = set() if used == ("prompt",) else {key for key in row if key not in used and row[key] not in NOTHING}
    messages = [item for key in used if isinstance(row.get(key), list) for item in row[key]]
    others = set().union(*messages) - MESSAGE_KEYS
    inner = {key for key in others if any(item.get(key) for item in messages)}
    return frozenset(map(printable, columns | {f"messages.{key}" for key in inner}))


def parse_pair(row: dict[str, Any]) -> PairRow:
    for key in ("chosen", "rejected"):
        if key not in row:
            raise BadRow(f"'{key}' is missing")
    given = read_prompt(row["prompt"]) if "prompt" in row else []
    chosen = whole_conversation(given, read_answer(row["chosen"], "chosen", given))
    rejected = whole_conversation(given, read_answer(row["rejected"], "rejected", given))
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    prompt = shared_start(chosen, rejected)
    chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not prompt:
        raise BadRow("there is no prompt that both chosen and rejected answer")
    if not (is_answer(chosen) and is_answer(rejected)):
        raise BadRow("chosen and rejected are not each the prompt and one answer of the assistant")
    for key in ("chosen", "rejected"):
        require_trained(row[key], key)
    pair = PairRow(prompt=check_prompt(prompt), chosen=chosen[0]["content"], rejected=rejected[0]["content"])
    margin = number(row.get("margin"))
    if margin is not None and margin < 0:
        raise LeftOut(MARGIN_BELOW_0)
    return pair if margin is None else {**pair, "margin": margin}


def parse_answer(row: dict[str, Any], key: str) -> SFTRow:
    if "prompt" not in row:
        raise BadRow(f"'{key}' without a prompt")
    prompt = check_prompt(read_prompt(row["prompt"]))
    conversation = whole_conversation(prompt, read_answer(row[key], key, prompt))
    answer = conversation[len(prompt) :]
    if not (starts_with(conversation, prompt) and is_answer(answer)):
        raise BadRow(f"'{key}' is not one answer of the assistant")
    require_trained(row[key], key)
    return {"prompt": prompt, "response": answer[0]["content"]}


def require_trained(value: Any, key: str) -> None:
    """Raise LeftOut for an answer that is marked as one not to be trained on."""
    if not isinstance(value, str) and not is_trained(message_items(value, key)[-1]):
        raise LeftOut(NOT_TRAINED)


def read_rating(row: dict[str, Any]) -> Rating | None:
    """Read the label of an answer or a conversation, or the score of an answer. Raises BadRow for another label."""
    is_answer = any(key in row for key in ANSWERS)
    if "chosen" in row or not (is_answer or "messages" in row):
        return None
    for name in LABELS:
        if name not in row:
            continue
        label = re.sub("(?<=[a-z])[ -](?=[a-z])", "_", str(row[name]).strip().lower())
        label = re.sub(r"\.0+$", "", label)  # 1.0 is 1
        if label not in GOOD_LABELS | BAD_LABELS:
            shown = "empty" if row[name] is None else str(row[name])[:20]
            raise BadRow(f"the {name} is {shown}, which says neither good nor bad; write true or false")
        return Rating(float(label in GOOD_LABELS), name, is_label=True)
    return rating_of(row) if is_answer else None


def parse_conversation(value: Any) -> list[Row]:
    """Make a row for each answer to a user that is to be trained on; the others are context only."""
    items = message_items(value, "messages")
    messages = [read_message(item) for item in items]
    if messages[-1]["role"] != "assistant":
        raise BadRow("the last message is not the assistant's")
    answers = [
        i
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and i > 0 and messages[i - 1]["role"] == "user"
    ]
    if not answers:
        raise BadRow("no message of the assistant answers one of the user")
    rows: list[Row] = [
        SFTRow(prompt=messages[:i], response=messages[i]["content"]) for i in answers if is_trained(items[i])
    ]
    if not rows:
        raise LeftOut(NOT_TRAINED)
    return rows


def read_prompt(value: Any) -> list[Message]:
    if not isinstance(value, str):
        return read_messages(value, "prompt")
    return read_transcript(value) or [{"role": "user", "content": check_text(value, "prompt")}]


def read_answer(value: Any, key: str, prompt: list[Message]) -> list[Message]:
    """Read the messages of an answer, or of the conversation that ends with it."""
    if not isinstance(value, str):
        return read_messages(value, key)
    messages = read_transcript(value)
    if messages and starts_with(messages, prompt):
        return messages
    return [{"role": "assistant", "content": check_text(value, key).strip()}]


def whole_conversation(prompt: list[Message], answer: list[Message]) -> list[Message]:
    """Join the prompt and what goes on from it, which may repeat it. What begins otherwise stands for itself."""
    goes_on = answer[0]["role"] == "assistant" and not starts_with(answer, prompt)
    return prompt + answer if goes_on else answer


def starts_with(messages: list[Message], first: list[Message]) -> bool:
    return messages[: len(first)] == first


def check_prompt(messages: list[Message]) -> list[Message]:
    if messages[-1]["role"] != "user":
        raise BadRow("the prompt does not end with a message of the user")
    return messages


def is_answer(messages: list[Message]) -> bool:
    return len(messages) == 1 and messages[0]["role"] == "assistant"


def shared_start(first: list[Message], second: list[Message]) -> list[Message]:
    """Return the messages with which both conversations begin."""
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return first[:length]
