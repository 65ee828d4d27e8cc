"""`rlhf-chat report`: everything that a run left behind, as one HTML file."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from applications.compare import flat
from applications.evaluate import HEADINGS, rounds
from applications.report.charts import PHASES, Segment, charts, interval, line_chart, number, stacked_bar
from applications.report.sections import rollouts_part, schedule_part, update_part
from applications.report_table import (
    PANEL_COLUMNS,
    overview_lines,
    pair_of,
    people_prefer,
    rate_text,
    table_rows,
    training_signs,
)
from inference.errors import UserError, typed
from inference.preferences import PreferenceFile
from inference.streams import redacted, redacted_values
from training.changes import not_planned_so
from training.config import RunConfig
from training.config_files import validate_config
from training.data.prepare import COUNTS_FILE, read_counts
from training.data.rows import read_rows
from training.evaluation import preferences
from training.evaluation.statistics import DOUBTFUL_ACCURACY, Sign, guard_signs, verdict
from training.metrics import WARNING, Journal, duration
from training.opening import read_starts
from training.run_directory import RunDirectory, StepDirectory, read_json, write_text
from training.steps import PPO, REWARD, STEPS, Step

HERE = Path(__file__).parent
SHOWN_ANSWERS = 8

Evaluation = Mapping[str, Any]


def write_report(run: RunDirectory, out: Path | None = None) -> Path:
    """Write the page and return its file. Raises UserError where there is nothing to report, or no way to write."""
    return write_page(out or run.path / "report.html", render(run))


def write_page(file: Path, text: str) -> Path:
    """Raises UserError where it cannot be written."""
    try:
        write_text(file, text)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); choose another place with --out.") from None
    return file


def filled(template: str, **values: Any) -> str:
    """A page from a template beside this file. It holds no script and asks for nothing, and its policy forbids both."""
    css = (HERE / "style.css").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    css_hash = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    return environment.get_template(template).render(
        css=Markup(css), css_hash=css_hash, line_chart=line_chart, **values
    )


def render(run: RunDirectory) -> str:
    config = run.read_config()
    stored = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
    evaluation = run.read_comparison(run.last_step)
    all_signs = signs(run, evaluation)
    rows = {step: read_metrics(run.step(step)) for step in STEPS}
    if not any(rows.values()):
        raise UserError(
            f"Nothing was trained in {run.path} yet; start with rlhf-chat run --name {typed(run.path.name)}."
        )
    return filled(
        "page.html",
        kind="report",
        name=run.path.resolve().name,
        config=config,
        steps=[
            {
                "title": title_of(step),
                "is_finished": run.step(step).is_finished,
                "notes": list(filter(None, (best_model_note(run.step(step)), not_planned_so(run.step(step))))),
                "charts": charts(step, rows[step], config),
            }
            for step in rows
            if rows[step] or step in config.steps
        ],
        headline=headline(evaluation),
        rounds=rounds(run),
        round_headings=HEADINGS,
        intervals=intervals(run, evaluation or {}),
        evaluation=evaluation,
        names=list(pair_of(evaluation).values()) if evaluation else [],
        measures=table_rows(evaluation) if evaluation else [],
        preferences=preferences_part(run),
        signs=all_signs,
        bad=[sign.text for sign in all_signs if not sign.is_good],
        times=times(run, rows),
        schedule=schedule_part(run, rows[PPO]),
        update=update_part(run),
        answers=answers(run, evaluation),
        courses=courses(run),
        rollouts=rollouts_part(run),
        changed=changed_settings(config),
        settings=redacted(run.config_file.read_text(encoding="utf-8")),
        versions=versions_table(run, stored.get("versions", {})),
        starts=read_starts(run),
        warnings=warnings(run),
        counts=read_counts(run.data).get("rows", {}) if (run.data / COUNTS_FILE).exists() else {},
    )


def title_of(step: Step) -> str:
    return f"Step {step.number}: {step.title}"


def best_model_note(step: StepDirectory) -> str:
    result = step.read_result() if step.is_finished else {}
    if "kept" not in result:
        return ""
    last = result["iterations" if step.step.draws_samples else "optimizer_steps"]
    return f"The model is that after {step.step.unit} {result['kept']} of {last}, which had the best evaluation."


def read_metrics(step: StepDirectory) -> list[dict[str, Any]]:
    return Journal(step.metrics_file).read() if step.metrics_file.exists() else []


# What came out


def headline(evaluation: Evaluation | None) -> dict[str, str] | None:
    """The win rate and what it shows; None where it was not measured."""
    if evaluation is None or "win_rate" not in evaluation:
        return None
    win = evaluation["win_rate"]
    return {"rate": f"{win['rate']:.1%}", "text": f"{verdict(win, *pair_of(evaluation).values())}."}


def intervals(run: RunDirectory, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Win rates and the accuracies of the reward model, as far as they were measured."""
    shown = []
    for key, label in (("win_rate", "win rate"), ("win_rate_unseen_questions", "win rate, questions not trained on")):
        if key in evaluation:
            shown.append(with_interval(label, evaluation[key], "a"))
    for name, accuracy in evaluation.get("reward_accuracy", {}).items():
        label = "reward model ranks pairs right" if name == "all" else f"… {name.replace('_', ' ')}"
        shown.append(with_interval(label, accuracy, "soft"))
    known = reward_accuracy(run, evaluation)
    if "reward_accuracy" not in evaluation and known is not None:
        shown.append({"label": "reward model ranks pairs right", "value": f"{known[0]:.1%}", "bar": ""})
    for domain, judges in evaluation.get("panel", {}).items():
        for judge, name in PANEL_COLUMNS.items():
            label = f"{name} agrees with people on {domain}" if judge == "learned" else f"… {name}"
            shown.append(with_interval(label, judges[judge], "soft"))
    return shown


def with_interval(label: str, measured: Mapping[str, Any], colour: str) -> dict[str, Any]:
    bar = interval(measured["rate"], measured["low"], measured["high"], colour, label)
    return {"label": label, "value": rate_text(measured), "bar": bar}


def preferences_part(run: RunDirectory) -> dict[str, Any] | None:
    """What people said of the run's answers; None where nobody was asked."""
    collected = PreferenceFile(run.preferences).read_or_say()
    if not collected:
        return None
    pairs = [preferences.in_order(pair, run.path.resolve().name) for pair in preferences.compared(collected)]
    rates = [rate for pair in pairs if (rate := preferences.win_rates(collected, *pair)) is not None]
    return {
        "models": [f"{people_prefer(rate)}." for rate in rates],
        "intervals": [
            with_interval(f"{rate['model']} preferred to {rate['against']} by {name}", theirs, "soft")
            for rate in rates
            for name, theirs in rate["by"].items()
        ],
        "lines": overview_lines(preferences.overview(collected)),
    }


def signs(run: RunDirectory, evaluation: Evaluation | None) -> list[Sign]:
    """What tells a policy that improved from one that fooled its reward or learned nothing."""
    result = training_signs(run, run.last_step)
    first_update = run.step(PPO).path / "first_update.json"
    if first_update.exists() and (checked := read_json(first_update, "delete it")):
        apart = checked.get("generation_logprob_difference", checked["ratio_error"])
        result.append(Sign(True, f"First update checked: generation and training {number(apart)} nats apart"))
    accuracy = reward_accuracy(run, evaluation)
    if accuracy is not None:
        rate, pairs = accuracy
        counted = f"{pairs} held-out pairs" if pairs else "held-out pairs"
        text = f"Reward model right in {rate:.1%} of {counted} (at least {DOUBTFUL_ACCURACY:.0%})"
        result.append(Sign(rate >= DOUBTFUL_ACCURACY, text))
    if evaluation is None:
        return result
    theirs, ours = (evaluation[key] for key in pair_of(evaluation))
    if "true_score" in ours and ours.get("learned_reward", 0) > theirs.get("learned_reward", 0):
        rose = ours["true_score"] > theirs["true_score"]
        good = "The score of the lexicon rose with the learned reward"
        bad = "The learned reward rose, the score of the lexicon did not"
        result.append(Sign(rose, good if rose else bad))
    return [*result, *guard_signs(evaluation, *pair_of(evaluation))]


def reward_accuracy(run: RunDirectory, evaluation: Evaluation | None) -> tuple[float, int] | None:
    """Share of pairs ranked right and how many they are (0: nobody wrote it down); None if it was never measured.

    From one place: the evaluation (which has step 2's where there is one), else before PPO, else step 2.
    """
    if evaluation is not None and "reward_accuracy" in evaluation:
        return evaluation["reward_accuracy"]["all"]["rate"], evaluation["reward_accuracy"]["all"]["pairs"]
    file = run.step(PPO).reward_accuracy_file
    if file.exists() and (measured := read_json(file, "delete it"))["pairs"]:
        return measured["accuracy"], measured["pairs"]
    result = run.step(REWARD).read_result() if run.step(REWARD).is_finished else {}
    return (result["eval/accuracy"], result.get("held_out", 0)) if "eval/accuracy" in result else None


# Where the time went


def times(run: RunDirectory, rows: Mapping[Step, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Seconds of each finished step by phase; what the phases leave is loading, evaluating and saving."""
    totals: dict[Step, float] = {}
    parts: dict[Step, list[Segment]] = {}
    for step in (step for step in rows if run.step(step).is_finished):
        seconds: dict[str, float] = {}
        for row in rows[step]:
            for key, value in row.items():
                name = key.removeprefix("time/")
                if key.startswith("time/") and key != "time/unix" and not name.startswith("fusion_"):
                    name = name if name in PHASES else "other"
                    seconds[name] = seconds.get(name, 0.0) + value
        segments = [Segment(name.replace("_", " "), value, PHASES.get(name, "soft")) for name, value in seconds.items()]
        rest = run.step(step).read_result().get("seconds", 0.0) - sum(seconds.values())
        if rest > 0:
            segments.append(Segment("load, evaluate, save", rest, "soft"))
        totals[step] = sum(seconds.values()) + max(rest, 0.0)  # a resumed step counts from its last start
        parts[step] = sorted(segments, key=lambda segment: segment.colour == "soft")
    longest = max([*totals.values(), 1e-9])
    return [
        {
            "label": title_of(step),
            "value": duration(totals[step]),
            "bar": stacked_bar(parts[step], longest),
            "parts": parts[step],
        }
        for step in totals
    ]


# What the models say


def answers(run: RunDirectory, evaluation: Evaluation | None) -> list[dict[str, Any]]:
    """The first held-out prompts with both models' answers, as the evaluation wrote them."""
    file = run.comparison_of(run.last_step)[1]
    if evaluation is None or not file.exists():
        return []
    pair = pair_of(evaluation)
    exchanges = []
    for row in read_rows(file)[:SHOWN_ANSWERS]:
        scores = {key: row.get(f"{key}_score") for key in pair}
        best = max((score for score in scores.values() if score is not None), default=None)
        is_decided = len(set(scores.values())) > 1
        both = [
            {
                "name": name,
                "colour": colour,
                "text": row[key],
                "score": "" if scores[key] is None else f"{scores[key]:z.2f}",
                "is_better": is_decided and scores[key] == best,
            }
            for (key, name), colour in zip(pair.items(), ("sft", "rlhf"), strict=True)
        ]
        exchanges.append({"prompt": row["prompt"], "answers": both})
    return exchanges


def courses(run: RunDirectory) -> list[dict[str, Any]]:
    """How the answers to fixed prompts changed: (iteration, answer) of each."""
    file = run.step(PPO).samples_file
    by_prompt: dict[str, list[tuple[int, str]]] = {}
    for row in Journal(file).read() if file.exists() else []:
        by_prompt.setdefault(row["prompt"], []).append((row["number"], row["response"]))
    return [{"prompt": prompt, "answers": course} for prompt, course in by_prompt.items()]


# Settings


def changed_settings(config: RunConfig) -> list[tuple[str, str, str]]:
    """Key, value and default of what differs from the defaults."""
    defaults = dict(flat(validate_config({"model": config.model}).model_dump(mode="json")))
    values = flat(redacted_values(config.model_dump(mode="json", exclude={"architecture", "announce"})))
    return [(key, str(value), str(defaults.get(key, ""))) for key, value in values if value != defaults.get(key)]


def versions_table(run: RunDirectory, made_by: Mapping[str, str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Headings, and each package with its version under each: one for all that ran with the same versions."""
    columns: list[tuple[list[str], Mapping[str, str]]] = []
    for start in read_starts(run):
        versions = start.get("versions", {})
        if columns and columns[-1][1] == versions:
            columns[-1][0].append(start["what"])
        else:
            columns.append(([start["what"]], versions))
    columns = columns or [([""], made_by)]
    packages = dict.fromkeys(package for _, versions in columns for package in versions)
    headings = [", ".join(dict.fromkeys(what)) for what, _ in columns]
    return headings, [(package, [versions.get(package, "") for _, versions in columns]) for package in packages]


def warnings(run: RunDirectory) -> list[tuple[str, str]]:
    """What was warned of, each sentence once, and by which log."""
    logs = {"": run.log_file, **{title_of(step): run.step(step).log_file for step in STEPS}}
    sentences: dict[tuple[str, str], None] = {}
    for title, log in logs.items():
        if log.exists():
            with open(log, encoding="utf-8", errors="replace") as lines:
                said = (line.removeprefix(WARNING).strip() for line in lines if line.startswith(WARNING))
                sentences.update(dict.fromkeys((title, redacted(sentence)) for sentence in said))
    return list(sentences)
