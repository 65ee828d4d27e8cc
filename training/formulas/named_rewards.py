"""Rewards by name, which `rlhf.reward_function` takes as NAME or NAME:PARAMETERS: no code of a user's is run."""

import json as json_text
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

Row = dict[str, Any]
NUMBER = re.compile(r"(?<![\w)])[-−]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+|/[1-9]\d*)?|\.\d+)|\d+")
RANGE = re.compile(r"(?P<least>\d*)(?P<dots>\.\.)?(?P<most>\d*)")


@dataclass(frozen=True)
class NamedReward:
    score: Callable[[str, Row], float]  # of a response, with what the data say beside its prompt
    needs: str = ""  # what a row must have, in words; empty: nothing
    suits: Callable[[Row], bool] = lambda row: True  # whether a row has it


def length(parameters: str) -> NamedReward:
    """Minus the words that there are too few or too many: `length:20` wants 20, `length:..20` at most 20, `length:20..`
    at least 20, `length:10..20` between."""
    match = RANGE.fullmatch(parameters)
    if match is None or not (match["least"] or match["most"]):
        raise ValueError("length:20, length:..20, length:20.. or length:10..20, in words")
    least = int(match["least"] or 0)
    most = int(match["most"] or 0) or (None if match["dots"] else least)
    if most is not None and most < least:
        raise ValueError(f"length:{most}..{least}: the smaller number comes first")

    def score(response: str, row: Row) -> float:
        words = len(response.split())
        return -float(max(0, least - words, words - most if most is not None else 0))

    return NamedReward(score)


def regex(parameters: str) -> NamedReward:
    """1 where Python's `re` finds the pattern in the response, else 0: `regex:\\?$` wants a question at the end."""
    if not parameters:
        raise ValueError("regex:PATTERN")
    try:
        pattern = re.compile(parameters)
    except (re.error, OverflowError) as error:
        raise ValueError(f"a pattern that Python's re reads ({error})") from None
    return NamedReward(lambda response, row: float(pattern.search(response) is not None))


def json(parameters: str) -> NamedReward:
    """1 where the whole response is JSON, else 0; `json:name,age` wants an object with these keys."""
    keys = {key.strip() for key in parameters.split(",")} if parameters else set()
    if "" in keys:
        raise ValueError("json, or json:KEY,KEY")

    def score(response: str, row: Row) -> float:
        try:
            value = json_text.loads(response, parse_constant=refuse_constant)
        except (ValueError, RecursionError):
            return 0.0
        return float(not keys or (isinstance(value, dict) and keys <= value.keys()))

    return NamedReward(score)


def math(parameters: str) -> NamedReward:
    """1 where the last number of the response is that of the row's `answer`, else 0; `math:solution` takes the row's
    `solution`. 1,234.50 and 1/2 are numbers."""
    key = parameters or "answer"

    def score(response: str, row: Row) -> float:
        number = last_number(response)
        return float(number is not None and number == last_number(row.get(key)))

    needs = f"a number under '{key}' beside each prompt (math:KEY reads another key)"
    return NamedReward(score, needs, lambda row: last_number(row.get(key)) is not None)


def reasoning(parameters: str) -> NamedReward:
    """What reasoning-gym gives, mostly 0 to 1, for what stands in `<answer>...</answer>`, or for the whole response;
    for prompts of `--data reasoning:TASK`."""
    if parameters:
        raise ValueError("reasoning alone: the data name the task, as in --data reasoning:chain_sum")
    from training.data import reasoning as tasks

    return NamedReward(tasks.score, "prompts of its own (--data reasoning:TASK)", tasks.is_entry)


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is Python's, and no JSON")


def last_number(value: Any) -> Fraction | None:
    """The last one in a text, or the number itself; None where there is none."""
    if isinstance(value, str):
        numbers = NUMBER.findall(value)
        value = numbers[-1] if numbers else ""
    elif isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return Fraction(str(value).replace(",", "").replace("−", "-"))
    except ValueError:  # of thousands of digits, or no number
        return None


NAMED_REWARDS: dict[str, Callable[[str], NamedReward]] = {
    "length": length,
    "regex": regex,
    "json": json,
    "math": math,
    "reasoning": reasoning,
}
