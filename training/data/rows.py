"""The three kinds of rows that the steps read: demonstrations, pairs, prompts; one JSON object a line."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from inference.chat_format import Message
from inference.errors import UserError

Row = dict[str, Any]
"""{"prompt": messages} and, by kind, "response" (sft) or "chosen" and "rejected" (pairs)."""

KINDS = ("sft", "pairs", "prompts")


def sft_row(prompt: list[Message], response: str) -> Row:
    return {"prompt": prompt, "response": response}


def pair_row(prompt: list[Message], chosen: str, rejected: str) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def prompt_row(prompt: list[Message]) -> Row:
    return {"prompt": prompt}


def read_rows(file: Path) -> list[Row]:
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    with open(file, "w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def require_rows(rows: list[Row], step: int, what: str) -> None:
    """Raises UserError where a step has nothing to train on."""
    if not rows:
        raise UserError(f"Step {step} has no rows to train on: its data needs {what} (docs/data.md).")
