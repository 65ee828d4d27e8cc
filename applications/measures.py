"""The results of a run that `rlhf-chat compare` shows, with their intervals."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from applications.report_table import ROWS, pair_of, shown
from applications.runs import seconds_of, steps_of
from training.config import RunConfig
from training.run_directory import RunDirectory
from training.starts import read_starts
from training.steps import REWARD

PERCENT = "{:.1%}"
RATES = {
    "win_rate": "win rate",
    "win_rate_unseen_questions": "win rate, questions not trained on",
    "reward_accuracy": "reward model right",
}


@dataclass(frozen=True)
class Measure:
    """One result of a run, with its 95 % interval where it has one."""

    title: str
    form: str
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def text(self) -> str:
        bounds = "" if self.low is None or self.high is None else f" ({self.show(self.low)} to {self.show(self.high)})"
        return self.show(self.value) + bounds

    def show(self, value: float) -> str:
        return shown(value, self.form)


def measures_of(run: RunDirectory, config: RunConfig, evaluation: Mapping[str, Any]) -> Iterator[tuple[str, Measure]]:
    """What the comparison and the steps of a run left."""
    results = {step: run.step(step).read_result() for step in steps_of(config) if run.step(step).is_finished}
    accuracy = {**results.get(REWARD, {}), **evaluation}.get("reward_accuracy", {}).get("all")
    for key, found in ({key: evaluation.get(key) for key in RATES} | {"reward_accuracy": accuracy}).items():
        if found:
            yield key, Measure(RATES[key], PERCENT, found["rate"], found["low"], found["high"])
    pair = pair_of(evaluation)
    ours = evaluation.get(list(pair)[-1], {})
    for label, key, form in ROWS:
        if key in ours:
            yield key, Measure(label.format(against=next(iter(pair.values()))), form, ours[key])
    for step, result in results.items():
        for name, form in (("loss", "{:z.3f}"), ("accuracy", PERCENT)):
            if f"eval/{name}" in result and not (step is REWARD and accuracy and name == "accuracy"):
                title = f"{step.title}: held-out {name}"
                yield f"{step.command}/eval/{name}", Measure(title, form, result[f"eval/{name}"])
    starts = read_starts(run)
    trained = sum(seconds_of(run.step(step), starts) for step in steps_of(config))
    yield "seconds", Measure("seconds trained", "{:.0f}", trained)
