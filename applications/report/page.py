"""`rlhf-chat report`: everything that a run left behind, as one HTML file."""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from applications.report.charts import Chart, Segment, interval, line_chart, number, stacked_bar
from applications.report.curves import PHASES, charts
from applications.report_table import pair_of, table_rows
from inference.errors import UserError, typed
from training.config import RunConfig
from training.config_files import validate_config
from training.data.prepare import COUNTS_FILE, read_counts
from training.data.rows import read_rows
from training.metrics import Journal, duration
from training.rlhf_settings import DOUBTFUL_ACCURACY
from training.run_directory import RunDirectory, StepDirectory, read_json, write_text
from training.steps import PPO, REWARD, STEPS, Step

HERE = Path(__file__).parent
SHOWN_ANSWERS = 8
RATIOS = (
    ("length", "Length of answers", 0.7, 1.3, "0.7 to 1.3"),
    ("distinct_bigrams", "Variety (distinct bigrams)", 0.8, math.inf, "at least 0.8"),
    ("perplexity_untouched", "Perplexity under the untouched model", 0.0, 1.3, "at most 1.3"),
)
"""Measures of the model over those of the one before: key, name, bounds, how to call them."""


def write_report(run: RunDirectory, out: Path | None = None) -> Path:
    """Write the page and return its place. Raises UserError where there is nothing to report, or no way to write."""
    file = out or run.path / "report.html"
    text = render(run)
    try:
        write_text(file, text)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); choose another place with --out.") from None
    return file


def render(run: RunDirectory) -> str:
    """The page. It holds no script and asks for nothing, and its policy forbids both."""
    config = run.read_config()
    stored = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
    evaluation = run.read_comparison(run.last_step)
    rows = {step: read_metrics(run.step(step)) for step in STEPS}
    if not any(rows.values()):
        raise UserError(
            f"Nothing was trained in {run.path} yet; start with rlhf-chat run --name {typed(run.path.name)}."
        )
    css = (HERE / "style.css").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        line_chart=line_chart,
        css=Markup(css),
        css_hash=base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
        name=run.path.resolve().name,
        config=config,
        steps=[
            StepPart(title_of(step), run.step(step).is_finished, charts(step, rows[step], config))
            for step in rows
            if rows[step] or step in config.steps
        ],
        headline=headline(evaluation),
        intervals=intervals(run, evaluation),
        evaluation=evaluation,
        names=list(pair_of(evaluation).values()) if evaluation else [],
        measures=table_rows(evaluation) if evaluation else [],
        signs=signs(run, evaluation),
        times=times(run, rows),
        answers=answers(run, evaluation),
        courses=courses(run),
        changed=changed_settings(config),
        settings=run.config_file.read_text(encoding="utf-8"),
        versions=stored.get("versions", {}),
        counts=read_counts(run.data).get("rows", {}) if (run.data / COUNTS_FILE).exists() else {},
    )


@dataclass(frozen=True)
class StepPart:
    title: str
    is_finished: bool
    charts: list[Chart]


def title_of(step: Step) -> str:
    return f"Step {step.number}: {step.title}"


def read_metrics(step: StepDirectory) -> list[dict[str, Any]]:
    return Journal(step.metrics_file).read() if step.metrics_file.exists() else []


# What came out


@dataclass(frozen=True)
class Headline:
    rate: str
    text: str
    remark: str


def headline(evaluation: Mapping[str, Any] | None) -> Headline | None:
    """The win rate as a sentence; None where it was not measured."""
    if evaluation is None or "win_rate" not in evaluation:
        return None
    win = evaluation["win_rate"]
    theirs, ours = pair_of(evaluation).values()
    remark = "The interval includes one half: no difference is shown." if win["low"] <= 0.5 <= win["high"] else ""
    text = f"of {win['prompts']} held-out prompts get the better answer from {ours}, not {theirs}, by {win['judge']}."
    return Headline(f"{win['rate']:.1%}", text, remark)


@dataclass(frozen=True)
class Interval:
    label: str
    value: str
    bar: Markup | None


def intervals(run: RunDirectory, evaluation: Mapping[str, Any] | None) -> list[Interval]:
    """Win rates and the accuracies of the reward model, as far as they were measured."""
    found = []
    measured = evaluation or {}
    for key, label in (("win_rate", "win rate"), ("win_rate_unseen_questions", "win rate, questions not trained on")):
        if key in measured:
            found.append(with_interval(label, measured[key], "a"))
    for name, each in measured.get("reward_accuracy", {}).items():
        label = "reward model ranks pairs right" if name == "all" else f"… {name.replace('_', ' ')}"
        found.append(with_interval(label, each, "soft"))
    accuracy = reward_accuracy(run, evaluation)
    if "reward_accuracy" not in measured and accuracy is not None:
        found.append(Interval("reward model ranks pairs right", f"{accuracy:.1%}", None))
    return found


def with_interval(label: str, measured: Mapping[str, Any], colour: str) -> Interval:
    rate, low, high = (measured[key] for key in ("rate", "low", "high"))
    return Interval(label, f"{rate:.1%} ({low:.1%} to {high:.1%})", interval(rate, low, high, colour, label))


@dataclass(frozen=True)
class Sign:
    is_good: bool
    text: str


def signs(run: RunDirectory, evaluation: Mapping[str, Any] | None) -> list[Sign]:
    """What tells a policy that improved from one that fooled its reward; the bounds are those of docs/report.md."""
    found = []
    first_update = run.step(PPO).path / "first_update.json"
    checked = read_json(first_update, "delete it") if first_update.exists() else {}
    if checked:
        apart = checked.get("generation_logprob_difference", checked["ratio_error"])
        found.append(Sign(True, f"First update checked: generation and training {number(apart)} nats apart"))
    accuracy = reward_accuracy(run, evaluation)
    if accuracy is not None:
        text = f"Reward model right in {accuracy:.0%} of held-out pairs (at least {DOUBTFUL_ACCURACY:.0%})"
        found.append(Sign(accuracy >= DOUBTFUL_ACCURACY, text))
    if evaluation is None:
        return found
    theirs, ours = (evaluation[key] for key in pair_of(evaluation))
    name = next(iter(pair_of(evaluation).values()))
    if "true_score" in ours and ours.get("learned_reward", 0) > theirs.get("learned_reward", 0):
        rose = ours["true_score"] > theirs["true_score"]
        text = (
            "The true score rose with the learned reward" if rose else "The learned reward rose, the true score did not"
        )
        found.append(Sign(rose, text))
    for key, label, low, high, bounds in (each for each in RATIOS if each[0] in ours and each[0] in theirs):
        ratio = ours[key] / theirs[key] if theirs[key] else 1.0
        found.append(Sign(low <= ratio <= high, f"{label}: {ratio:.2f} times that of {name} ({bounds})"))
    share, bound = ours["most_frequent_share"], max(0.03, 1 / evaluation["prompts"])  # once is not too often
    found.append(Sign(share <= bound, f"Most frequent answer: {share:.1%} of all (at most {bound:.0%})"))
    return found


def reward_accuracy(run: RunDirectory, evaluation: Mapping[str, Any] | None) -> float | None:
    """As it was measured last: by the evaluation, else before PPO, else in step 2; None if nowhere."""
    if evaluation is not None and "reward_accuracy" in evaluation:
        return evaluation["reward_accuracy"]["all"]["rate"]
    file = run.step(PPO).reward_accuracy_file
    if file.exists() and (measured := read_json(file, "delete it"))["pairs"]:
        return measured["accuracy"]
    return run.step(REWARD).read_result().get("eval/accuracy") if run.step(REWARD).is_finished else None


# Where the time went


@dataclass(frozen=True)
class Time:
    label: str
    value: str
    bar: Markup
    parts: list[Segment]


def times(run: RunDirectory, rows: Mapping[Step, Sequence[Mapping[str, Any]]]) -> list[Time]:
    """Seconds of each finished step by phase; what the phases leave is loading, evaluating and saving."""
    found = []
    whole = {step: run.step(step).read_result().get("seconds", 0.0) for step in rows if run.step(step).is_finished}
    for step in whole:
        sums: dict[str, float] = {}
        for row in rows[step]:
            for key, value in row.items():
                name = key.removeprefix("time/")
                if key.startswith("time/") and not name.startswith("fusion_"):
                    name = name if name in PHASES else "other"
                    sums[name] = sums.get(name, 0.0) + value
        parts = [Segment(name.replace("_", " "), seconds, PHASES.get(name, "soft")) for name, seconds in sums.items()]
        rest = whole[step] - sum(sums.values())
        if rest > 0:
            parts.append(Segment("load, evaluate, save", rest, "soft"))
        whole[step] = max(whole[step], sum(sums.values()))  # a resumed step counts from its last start
        found.append((step, sorted(parts, key=lambda part: part.colour == "soft")))
    longest = max([*whole.values(), 1e-9])
    return [Time(title_of(step), duration(whole[step]), stacked_bar(parts, longest), parts) for step, parts in found]


# Answers


@dataclass(frozen=True)
class Answer:
    name: str
    colour: str
    text: str
    score: str
    is_better: bool


@dataclass(frozen=True)
class Exchange:
    prompt: list[Mapping[str, str]]
    answers: list[Answer]


def answers(run: RunDirectory, evaluation: Mapping[str, Any] | None) -> list[Exchange]:
    """The first held-out prompts with both models' answers, as the evaluation wrote them."""
    comparison_file = run.comparison_of(run.last_step)[1]
    if evaluation is None or not comparison_file.exists():
        return []
    pair = pair_of(evaluation)
    found = []
    for row in read_rows(comparison_file)[:SHOWN_ANSWERS]:
        scores = {key: row.get(f"{key}_score") for key in pair}
        best = max((score for score in scores.values() if score is not None), default=None)
        decided = len(set(scores.values())) > 1
        found.append(
            Exchange(
                row["prompt"],
                [
                    Answer(
                        name,
                        colour,
                        row[key],
                        "" if scores[key] is None else f"{scores[key]:.2f}",
                        decided and scores[key] == best,
                    )
                    for (key, name), colour in zip(pair.items(), ("sft", "rlhf"), strict=True)
                ],
            )
        )
    return found


@dataclass(frozen=True)
class Course:
    """How the answer to one fixed prompt changed: (iteration, answer)."""

    prompt: str
    answers: list[tuple[int, str]]


def courses(run: RunDirectory) -> list[Course]:
    file = run.step(PPO).samples_file
    by_prompt: dict[str, list[tuple[int, str]]] = {}
    for row in Journal(file).read() if file.exists() else []:
        by_prompt.setdefault(row["prompt"], []).append((row["number"], row["response"]))
    return [Course(prompt, found) for prompt, found in by_prompt.items()]


# Settings


def changed_settings(config: RunConfig) -> list[tuple[str, str, str]]:
    """Key, value and default of what differs from the defaults."""
    defaults = flat(validate_config({"model": config.model}).model_dump(mode="json"))
    ours = flat(config.model_dump(mode="json", exclude={"architecture", "announce"}))
    return [(key, str(value), str(defaults.get(key, ""))) for key, value in ours.items() if value != defaults.get(key)]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return found
