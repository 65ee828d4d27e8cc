"""A user's JSON-lines files -> rows. The formats are those of TRL, and each row says by its keys which it has.

    {"prompt": ..., "chosen": ..., "rejected": ...}    text or messages; without a prompt, chosen and rejected are
                                                       whole conversations with the same beginning
    {"messages": [...]}                                a conversation; each answer in it becomes a row
    {"prompt": ..., "response": ...}                   or "completion"
    {"prompt": ...}                                    for step 3 only; other keys go to the reward function

A message is {"role": "system" | "user" | "assistant", "content": text}. Text in the form of DeepSpeed-Chat's and
Anthropic's sets, "Human: ... Assistant: ...", is read as a conversation.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inference.chat_format import Message
from inference.errors import UserError
from training.config import DataSettings
from training.data.rows import PairRow, PromptRow, Row, SFTRow

ROLES = ("system", "user", "assistant")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
KNOWN_KEYS = "prompt + chosen + rejected, messages, prompt + response, or prompt"


class BadRow(Exception):
    """What is wrong with a row, as the rest of a sentence; also the name under which it is counted."""


def read_user_files(settings: DataSettings) -> tuple[list[Row], Counter[str]]:
    """The rows of `settings.source`, a file or a directory of them, and how many were left out and why.

    Raises UserError for what is not there or cannot be read, and for a bad row unless they are to be skipped.
    """
    source = settings.source
    rows: list[Row] = []
    skipped: Counter[str] = Counter()
    used = 0
    for place, line in read_lines(find_files(source)):
        try:
            rows += parse_row(parse_line(line))
        except BadRow as error:
            if settings.bad_rows == "refuse":
                raise UserError(
                    f"{place}: {error}; correct the row, or leave such rows out with --set data.bad_rows=skip."
                ) from None
            skipped[str(error)] += 1
            continue
        used += 1
        if used == settings.limit:
            break
    if not rows:
        reason = f"none of its rows can be used ({skipped.most_common(1)[0][0]})" if skipped else "it is empty"
        raise UserError(f"{source} gives no data, {reason}; each line must be a JSON object with {KNOWN_KEYS}.")
    return rows, skipped


def find_files(source: str) -> list[Path]:
    """The .jsonl files that `source` means, in the order of their names. Raises UserError with the way out."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.glob("*.jsonl") if file.is_file())
        if not files:
            raise UserError(f"The directory {source} has no .jsonl files; put the data there, one JSON object a line.")
        return files
    if not path.exists():
        raise UserError(
            f"There is no data source {source}: give 'chitchat', a .jsonl file, or a directory of them; data sets of a "
            "hub must be saved first, with datasets.load_dataset(...).to_json('data.jsonl')."
        )
    if path.suffix != ".jsonl":
        raise UserError(
            f"{source} is not a .jsonl file; Parquet, CSV and other formats cannot be read yet, so save it with one "
            "JSON object a line, for example with datasets.load_dataset(...).to_json('data.jsonl')."
        )
    return [path]


def read_lines(files: list[Path]) -> Iterator[tuple[str, bytes]]:
    """Each line that is not blank, with the name of its place."""
    for file in files:
        try:
            with open(file, "rb") as handle:
                for number, line in enumerate(handle, start=1):
                    if line.strip():
                        yield f"{file}, line {number}", line
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); check its permissions.") from None


def parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise BadRow("the line is not UTF-8 text") from None
    except (ValueError, RecursionError):
        raise BadRow("the line is not JSON") from None


def parse_row(row: Any) -> list[Row]:
    """The rows that one line gives: several for a conversation with several answers. Raises BadRow."""
    if not isinstance(row, dict):
        raise BadRow("the line is not a JSON object")
    if "chosen" in row or "rejected" in row:
        return [parse_pair(row)]
    for key in ("response", "completion"):
        if key in row:
            return [parse_answer(row, key)]
    if "messages" in row:
        return parse_conversation(row["messages"])
    if "prompt" in row:
        prompt = PromptRow(prompt=check_prompt(read_prompt(row["prompt"])))
        extra = {key: value for key, value in row.items() if key != "prompt"}
        return [{**prompt, "extra": extra} if extra else prompt]
    raise BadRow(f"no known keys (there must be {KNOWN_KEYS})")


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
    prompt = check_prompt(read_prompt(row["prompt"]))
    answer = read_answer(row[key], key, prompt)
    if not is_answer(answer):
        raise BadRow(f"'{key}' is not one answer of the assistant")
    return {"prompt": prompt, "response": answer[0]["content"]}


def parse_conversation(value: Any) -> list[Row]:
    messages = read_messages(value, "messages")
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
