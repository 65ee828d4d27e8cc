"""Which curves the report shows of each step, from its metrics."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from applications.report.charts import Chart, Mark, Series
from training.config import RunConfig
from training.steps import Step

Rows = Sequence[Mapping[str, Any]]
PHASES = {
    "generate": "a",
    "generate_and_score": "a",
    "score": "b",
    "train": "c",
    "gather": "soft",
    "reallocate": "soft",
}
"""Phases of an iteration and their colours; what is not here is `other`."""


def charts(step: Step, rows: Rows, config: RunConfig) -> list[Chart]:
    """The curves of a step that have points."""
    unit = step.loss.replace(step.rows.unit, config.rows_of(step).unit)
    found = ppo_charts(rows, config) if step.draws_samples else supervised_charts(rows, unit)
    return [each for each in found if any(line.points for line in each.series)]


def series(rows: Rows, key: str, label: str, colour: str = "a", spread: str = "") -> Series:
    """The rows that have the metric (and that of the band)."""
    chosen = [row for row in rows if is_number(row.get(key)) and (not spread or is_number(row.get(spread)))]
    points = [(row["number"], row[key]) for row in chosen]
    return Series(label, points, colour, [row[spread] for row in chosen] if spread else ())


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def supervised_charts(rows: Rows, unit: str) -> list[Chart]:
    """Whatever a step measures of these."""
    x = "optimiser step"
    loss = series(rows, "loss", "train", "soft"), series(rows, "eval/loss", "held-out")
    accuracy = series(rows, "accuracy", "train", "soft"), series(rows, "eval/accuracy", "held-out")
    scores = series(rows, "eval/chosen", "chosen"), series(rows, "eval/rejected", "rejected", "b")
    rewards = series(rows, "eval/reward/chosen", "chosen"), series(rows, "eval/reward/rejected", "rejected", "b")
    unpaired = series(rows, "eval/reward/good", "good"), series(rows, "eval/reward/bad", "bad", "b")
    return [
        Chart("Accuracy", "share of pairs ranked right", accuracy, x, [Mark(0.5, "a coin")]),
        Chart("Loss", unit, loss, x),
        Chart("Perplexity", "of held-out demonstrations", [series(rows, "eval/perplexity", "perplexity")], x),
        Chart("Scores", "mean of held-out answers, raw", scores, x),
        Chart("Implicit rewards", "mean of held-out answers", rewards, x),
        Chart("Implicit rewards", "mean of held-out answers", unpaired, x),
        speed(rows, x),
    ]


def ppo_charts(rows: Rows, config: RunConfig) -> list[Chart]:
    def one(
        title: str,
        note: str,
        key: str,
        label: str,
        marks: Iterable[Mark] = (),
        from_zero: bool = True,
        held_out: str = "",
    ) -> Chart:
        beside = [series(rows, held_out, "held-out", "b")] if held_out else []
        return Chart(title, note, [series(rows, key, label), *beside], "iteration", tuple(marks), from_zero)

    kl = config.rlhf.kl
    bounds = [Mark(value, label) for value, label in ((kl.stop, "stop"), (kl.target, "target")) if value]
    score = (
        series(rows, "reward/score_mean", "score", spread="reward/score_std"),
        series(rows, "eval/reward", "held-out", "b"),
    )
    means = sorted({key for row in rows for key in row if key.startswith("reward/") and key.endswith("_mean")})
    sources = [
        series(rows, key, key.removeprefix("reward/").removesuffix("_mean"), "abcdef"[place % 6])
        for place, key in enumerate(key for key in means if key != "reward/score_mean")
    ]
    lengths = (
        series(rows, "response/length_mean", "mean"),
        series(rows, "response/length_max", "longest", "soft"),
        series(rows, "eval/length", "held-out", "b"),
    )
    seconds = [
        series(rows, f"time/{name}", name.replace("_", " "), PHASES[name])
        for name in ("generate", "generate_and_score", "score", "train")
    ]
    return [
        Chart("Score", "of all that rewards; band: one deviation", score, "iteration"),
        Chart("Rewards", "mean of each source", sources * (len(sources) > 1), "iteration"),
        one("KL to the SFT model", "nats a response", "kl/reference", "KL", bounds, held_out="eval/kl"),
        Chart("Length", "tokens of a response", lengths, "iteration", from_zero=True),
        one("Entropy", "nats a token; near 0 is collapse", "policy/entropy", "entropy"),
        one(
            "Ended by itself",
            "share of responses",
            "response/ended_fraction",
            "ended",
            from_zero=False,
            held_out="eval/ended_fraction",
        ),
        one(
            "Variety",
            "distinct bigrams; falls when answers become alike",
            "response/distinct_bigrams",
            "variety",
            held_out="eval/distinct_bigrams",
        ),
        one("Clipped", "share of tokens outside the clip range", "policy/clip_fraction", "clipped"),
        one("Critic", "explained variance; 1 is perfect", "value/explained_variance", "explained", [Mark(0, "none")]),
        one("Value loss", "of the critic", "value/loss", "loss"),
        Chart("Seconds an iteration", "by phase", seconds, "iteration", from_zero=True),
        speed(rows, "iteration"),
    ]


def speed(rows: Rows, x: str) -> Chart:
    return Chart("Speed", "tokens a second", [series(rows, "tokens_per_second", "tokens")], x, from_zero=True)
