"""The columns that people have -> those of TRL's formats, which formats.py reads.

ShareGPT's {"conversations": [{"from": ..., "value": ...}]} and Alpaca's {"instruction", "input", "output"}; columns
`system` and `history` beside a prompt; names in capitals; a table's index; OpenAI's preferences, and those that
`rlhf-chat prefer` collects. Several answers of a row are the business of rated_answers.py.
"""

from dataclasses import fields
from functools import lru_cache
from typing import Any

from inference.preferences import Preference
from training.data.entries import BadRow, LeftOut
from training.data.messages import (
    NO_TOOLS,
    content_of,
    deserialised,
    looks_like_messages,
    message_items,
    parsed,
    read_transcript,
    role_of,
)
from training.data.rated_answers import choose_answers

TEXTS = ("prompt", "chosen", "rejected", "response", "completion", "messages", "text")
"""The columns of TRL's formats, in which messages may stand."""
LABELS = ("label", "kto_tag", "is_good", "is_chosen", "is_preferred", "desirable")
CONVERSATIONS = ("conversations", "conversation")
QUESTIONS = ("instruction", "question", "query")
SYSTEMS = ("system", "system_prompt")
ANSWERS = ("response", "completion")
KNOWN_COLUMNS = frozenset([*TEXTS, *LABELS, *CONVERSATIONS, *QUESTIONS, *SYSTEMS]) | {
    *("history", "input", "context", "output", "tools", "margin"),
}
INDEX_COLUMNS = ("", "unnamed: 0", "__index_level_0__")
"""pandas writes the numbers of its rows into a column of such a name."""
PREFERENCE_COLUMNS = frozenset(field.name for field in fields(Preference))
PREFERENCE_TEXTS = frozenset(("prompt", "response_a", "response_b", "winner"))
UNDECIDED = {"tie": "both answers are about the same", "both bad": "both answers are bad"}
"""Preferences for neither of two answers, and why their rows are not used."""


def in_trls_columns(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with what is understood under TRL's names; all other columns stay. Raises BadRow."""
    row = usual_names(row)
    refuse_tools(row)
    from_preference(row)
    if "messages" not in row:
        rename(row, CONVERSATIONS, "messages")
    from_openai(row)
    choose_answers(row)
    if "answer" in row and not set(ANSWERS) & row.keys() and set(LABELS) & row.keys():
        rename(row, ("answer",), "response")
    if not {"prompt", "messages"} & row.keys():
        from_alpaca(row)
    for key in TEXTS:
        if key in row:
            row[key] = deserialised(row[key], key)
    if isinstance(row.get("text"), list) and "prompt" not in row:
        row.setdefault("messages", row.pop("text"))
    if "prompt" not in row and ("chosen" in row or "rejected" in row):
        prompt_from_messages(row)
    put_before(row, earlier_messages(row))
    return row


def usual_names(row: dict[str, Any]) -> dict[str, Any]:
    """Write known columns in small letters, and leave out the index of a table."""
    result = {}
    for name, value in row.items():
        usual = usual_name(name)
        if usual not in INDEX_COLUMNS:
            result[usual if usual in KNOWN_COLUMNS and usual not in row else name] = value
    return result


@lru_cache(1000)
def usual_name(column: str) -> str:
    return column.strip().lower()


def rename(row: dict[str, Any], names: tuple[str, ...], new: str) -> None:
    """Rename the first of `names` that is there to `new`."""
    for name in names:
        if name in row:
            row[new] = row.pop(name)
            return


def refuse_tools(row: dict[str, Any]) -> None:
    if parsed(row.get("tools")):
        raise BadRow(f"there are 'tools' beside the messages ({NO_TOOLS})")


def from_openai(row: dict[str, Any]) -> None:
    """{"input": {"messages": ...}, "preferred_output": ..., "non_preferred_output": ...}"""
    given = parsed(row["input"]) if "input" in row and "preferred_output" in row else None
    if isinstance(given, dict) and "messages" in given:
        refuse_tools(given)
        del row["input"]
        row["prompt"] = given["messages"]


def from_preference(row: dict[str, Any]) -> None:
    """Read what `rlhf-chat prefer` writes, without who said it when of which models. Raises LeftOut."""
    if not row.keys() >= PREFERENCE_COLUMNS:
        return
    if row["winner"] in UNDECIDED:
        raise LeftOut(UNDECIDED[row["winner"]])
    if not all(str(row[name]).strip() for name in ("response_a", "response_b")):
        raise LeftOut("one of the two answers is empty")
    for column in PREFERENCE_COLUMNS - PREFERENCE_TEXTS:
        del row[column]


def both_bad(row: Any) -> list[dict[str, Any]]:
    """Return both answers of a preference for neither, each with a label; none of anything else."""
    if not isinstance(row, dict) or not row.keys() >= PREFERENCE_COLUMNS or row["winner"] != "both bad":
        return []
    answers = (row["response_a"], row["response_b"])
    return [{"prompt": row["prompt"], "completion": text, "label": False} for text in answers if str(text).strip()]


def from_alpaca(row: dict[str, Any]) -> None:
    """Make the prompt of the instruction and, in a paragraph of its own, its input; `output` is the answer.

    A question beside an answer under another name than these may be anything, so it is not taken.
    """
    answered = {"chosen", "output", *ANSWERS} & row.keys()
    if answered and not any(name in row for name in QUESTIONS):
        rename(row, ("input",), "prompt")
    elif answered - {"output"}:
        rename(row, QUESTIONS, "prompt")
    else:
        rename(row, ("instruction",), "prompt")
    if "prompt" not in row:
        return
    if not {"chosen", *ANSWERS} & row.keys():
        rename(row, ("output",), "response")
    for name in ("input", "context"):
        if isinstance(row.get(name), str) and isinstance(row["prompt"], str):
            row["prompt"] = "\n\n".join(text for text in (row["prompt"], row.pop(name)) if text.strip())


def prompt_from_messages(row: dict[str, Any]) -> None:
    """`messages` beside a chosen and a rejected answer, as LLaMA-Factory has them."""
    messages = row.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict) and role_of(messages[-1]) == "user":
        row["prompt"] = row.pop("messages")


def earlier_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Take out what the columns `system` and `history` say; a history of another kind stays."""
    messages: list[dict[str, Any]] = []
    for name in SYSTEMS:
        if isinstance(row.get(name), str) and not messages:
            text = row.pop(name)
            messages += [{"role": "system", "content": text}] if text.strip() else []
    turns = history_turns(parsed(row.get("history")))
    if turns is not None:
        del row["history"]
        messages += turns
    return messages


def history_turns(history: Any) -> list[dict[str, Any]] | None:
    """Read the messages of [[question, answer], ...] or of a list of messages; None for anything else."""
    if looks_like_messages(history):
        return message_items(history, "history")
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        return None
    if not all(isinstance(text, str) for turn in history for text in turn):
        raise BadRow("'history' has a turn that is not a question and an answer")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in history for role, text in zip(roles, turn, strict=True)]


def put_before(row: dict[str, Any], earlier: list[dict[str, Any]]) -> None:
    """Let the prompt begin with the `earlier` messages, and so whatever is a whole conversation. Raises BadRow."""
    if not earlier:
        return
    if isinstance(row.get("prompt"), str):
        row["prompt"] = read_transcript(row["prompt"]) or [{"role": "user", "content": row["prompt"]}]
    for key in TEXTS:
        value = row.get(key)
        if key in ("chosen", "rejected", "text") and isinstance(value, str) and "prompt" not in row:
            value = read_transcript(value)
        if isinstance(value, list) and (len(value) > 1 or key in ("prompt", "messages")):
            row.pop(key)
            row["messages" if key == "text" else key] = joined(earlier, message_items(value, key))


def joined(earlier: list[dict[str, Any]], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    begins = [item for item in (earlier[0], messages[0]) if role_of(item) == "system"]
    if len(begins) == 2 and content_of(begins[0]) != content_of(begins[1]):
        raise BadRow("there are two system messages, one in the column 'system' and one among the messages")
    rest = messages[1:] if role_of(messages[0]) == "system" else messages
    return begins[:1] + [item for item in earlier if role_of(item) != "system"] + rest
