"""What PPO is told to raise: the scores of the reward model and of the user's sources, weighed and on one scale."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inference.chat_template import Message
from training.data.rows import read_rows
from training.distributed import Ranks
from training.formulas.estimators import SHAPINGS, RunningStatistics, Shaping
from training.formulas.own import loaded
from training.reward_sources import (
    NobodyAnswers,
    RewardByName,
    RewardEndpoint,
    RewardFailed,
    RewardFunction,
    RewardSource,
    Row,
)
from training.reward_specs import names_of
from training.rlhf_settings import RLHFSettings

Parts = dict[str, tuple[list[float], float]]  # scores and weight of each source, by its name
MEANS = {
    "model": "reward/model_mean",
    "function": "reward/function_mean",
    "url": "reward/url_mean",
    "length": "reward/length_mean",
    "regex": "reward/regex_mean",
    "json": "reward/json_mean",
    "math": "reward/math_mean",
    "reasoning": "reward/reasoning_mean",
}
"""The metric of a source; those of other names are called alike."""
TRIAL_RESPONSES = ("Yes, I think so.", "No.", "")


@dataclass(frozen=True)
class Rewarded:
    """The rewards of one iteration's responses, in their order."""

    raw: list[float]  # the weighted sums of what the sources gave
    scores: list[float]  # those that PPO raises: normalised and clipped source by source
    parts: Parts  # what each source gave
    metrics: dict[str, float]
    scale_of_model: tuple[float, float] | None
    """What the reward model's scores are less, and over, where they are shaped."""


class Rewards:
    """What PPO is told to raise: the weighted sum of the reward model's scores and those of the user's sources.

    Scores of a source that step 2 has not normalised are brought to a scale by an entry of `training.formulas`.
    """

    def __init__(self, settings: RLHFSettings, ranks: Ranks, model_is_normalized: bool = True):
        self.settings, self.ranks, self.weights = settings, ranks, settings.reward_weights
        self.has_model = settings.has_reward_model
        self.model_is_normalized = model_is_normalized
        self.sources: list[tuple[RewardSource, float]] = []
        specs = settings.asked_functions
        for name, spec in zip(names_of(specs), specs, strict=True):
            source = RewardFunction(spec.text, name) if spec.file else RewardByName(spec, name)
            self.sources.append((source, spec.weight))
        if settings.reward_url and self.weights.url:
            endpoint = RewardEndpoint(settings.reward_url, settings.reward_timeout, settings.reward_retries)
            self.sources.append((endpoint, self.weights.url))
        names = [*["model"] * (self.has_model and not model_is_normalized), *(s.name for s, _ in self.sources)]
        self.statistics = {name: RunningStatistics() for name in names}
        """The statistics of each source that is shaped, by its name."""

    def reward(
        self, of_model: Sequence[float], prompts: list[list[Message]], responses: list[str], rows: list[Row], group: int
    ) -> Rewarded:
        """Reward one iteration; the statistics take the scores in first. All ranks call it with the same and get the
        same.

        Raises RewardFailed on all ranks where a source failed on one of them.
        """
        parts = self._parts(of_model, prompts, responses, rows, group)
        so_far = {name: replace(statistics) for name, statistics in self.statistics.items()}
        for name, statistics in so_far.items():
            statistics.update(parts[name][0])
        scales = {name: self._scale(parts[name][0], statistics) for name, statistics in so_far.items()}
        self.statistics = so_far
        means = means_of(parts) if self.sources or self.weights.model != 1 else {}
        metrics = {MEANS.get(name, f"reward/{name}_mean"): mean for name, mean in means.items()}
        shaped, clipped = self._shape(parts, scales)
        metrics["reward/clipped_fraction"] = clipped / len(responses)
        raw, scores = weighted(parts, len(responses)), weighted(shaped, len(responses))
        return Rewarded(raw, scores, parts, metrics, scales.get("model"))

    def total(
        self, of_model: Sequence[float], prompts: list[list[Message]], responses: list[str], rows: list[Row], group: int
    ) -> tuple[list[float], dict[str, float]]:
        """Sum what the sources give by their weights, with the mean of each by its name; otherwise as `reward`."""
        parts = self._parts(of_model, prompts, responses, rows, group)
        return weighted(parts, len(responses)), means_of(parts)

    @property
    def shaping(self) -> Shaping:
        return loaded(SHAPINGS, self.settings.reward_normalization)

    def _scale(self, scores: list[float], so_far: RunningStatistics) -> tuple[float, float]:
        """Shift and scale as plain floats, whatever kind of numbers a formula gives."""
        shift, scale = self.shaping.formula(scores, so_far)
        return float(shift), float(scale)

    def state(self) -> dict[str, dict[str, float]]:
        return {name: statistics.as_dict() for name, statistics in self.statistics.items()}

    def restore(self, state: dict[str, dict[str, Any]] | None) -> None:
        """Go on from what `state` gave; a checkpoint without it is of a run that normalises nothing."""
        self.statistics = {name: RunningStatistics(**values) for name, values in (state or {}).items()}

    def _shape(self, parts: Parts, scales: dict[str, tuple[float, float]]) -> tuple[Parts, int]:
        """Shift and scale scores as PPO takes them, and count the responses that have a clipped one."""
        shaped: Parts = {}
        clipped: set[int] = set()
        bound = self.settings.score_clip
        for name, (scores, weight) in parts.items():
            if name in scales:
                shift, scale = scales[name]
                scores = [(score - shift) / scale for score in scores]
            if bound and (self.shaping.clip if name in scales else name == "model" and self.model_is_normalized):
                clipped |= {index for index, score in enumerate(scores) if abs(score) > bound}
                scores = [max(-bound, min(bound, score)) for score in scores]
            shaped[name] = scores, weight
        return shaped, len(clipped)

    def _parts(
        self, of_model: Sequence[float], prompts: list[list[Message]], responses: list[str], rows: list[Row], group: int
    ) -> Parts:
        """Ask the sources, each rank for a part; the `group` responses of a prompt go into one question."""
        parts = {"model": (list(of_model), self.weights.model)} if self.has_model else {}
        for source, weight in self.sources:
            parts[source.name] = (self._ask(source, prompts, responses, rows, group), weight)
        return parts

    def _ask(
        self, source: RewardSource, prompts: list[list[Message]], responses: list[str], rows: list[Row], group: int
    ) -> list[float]:
        share = -(-len(responses) // group // self.ranks.size) * group
        ours = slice(self.ranks.rank * share, (self.ranks.rank + 1) * share)
        answer: list[float] | RewardFailed = []
        if responses[ours]:
            try:
                answer = source.scores(prompts[ours], responses[ours], rows[ours])
            except RewardFailed as error:
                answer = error
        scores: list[float] = []
        for of_rank in self.ranks.gather(answer):
            if isinstance(of_rank, RewardFailed):
                raise of_rank
            scores += of_rank
        return scores


def weighted(parts: Parts, count: int) -> list[float]:
    return [sum(weight * scores[i] for scores, weight in parts.values()) for i in range(count)]


def means_of(parts: Parts) -> dict[str, float]:
    return {name: sum(scores) / len(scores) for name, (scores, _) in parts.items()}


def means_by_name(
    settings: RLHFSettings, prompts: list[list[Message]], responses: list[str], rows: list[Row]
) -> dict[str, float]:
    """Average the rewards by name that nobody has to be asked about, where all rows have what they read."""
    specs = settings.asked_functions
    asked = [
        (name, RewardByName(spec, name)) for name, spec in zip(names_of(specs), specs, strict=True) if spec.is_free
    ]
    return {
        name: sum(source.scores(prompts, responses, rows)) / len(responses)
        for name, source in asked
        if all(map(source.reward.suits, rows))
    }


def require_rows_for(rewards: Rewards, directory: Path) -> None:
    """Raise UserError where prompts in a run's data directory have not what a reward by name reads."""
    for source, _ in rewards.sources:
        if isinstance(source, RewardByName) and source.reward.needs:
            for part in ("train", "eval"):
                source.require_rows(read_rows(directory / f"prompts_{part}.jsonl"))


def try_sources(
    rewards: Rewards, rows: list[Row], say: Callable[[str], None], needed: bool = True, without: str = ""
) -> None:
    """Ask the user's sources once before anything trains, about made-up answers to the first prompts of the data.

    Raises RewardFailed; where nobody answers at an address it ends with `without`, how to begin all the same. One that
    is not `needed` yet is only named.
    """
    group = rewards.settings.samples_per_prompt
    rows = rows or [{"prompt": [{"role": "user", "content": "Hello!"}]}]
    asked = [row for row in rows[: 2 if group > 1 else 3] for _ in range(group)]
    responses = [TRIAL_RESPONSES[i % 3] for i in range(len(asked))]
    for source, _ in rewards.sources:
        if isinstance(source, RewardEndpoint):
            source = replace(source, retries=0)
        try:
            source.scores([row["prompt"] for row in asked], responses, [row.get("extra", {}) for row in asked])
        except NobodyAnswers as error:
            if needed:
                error.args = (f"{error}{without}",)
                raise
            say(f"Warning: {error} It is needed in step 3.")
        except RewardFailed as error:
            error.args = (f"{error} It was tried before training, on the answers {TRIAL_RESPONSES}.",)
            raise
