"""A user's own JSON-lines files in the formats people have (TRL's), recognised row by row.

    {"prompt": "...", "chosen": "...", "rejected": "..."}      pairs: serve all three steps
    {"prompt": "...", "response": "..."}                       demonstrations (also "completion")
    {"messages": [{"role": "user", "content": "..."}, ...]}    demonstrations: every assistant turn is trained
    {"prompt": "..."}                                          prompts for PPO

A prompt, chosen or rejected may also be a list of messages.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference.chat_format import Message
from inference.errors import UserError
from training.data.rows import Row, pair_row, prompt_row, sft_row

ROLES = ("system", "user", "assistant")


class BadRow(Exception):
    """Why a row cannot be used."""


@dataclass
class UserRows:
    """Rows by kind, as they stand in the files."""

    sft: list[Row] = field(default_factory=list)
    pairs: list[Row] = field(default_factory=list)
    prompts: list[Row] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """How many bad rows were left out, by reason."""

    def __len__(self) -> int:
        return len(self.sft) + len(self.pairs) + len(self.prompts)


def read_user_files(source: Path, skip_bad: bool, limit: int = 0) -> UserRows:
    """All rows of a .jsonl file, or of the .jsonl files in a directory. Raises UserError naming file and line."""
    rows = UserRows()
    for file in find_files(source):
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError:
            raise UserError(f"{file} is not UTF-8 text; save it as UTF-8 JSON lines.") from None
        for number, line in enumerate(lines, 1):
            if limit and len(rows) >= limit:
                return rows
            if not line.strip():
                continue
            try:
                add_row(rows, parse_line(line))
            except BadRow as reason:
                if not skip_bad:
                    raise UserError(
                        f"{file}, line {number}: {reason}; mend the row, or leave such rows out with "
                        f"--set data.bad_rows=skip."
                    ) from None
                rows.skipped[str(reason)] += 1
    if not len(rows):
        raise UserError(f"{source} holds no usable rows; docs/data.md shows the formats.")
    return rows


def find_files(source: Path) -> list[Path]:
    if source.is_dir():
        files = sorted(source.glob("*.jsonl"))
        if not files:
            raise UserError(f"The directory {source} holds no .jsonl files; docs/data.md shows the formats.")
        return files
    if not source.exists():
        raise UserError(
            f"There is no data file {source}; give a JSON-lines file, or leave --data out for the embedded dialogues."
        )
    if source.suffix != ".jsonl":
        raise UserError(f"{source.name} is not a .jsonl file; convert it to JSON lines, one object a line.")
    return [source]


def parse_line(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        raise BadRow("this is not JSON") from None
    if not isinstance(row, dict):
        raise BadRow("this is not a JSON object")
    return row


def add_row(rows: UserRows, row: dict[str, Any]) -> None:
    """Recognise a row's format and add what it holds. Raises BadRow."""
    if "chosen" in row or "rejected" in row:
        rows.pairs.append(parse_pair(row))
    elif "messages" in row:
        rows.sft.extend(parse_conversation(row["messages"]))
    elif "prompt" in row and (answer := row.get("response", row.get("completion"))) is not None:
        rows.sft.append(sft_row(parse_prompt(row["prompt"]), parse_answer(answer, "response")))
    elif "prompt" in row:
        rows.prompts.append(prompt_row(parse_prompt(row["prompt"])))
    else:
        raise BadRow("no known keys (prompt, chosen and rejected, response, or messages)")


def parse_pair(row: dict[str, Any]) -> Row:
    for key in ("chosen", "rejected"):
        if key not in row:
            raise BadRow(f"'{key}' is missing")
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        prompt = parse_prompt(row["prompt"])
    else:
        prompt, chosen, rejected = split_shared_prompt(chosen, rejected)
    good, bad = parse_answer(chosen, "chosen"), parse_answer(rejected, "rejected")
    if good == bad:
        raise BadRow("'chosen' and 'rejected' are the same")
    return pair_row(prompt, good, bad)


def split_shared_prompt(chosen: Any, rejected: Any) -> tuple[list[Message], list[Message], list[Message]]:
    """Two conversations without a prompt of their own: their common beginning is the prompt."""
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise BadRow("'prompt' is missing")
    first, second = parse_messages(chosen, "chosen"), parse_messages(rejected, "rejected")
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    if not shared:
        raise BadRow("'prompt' is missing, and 'chosen' and 'rejected' begin differently")
    return first[:shared], first[shared:], second[shared:]


def parse_conversation(messages: Any) -> list[Row]:
    """One row for each assistant turn, with all before it as its prompt."""
    turns = parse_messages(messages, "messages")
    rows = [
        sft_row(turns[:place], turn["content"])
        for place, turn in enumerate(turns)
        if turn["role"] == "assistant" and place > 0
    ]
    if not rows:
        raise BadRow("'messages' has no assistant turn after a first message")
    return rows


def parse_prompt(prompt: Any) -> list[Message]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise BadRow("'prompt' is empty")
        return [{"role": "user", "content": prompt}]
    return parse_messages(prompt, "prompt")


def parse_answer(answer: Any, key: str) -> str:
    """Text, or a list of messages whose last one is the assistant's."""
    if isinstance(answer, list):
        messages = parse_messages(answer, key)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise BadRow(f"'{key}' must be one assistant message after the prompt")
        return messages[0]["content"]
    if not isinstance(answer, str):
        raise BadRow(f"'{key}' is neither text nor a list of messages")
    if not answer.strip():
        raise BadRow(f"'{key}' is empty")
    return answer


def parse_messages(messages: Any, key: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"'{key}' is neither text nor a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise BadRow(f"'{key}' holds something that is not a message with role and content")
        if message.get("role") not in ROLES:
            raise BadRow(f"'{key}' has the role '{message.get('role')}' (known: {', '.join(ROLES)})")
        if not message["content"].strip():
            raise BadRow(f"'{key}' has an empty message")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
