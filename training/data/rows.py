"""Rows: what a data source becomes, one JSON object a line in the run directory."""

import json
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from inference.chat_template import Message
from inference.errors import UserError
from training.config import StepSettings
from training.role_settings import Keep
from training.steps import PROMPTS, Step, TrainingRows


class SFTRow(TypedDict):
    """Step 1 learns to give the response."""

    prompt: list[Message]
    response: str
    held_out_question: NotRequired[bool]
    source: NotRequired[str]


class PairRow(TypedDict):
    """Step 2 learns which of two responses to one prompt people prefer."""

    prompt: list[Message]
    chosen: str
    rejected: str
    chosen_score: NotRequired[float]  # with the embedded default: the mean of people's ratings, from -4 to 4
    rejected_score: NotRequired[float]
    margin: NotRequired[float]  # by how much the chosen one is said to be better, where the data say it
    held_out_question: NotRequired[bool]
    source: NotRequired[str]


class LabelledRow(TypedDict):
    """Step 2 by DPO with an unpaired loss: one response, and whether people like it."""

    prompt: list[Message]
    response: str
    label: bool
    source: NotRequired[str]


class PromptRow(TypedDict):
    """Step 3 asks the policy."""

    prompt: list[Message]
    extra: NotRequired[dict[str, Any]]  # the other keys of the user's row, for a reward function
    held_out_question: NotRequired[bool]
    source: NotRequired[str]


class PanelRow(TypedDict):
    """A text that people rated, which no step is trained on (embedded default only)."""

    prompt: list[Message]  # that it is taken to answer
    response: str
    domain: str  # `tweets`, which others of the training are too, or another kind of text
    mean: float  # of the ratings, from -4 (extremely negative) to 4 (extremely positive)
    ratings: list[int]  # one a person


# What is not required comes with the embedded default: the scores, and in evaluation rows whether nothing was
# trained on under the row's question. `source` is there where there are several.
Row = SFTRow | PairRow | LabelledRow | PromptRow


@dataclass
class RowSets:
    """The rows of a source, shared out over steps, and over training and evaluation. One file each."""

    sft_train: list[SFTRow] = field(default_factory=list)
    sft_eval: list[SFTRow] = field(default_factory=list)
    pairs_train: list[PairRow | LabelledRow] = field(default_factory=list)
    pairs_eval: list[PairRow | LabelledRow] = field(default_factory=list)
    prompts_train: list[PromptRow] = field(default_factory=list)
    prompts_eval: list[PromptRow] = field(default_factory=list)
    panel: list[PanelRow] = field(default_factory=list)  # texts that people rated, to compare a reward model with them
    steps_share: bool = False  # whether the training rows were too few to give each step some of its own

    def items(self) -> list[tuple[str, list[Row]]]:
        return [(item.name, getattr(self, item.name)) for item in fields(self) if item.name not in NO_STEP]


def margin_of(row: Mapping[str, Any]) -> float | None:
    """Return how much better the chosen answer of a pair is said to be: its margin, or its scores' difference."""
    if "margin" in row:
        return row["margin"]
    return row["chosen_score"] - row["rejected_score"] if {"chosen_score", "rejected_score"} <= row.keys() else None


NO_STEP = ("panel", "steps_share")
PANEL_FILE = "panel.jsonl"
DEMONSTRATIONS_FILE = "demonstrations.jsonl"  # the rows that rlhf.ptx.source names


def write_rows(file: Path, rows: Sequence[Row | PanelRow]) -> None:
    with open(file, "w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_rows(file: Path, most: int | None = None) -> list[dict[str, Any]]:
    """Read the rows of a file of `write_rows`, or its first `most`. Raises UserError for a line that is none."""
    rows = []
    with open(file, "rb") as handle:  # not splitlines(): text may hold other line separators
        for number, line in enumerate(islice(handle, most), 1):
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UserError(f"Line {number} of {file} is damaged: delete {remade(file)}, which is then made again.")
            rows.append(row)
    return rows


def remade(file: Path) -> str:
    """Name what to delete so that a command makes a damaged file of rows again: rows appear as a whole directory."""
    return f"the directory {file.parent}" if file.parent.name == "data" else f"{file} and the .json file beside it"


def require_margins(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence where some pairs have no margin. Raises UserError where none has."""
    without = sum(margin_of(row) is None for row in rows)
    if without == len(rows):
        raise UserError(
            f"reward.margin needs pairs that say by how much the chosen answer is better, and none of the {without:,} "
            f"does: give them a key margin, or scores (docs/data.md) in a new run, or set reward.margin=0."
        )
    return f"{without:,} of {len(rows):,} pairs have no margin: any lead will do there" if without else ""


INSTEAD = {
    "sft": "a finished model instead of this step (rlhf-chat rlhf RUN --sft-model MODEL, with a new RUN)",
    "reward": "leave the step out: --steps 1, or a reward function "
    "(--set rlhf.reward_function=FILE:FUNCTION --set rlhf.reward_weights.model=0)",
}
"""Command of a step -> how it goes without its rows."""


def require_rows(directory: Path, step: Step, keep: Keep = "last", rows: TrainingRows | None = None) -> None:
    """Raise UserError where a run's data directory has nothing for `step` to train on, or to choose the best by. `rows`
    are what it learns from with the run's settings."""
    if keep == "best" and (directory / f"{step.rows.name}_eval.jsonl").stat().st_size == 0:
        raise UserError(
            f"{step.command}.keep=best chooses by held-out rows, and the data hold none out for step {step.label}: "
            f"give some with --eval-data, more data, or {step.command}.keep=last."
        )
    file = directory / f"{step.rows.name}_train.jsonl"
    if file.stat().st_size == 0:
        others = [path for path in directory.glob("*_*.jsonl") if path.stem != "left_out" and path.stat().st_size]
        count = sum(len(read_rows(path)) for path in others)
        why = f"none of the data's {count:,} rows is left for it: give more such rows (each step takes its share, some "
        why += "are held out), a larger share in data.split"
        if all(path.stem.startswith(PROMPTS.name) for path in others):
            why = f"the data's {count:,} rows are prompts alone: give such rows"
        raise UserError(
            f"Step {step.label} needs {(rows or step.rows).contents}, and {why}, "
            f"or {INSTEAD.get(step.command, 'leave the step out (--steps)')}."
        )


class Epochs:
    """The order of an epoch is a function of (salt, epoch) alone, so that resuming needs no cursor. The last one asked
    for is cached: a million rows take half a second to shuffle."""

    def __init__(self, size: int, salt: str):
        self.size, self.salt = size, salt
        self._cached = -1, array("q")

    def order(self, epoch: int) -> "array[int]":
        """Return rows 0 .. size - 1 in the order of this epoch."""
        if self._cached[0] != epoch:
            order = array("q", range(self.size))
            random.Random(f"{self.salt}/{epoch}").shuffle(order)
            self._cached = epoch, order
        return self._cached[1]

    def rows(self, start: int, count: int) -> list[int]:
        """Return the rows at positions `start` .. `start + count - 1`, counted from 0 through all epochs."""
        chosen: list[int] = []
        while len(chosen) < count:
            epoch, position = divmod(start + len(chosen), self.size)
            chosen += self.order(epoch)[position : position + count - len(chosen)]
        return chosen


def updates_per_epoch(rows: int, settings: StepSettings) -> int:
    return max(1, rows // settings.batch_size)


def count_updates(rows: int, settings: StepSettings) -> int:
    total = updates_per_epoch(rows, settings) * settings.epochs
    return min(total, settings.max_steps) if settings.max_steps else total
