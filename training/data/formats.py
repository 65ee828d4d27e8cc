"""A value of a file -> rows. The formats are those of TRL, and each value says by its keys which it has.

    {"prompt": ..., "chosen": ..., "rejected": ...}    text or messages; without a prompt, chosen and rejected are
                                                       whole conversations with the same beginning
    {"messages": [...]}                                a conversation; each answer in it becomes a row
    {"text": ...}                                      a conversation as text
    {"prompt": ..., "response": ...}                   or "completion"; with "label": true or false beside it (TRL's
                                                       unpaired preference) only what is labelled true
    {"prompt": ...}                                    for step 3 only; other keys go to the reward function

A message is {"role": "system" | "user" | "assistant", "content": text}. Text in the form of DeepSpeed-Chat's and
Anthropic's sets, "Human: ... Assistant: ...", is read as a conversation.
"""

import re
from typing import Any

from inference.chat_format import Message
from training.data.files import BadRow, LeftOut
from training.data.rows import PairRow, PromptRow, Row, SFTRow

ROLES = ("system", "user", "assistant")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
KNOWN_KEYS = "prompt + chosen + rejected, messages, prompt + response, or prompt"
COLUMNS = ("prompt", "chosen", "rejected", "response", "completion", "label", "messages", "text")
"""All keys that are looked at."""
BAD_LABELS = ("false", "0", "0.0")
"""A table has labels as text or numbers."""


def parse_row(row: Any) -> list[Row]:
    """The rows that one value gives: several for a conversation with several answers. Raises BadRow."""
    if not isinstance(row, dict):
        raise BadRow("the line is not a JSON object")
    if "chosen" in row or "rejected" in row:
        return [parse_pair(row)]
    for key in ("response", "completion"):
        if key in row:
            return [parse_answer(row, key)]
    if "messages" in row:
        return parse_conversation(read_messages(row["messages"], "messages"))
    if "prompt" in row:
        prompt = PromptRow(prompt=check_prompt(read_prompt(row["prompt"])))
        extra = {key: value for key, value in row.items() if key != "prompt"}
        return [{**prompt, "extra": extra} if extra else prompt]
    if "text" in row:
        messages = read_transcript(check_text(row["text"], "text"))
        if not messages:
            raise BadRow("'text' is not of the form Human: ... Assistant: ...")
        return parse_conversation(messages)
    raise BadRow(f"no known keys (there must be {KNOWN_KEYS})")


def format_of(row: dict[str, Any]) -> str:
    """What TRL calls the format of a value that parse_row takes, and how its texts are given."""
    if "chosen" in row:
        name, text = "preference" if "prompt" in row else "preference with implicit prompt", row["chosen"]
    elif "response" in row or "completion" in row:
        name, text = "prompt-completion", row["prompt"]
        name = "unpaired preference" if "label" in row else name
    elif "prompt" in row and "messages" not in row:
        name, text = "prompt-only", row["prompt"]
    else:
        name, text = "language modeling", row.get("messages", "")
    return f"{name}, {'messages' if isinstance(text, list) else 'text'}"


def parse_pair(row: dict[str, Any]) -> PairRow:
    for key in ("chosen", "rejected"):
        if key not in row:
            raise BadRow(f"'{key}' is missing")
    prompt = read_prompt(row["prompt"]) if "prompt" in row else []
    chosen = read_answer(row["chosen"], "chosen", prompt)
    rejected = read_answer(row["rejected"], "rejected", prompt)
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    if not (is_answer(chosen) and is_answer(rejected)):  # whole conversations: the prompt is how both begin
        prompt = shared_start(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not prompt:
        raise BadRow("there is no prompt that both chosen and rejected answer")
    if not (is_answer(chosen) and is_answer(rejected)):
        raise BadRow("chosen and rejected are not each the prompt and one answer of the assistant")
    return {"prompt": check_prompt(prompt), "chosen": chosen[0]["content"], "rejected": rejected[0]["content"]}


def parse_answer(row: dict[str, Any], key: str) -> SFTRow:
    if "prompt" not in row:
        raise BadRow(f"'{key}' without a prompt")
    if str(row.get("label")).lower() in BAD_LABELS:
        raise LeftOut("an answer that is labelled as bad, without a good one beside it")
    prompt = check_prompt(read_prompt(row["prompt"]))
    answer = read_answer(row[key], key, prompt)
    if not is_answer(answer):
        raise BadRow(f"'{key}' is not one answer of the assistant")
    return {"prompt": prompt, "response": answer[0]["content"]}


def parse_conversation(messages: list[Message]) -> list[Row]:
    if messages[-1]["role"] != "assistant":
        raise BadRow("the last message is not the assistant's")
    rows: list[Row] = [
        SFTRow(prompt=messages[:i], response=message["content"])
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and i > 0 and messages[i - 1]["role"] == "user"
    ]
    if not rows:
        raise BadRow("no message of the assistant answers one of the user")
    return rows


def read_prompt(value: Any) -> list[Message]:
    if not isinstance(value, str):
        return read_messages(value, "prompt")
    return read_transcript(value) or [{"role": "user", "content": check_text(value, "prompt")}]


def read_answer(value: Any, key: str, prompt: list[Message]) -> list[Message]:
    """The messages of an answer, without the `prompt` if they begin with it."""
    if isinstance(value, str):
        messages = [] if prompt else read_transcript(value)
        messages = messages or [{"role": "assistant", "content": check_text(value, key).strip()}]
    else:
        messages = read_messages(value, key)
    return messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages


def read_messages(value: Any, key: str) -> list[Message]:
    if not isinstance(value, list):
        raise BadRow(f"'{key}' is not {'' if key == 'messages' else 'text or '}a list of messages")
    if not value:
        raise BadRow(f"'{key}' is empty")
    messages: list[Message] = []
    for item in value:
        if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
            raise BadRow(f"'{key}' has a message without role and content")
        role = item["role"]
        if role not in ROLES:
            raise BadRow(f"the role {str(role)[:30]!r} is none of {', '.join(ROLES)}")
        if role == "system" and messages:
            raise BadRow("a system message is not the first")
        messages.append({"role": role, "content": check_text(item["content"], "content")})
    return messages


def read_transcript(text: str) -> list[Message]:
    """The turns of "Human: ... Assistant: ..."; none if the text is not of that form. An empty last turn is no turn."""
    if not re.match(r"\s*Human:.*\n\s*Assistant:", text, re.DOTALL):
        return []
    parts = re.split(r"(?:^|\n)\s*(Human|Assistant):", text.strip())[1:]
    turns = list(zip(parts[::2], parts[1::2], strict=True))
    if not turns[-1][1].strip():
        turns.pop()
    return [{"role": SPEAKERS[name], "content": check_text(words, "a turn").strip()} for name, words in turns]


def check_text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"'{key}' is not text")
    if not value.strip():
        raise BadRow(f"'{key}' is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # "\ud83d" alone: JSON allows it, no tokenizer takes it
        raise BadRow(f"'{key}' has half a character") from None
    return value


def check_prompt(messages: list[Message]) -> list[Message]:
    if messages[-1]["role"] != "user":
        raise BadRow("the prompt does not end with a message of the user")
    return messages


def is_answer(messages: list[Message]) -> bool:
    return len(messages) == 1 and messages[0]["role"] == "assistant"


def shared_start(first: list[Message], second: list[Message]) -> list[Message]:
    """The messages with which both conversations begin."""
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return first[:length]
