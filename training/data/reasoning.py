"""Tasks of the package reasoning-gym as a data source, and what it gives for an answer.

reasoning:chain_sum                            500 prompts, those of seed 0
reasoning:chain_sum(size=2000, max_terms=3)    with the task's own settings
"""

import ast
import json
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

from inference.errors import UserError
from training.data.entries import Entry
from training.data.sources import TASK_PREFIX
from training.formulas.table import literals
from training.merging import did_you_mean, near_keys


def package() -> ModuleType:
    """Import reasoning-gym. Raises UserError where it is not installed."""
    try:
        import reasoning_gym
    except ImportError:
        raise UserError(
            "Tasks of reasoning-gym need that package: pip install 'rlhf-chat[reasoning]' (in the project: pip install "
            "-e '.[reasoning]')."
        ) from None
    return reasoning_gym


def read_task(name: str) -> Iterator[Entry]:
    """Yield the prompts of a source, with all that the task's scorer asks for. Raises UserError."""
    dataset, task = dataset_of(name), call_of(name)[0]
    for number in range(len(dataset)):
        entry = dataset[number]
        row = json.loads(json.dumps({"answer": entry["answer"], "metadata": entry["metadata"]}, default=str))
        row = {"prompt": entry["question"], **row, "metadata": {**row["metadata"], "source_dataset": task}}
        if not number and dataset.score_answer(entry["answer"], entry) != scorer(task)(row["answer"], row):
            raise UserError(f"{name}: this task's answers cannot be written into rows; choose another task.")
        yield f"{name}, row {number + 1}", row


def dataset_of(name: str) -> Any:
    """Make the data set of reasoning-gym, with seed 0 where the source says no other. Raises UserError where it names
    no task, or settings that the task does not take."""
    gym = package()
    from reasoning_gym.factory import DATASETS

    task, settings = call_of(name)
    if task not in DATASETS:
        raise UserError(
            f"reasoning-gym has no task {task}: "
            f"{did_you_mean(near_keys(task, DATASETS), 'its GALLERY.md shows those that it has.')}"
        )
    try:
        return gym.create_dataset(task, **{"seed": 0, **settings})
    except (TypeError, ValueError, AssertionError) as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{name}: reasoning-gym does not take these settings ({why}); correct them.") from None


def call_of(name: str) -> tuple[str, dict[str, Any]]:
    """Read task and settings of a source. Raises UserError."""
    text = name.removeprefix(TASK_PREFIX)
    try:
        call = ast.parse(text if text.endswith(")") else f"{text}()", mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            return call.func.id, literals(call)
    except (SyntaxError, ValueError):
        pass
    raise UserError(
        f"{name} must be reasoning:TASK or reasoning:TASK(KEY=VALUE, ...), as in {TASK_PREFIX}chain_sum(size=9)."
    )


def is_entry(row: dict[str, Any]) -> bool:
    """Whether a row is one of `read_task`."""
    metadata = row.get("metadata")
    return isinstance(metadata, dict) and isinstance(metadata.get("source_dataset"), str)


@cache
def scorer(task: str) -> Any:
    return package().get_score_answer_fn(task)


def score(response: str, row: dict[str, Any]) -> float:
    """Return the task's score of what stands in the last <answer>...</answer>, else of the whole response; 0 where its
    scorer fails, as some do at what they cannot read."""
    package()
    from reasoning_gym.utils import extract_answer

    judge = scorer(row["metadata"]["source_dataset"])
    answer = extract_answer(response)
    try:
        return float(judge(response.strip() if answer is None else answer, row))
    except (Exception, SystemExit):
        return 0.0
