"""What `rlhf.reward_function` names: functions in files and rewards by name, each with a weight behind it or not."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data.sources import TASK_PREFIX, WEIGHT
from training.formulas.named_rewards import NAMED_REWARDS, NamedReward
from training.merging import did_you_mean, merge, near_keys


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
        """That of a user's function."""
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
        """What a reward by name stands for. Raises ValueError for parameters that it does not take."""
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
        """As a person writes it. A weight of 1 stands where what is before it would be read as one."""
        plain = self.weight == 1 and WEIGHT.fullmatch(self.text) is None
        return self.text if plain else f"{self.text}={self.weight:g}"


def specs_of(kept: str | list[str]) -> list[RewardSpec]:
    """Those of a setting. Raises ValueError where one names nothing."""
    return [RewardSpec.of(text) for text in ([kept] if isinstance(kept, str) else kept) if text]


def kept_specs(given: str | list[str]) -> str | list[str]:
    """`given` as settings keep it: a list of one is that one. Raises ValueError as `specs_of` does."""
    texts = [given] * bool(given) if isinstance(given, str) else given
    if len(specs_of(texts)) < len(texts):
        raise ValueError("one of them is empty: leave it out")
    return texts[0] if len(texts) == 1 else texts or ""


def with_reward_of_tasks(given: Any) -> Any:
    """Values of a RunConfig: where reasoning-gym gives the prompts and nothing is named that rewards, it rewards them,
    without a reward model."""
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
    """Of each in metrics: a user's only function is `function`; others of one name are counted."""
    only = [spec.file is not None for spec in specs].count(True) == 1
    names: list[str] = []
    for spec in specs:
        name = "function" if only and spec.file else spec.name
        earlier = [each.name for each in specs[: len(names)]].count(spec.name)
        names.append(f"{name}_{earlier + 1}" if earlier else name)
    return names
