"""Rows -> tokens, cached on the disk under a name that follows from their content, so that they are made once.

A file holds all tokens one behind the other and the length of each text (safetensors, int32). It is mapped and not
loaded: processes of a machine share it. Its name is a hash of the rows, the tokenizer with its template, the lengths
allowed, and the code that makes tokens: what differs in any of these has another file. Small sets are not cached, see
`SMALL`.
"""

import hashlib
import json
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import inference.chat_format
import inference.chat_template
from inference.chat_format import ChatFormat
from training.data.batching import sent
from training.data.rows import margin_of
from training.data_settings import DataSettings
from training.metrics import Bar, Display
from training.run_directory import write_tensors

SMALL = 2_000_000
"""Characters below which making the tokens takes two or three seconds (docs/data.md); they are not cached."""

CODE = (inference.chat_format, inference.chat_template)  # it makes the tokens

Tokens = tuple[Tensor, ...]
"""The tokens of a row, a tensor for each of its texts: int64 (length), in memory of its own. A view would take all rows
along where it is sent or stored."""


class TokenRows(Sequence[Tokens]):
    def __init__(self, ids: Tensor, lengths: Tensor):
        """`ids` int32 (tokens); `lengths` int32 (rows, texts of a row)."""
        self.ids, self.lengths = ids, lengths
        self.sizes = lengths.sum(1)  # (rows) int64
        self.ends = self.sizes.cumsum(0)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: Any) -> Any:
        """Return the Tokens of one row; takes no slices."""
        end = int(self.ends[row])
        texts = self.ids[end - int(self.sizes[row]) : end].split(self.lengths[row].tolist())
        return tuple(text.long() for text in texts)

    def first(self, count: int) -> "TokenRows":
        return TokenRows(self.ids, self.lengths[:count])


@dataclass
class TokenCache:
    directory: Path
    rows: Sequence[dict[str, Any]]
    parts: tuple[str, ...]  # keys of a row: `prompt`, and those of its answers
    chat_format: ChatFormat
    settings: DataSettings
    small: int = SMALL

    @cached_property
    def content(self) -> tuple[str, int]:
        """A hash of all that the tokens depend on, and how many characters they are made of."""
        key = hashlib.sha256(fingerprint(self.chat_format).encode())
        limits = (self.settings.max_prompt_tokens, self.settings.max_response_tokens)
        key.update(json.dumps([self.parts, limits]).encode())
        characters = 0
        for row in self.rows:
            text = json.dumps([row[part] for part in self.parts], ensure_ascii=False)
            key.update(text.encode() + b"\n")
            characters += len(text)
        return key.hexdigest()[:32], characters

    @property
    def file(self) -> Path:
        return self.directory / f"{self.content[0]}.safetensors"

    def fill(self, display: Display | None = None) -> None:
        """Make the file, unless it is there or the rows are few. A disk that takes no file costs time, not the run.

        `display` shows how far it is: a million rows take the better part of an hour.
        """
        if self.content[1] < self.small or self.load() is not None:
            return
        with (display or Display(quiet=True)).progress("Tokens of rows", len(self.rows)) as bar:
            made = self.make(bar)
        tensors = {"ids": made.ids, "lengths": made.lengths.flatten()}
        with suppress(OSError, SafetensorError):
            self.directory.mkdir(parents=True, exist_ok=True)
            write_tensors(self.file, tensors)

    def read(self) -> TokenRows:
        """Return the tokens of each row, from the file where there is one."""
        cached = self.load()
        return self.make() if cached is None else cached

    def make(self, bar: Bar | None = None) -> TokenRows:
        """Make the tokens of each row; `bar` takes a step a row."""
        bar, ids, lengths = bar or Bar(), array("i"), array("i")
        for row in self.rows:
            for part in self.parts:
                tokens = self.tokens(row, part)
                ids.extend(tokens)
                lengths.append(len(tokens))
            bar.advance()
        return self.rows_of(*(torch.from_numpy(np.array(values, np.int32)) for values in (ids, lengths)))

    def tokens(self, row: dict[str, Any], part: str) -> list[int]:
        if part == "prompt":
            return self.chat_format.prompt_ids(row[part], self.settings.max_prompt_tokens)
        return self.chat_format.response_ids(row[part], self.settings.max_response_tokens)

    def load(self) -> TokenRows | None:
        """Read the file; None where it does not exist or is not whole."""
        try:
            tensors = load_file(self.file)  # which maps it
            made = self.rows_of(tensors["ids"], tensors["lengths"])
        except (OSError, SafetensorError, KeyError, RuntimeError):
            return None
        return made if int(made.sizes.sum()) == len(made.ids) else None

    def rows_of(self, ids: Tensor, lengths: Tensor) -> TokenRows:
        """`lengths` is int32 (texts of all rows). Raises RuntimeError where they are not as many as the rows have."""
        return TokenRows(ids, lengths.reshape(len(self.rows), len(self.parts)))


def fingerprint(chat_format: ChatFormat) -> str:
    """Hash all that turns text into tokens: tokenizer, template, end of a turn, and the code."""
    tokenizer = chat_format.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = {
        "tokenizer": backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        "kind": type(tokenizer).__name__,
        "template": tokenizer.chat_template,
        "end": chat_format.end_of_turn_id,
        "code": [Path(f"{module.__file__}").read_text(encoding="utf-8") for module in CODE],
        "versions": [version("tokenizers"), version("transformers")],
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


LENGTH_BUCKETS = (8, 16, 32, 64, 128, 256)
"""Pairs are counted by the tokens of the longer answer: up to so many, from the bucket before on."""


@dataclass(frozen=True)
class TokenPair:
    """One prompt, two answers; int64 (length) each."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor
    is_unseen: bool = False  # whether nothing was trained on under its question (embedded default only)
    file_index: int = 0  # of its row in the file, from 0
    margin: float = 0.0  # by how much the chosen answer is said to be better; 0 where nothing says it

    @classmethod
    def of(cls, row: dict[str, Any], tokens: Sequence[Tensor], file_index: int = 0) -> "TokenPair":
        prompt, chosen, rejected = tokens
        return cls(prompt, chosen, rejected, row.get("held_out_question", False), file_index, margin_of(row) or 0.0)

    @property
    def differs(self) -> bool:
        """Whether there is anything to prefer: cut to the longest response, two answers may be the same."""
        return not torch.equal(self.chosen, self.rejected)

    @property
    def longer(self) -> int:
        return max(len(self.chosen), len(self.rejected))

    @property
    def tokens(self) -> int:
        """Count the tokens of prompt and answer for both answers."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


def left_out(count: int, of: int, limit: int) -> str:
    """Write the sentence about pairs that do not differ within data.max_response_tokens, which is `limit`."""
    return (
        f"{count} of {of} pairs are left out: chosen and rejected are the same in their first {limit} tokens "
        f"(data.max_response_tokens)"
    )


def rows_of(pairs: Sequence[TokenPair]) -> list[tuple[Tensor, Tensor]]:
    """Return prompts and answers of one forward pass: all chosen ones, then all rejected ones."""
    return [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]


def grouped(pairs: Sequence[TokenPair], by_prompt: bool) -> list[list[int]]:
    """Return the indices of pairs that are learned from together: all of a prompt, or each alone."""
    groups: dict[Any, list[int]] = {}
    for i, pair in enumerate(pairs):
        groups.setdefault(tuple(pair.prompt.tolist()) if by_prompt else i, []).append(i)
    return list(groups.values())


def answers_of(groups: Sequence[Sequence[TokenPair]]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Return prompts and answers of one forward pass, each answer once in a group, and the indices of the chosen and
    the rejected one of each pair among them: int64 (2, pairs)."""
    rows, indices = list[tuple[Tensor, Tensor]](), list[int]()
    index_of: dict[tuple[int, ...], int] = {}
    for side in ("chosen", "rejected"):
        for number, group in enumerate(groups):
            for pair in group:
                answer: Tensor = getattr(pair, side)
                index = index_of.setdefault((number, *answer.tolist()), len(rows))
                if index == len(rows):
                    rows.append((pair.prompt, answer))
                indices.append(index)
    return rows, torch.tensor(indices).view(2, -1)


def tokens_of(group: Sequence[TokenPair]) -> int:
    if len(group) == 1:
        return group[0].tokens
    return sum(len(prompt) + len(answer) for prompt, answer in answers_of([group])[0])


def shares_of(groups: Sequence[Sequence[Any]], device: torch.device) -> Tensor:
    """Weigh each pair so that every group counts 1: float32 (pairs)."""
    return sent([1 / len(group) for group in groups for _ in group], device)


def length_bucket(tokens: int) -> int:
    """Find the smallest bucket that holds an answer of so many tokens (the last one holds all longer ones)."""
    return next((bucket for bucket in LENGTH_BUCKETS if tokens <= bucket), LENGTH_BUCKETS[-1])
