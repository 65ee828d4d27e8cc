"""What `rlhf.reward_function` names: functions in files and rewards by name, perhaps with a weight behind them."""

import json as json_text
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from training.data.sources import TASK_PREFIX, WEIGHT
from training.merging import did_you_mean, merge, near_keys

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
    """Return the last number in a text, or the number itself; None where there is none."""
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


@dataclass(frozen=True)
class RewardSpec:
    """`path/to/file.py:function`, NAME or NAME:PARAMETERS."""

    text: str
    weight: float = 1.0

    @classmethod
    def of(cls, text: str) -> "RewardSpec":
        """Read one with its `=WEIGHT`. Raises ValueError where it names nothing."""
        match = WEIGHT.fullmatch(text)
        spec = cls(match["rest"], float(match["weight"])) if match else cls(text)
        if spec.weight == 0:
            raise ValueError(f"the weight of {spec.text} is 0: leave it out, or give it a weight above 0")
        spec.require_known()
        return spec

    @property
    def file(self) -> Path | None:
        """The file of a user's function; None for a reward by name."""
        file, _, name = self.text.rpartition(":")
        return Path(file) if file.endswith(".py") and name.isidentifier() else None

    @property
    def name(self) -> str:
        """`regex` of `regex:\\d`, `mine.score` of `path/to/mine.py:score`."""
        return f"{self.file.stem}.{self.text.rpartition(':')[2]}" if self.file else self.text.partition(":")[0]

    @property
    def is_free(self) -> bool:
        """Whether it only reads text: nothing of anybody's is run or asked."""
        return self.file is None and self.name != "reasoning"

    def named(self) -> NamedReward:
        """Make the reward that a name stands for. Raises ValueError for parameters that it does not take."""
        name, _, parameters = self.text.partition(":")
        return NAMED_REWARDS[name](parameters)

    def require_known(self) -> None:
        name = self.text.partition(":")[0]
        if self.file is not None:
            return
        if name not in NAMED_REWARDS:
            near = did_you_mean(near_keys(name, NAMED_REWARDS), "docs/step3_rlhf.md says more")
            if name.startswith("["):
                near = "in a list, signs that YAML reads stand in single quotes: [length:20, 'regex:\\?$']"
            names = ", ".join(NAMED_REWARDS)
            raise ValueError(f"{self.text} must be path/to/file.py:function, or one of {names} ({near})")
        try:
            self.named()
        except ValueError as error:
            raise ValueError(f"{self.text} must be {error}") from None

    def __str__(self) -> str:
        """Write a spec as a person does, with a weight of 1 where what is before it would be read as a weight."""
        plain = self.weight == 1 and WEIGHT.fullmatch(self.text) is None
        return self.text if plain else f"{self.text}={self.weight:g}"


def specs_of(setting: str | list[str]) -> list[RewardSpec]:
    """Read the specs of a setting. Raises ValueError where one names nothing."""
    return [RewardSpec.of(text) for text in ([setting] if isinstance(setting, str) else setting) if text]


def stored_specs(given: str | list[str]) -> str | list[str]:
    """Write `given` as settings store it: a list of one becomes that one. Raises ValueError as `specs_of` does."""
    texts = [given] * bool(given) if isinstance(given, str) else given
    if len(specs_of(texts)) < len(texts):
        raise ValueError("one of them is empty: leave it out")
    return texts[0] if len(texts) == 1 else texts or ""


def with_reward_of_tasks(given: Any) -> Any:
    """Let reasoning-gym reward, without a reward model, the prompts that it gives where nothing else is to reward."""
    try:
        sources, rlhf = given["data"]["source"], given.get("rlhf", {})
        has_tasks = any(text.startswith(TASK_PREFIX) for text in ([sources] if isinstance(sources, str) else sources))
        if not has_tasks or rlhf.get("reward_function") or rlhf.get("reward_url"):
            return given
        alone = {} if given.get("trained_reward_model") else {"rlhf": {"reward_weights": {"model": 0.0}}}
    except (TypeError, KeyError, AttributeError):  # not given, or wrong in a way that is told elsewhere
        return given
    return merge(merge(alone, given), {"rlhf": {"reward_function": "reasoning"}})


def names_of(specs: Sequence[RewardSpec]) -> list[str]:
    """Name the specs in metrics: a user's only function is `function`; others of one name are counted."""
    only = [spec.file is not None for spec in specs].count(True) == 1
    names: list[str] = []
    for spec in specs:
        name = "function" if only and spec.file else spec.name
        earlier = [other.name for other in specs[: len(names)]].count(spec.name)
        names.append(f"{name}_{earlier + 1}" if earlier else name)
    return names
