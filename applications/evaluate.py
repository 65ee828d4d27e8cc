"""`rlhf-chat eval`: measure two models on a run's held-out prompts and show the results."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from applications.launch import run_stage_script
from applications.preset_store import settings_for_model
from applications.report_table import evaluation_table, overview_table, pair_of, share, text_console, text_of
from inference.chat_target import find_chat_models
from inference.errors import UserError, typed
from inference.preferences import Preference, PreferenceFile
from inference.streams import show_json
from training.checkpoints import checkpoint_of
from training.data.prepare import COUNTS_FILE, read_counts
from training.data.sources import absolute
from training.evaluation import preferences
from training.evaluation.preferences import people, win_rates
from training.evaluation.statistics import guard_signs
from training.lineage import label_of, label_of_step, rounds_of
from training.opening import begun_at
from training.run_directory import RunDirectory, read_json, write_json
from training.steps import PAIRS, SFT, WRITING, Step, step_of
from training.trust import of_evaluation, require_reading, require_yes

JUDGES = ("true", "learned", "reward", "people")
JUDGE_BEFORE = {"clicks": "people"}
"""The word of early versions -> that of today."""
WORDS = ("base", *(step.command for step in WRITING))


def evaluate(
    path: Path,
    model: str,
    against: str,
    judge: str,
    prompts: int,
    seed: int | None,
    as_json: bool,
    trusts: bool = False,
    eval_data: Sequence[str] = (),
) -> None:
    """Print the evaluation. Without options it is the run's own, and renews evaluation.json."""
    if at := checkpoint_of(path):
        path, model = at.run.path, model or str(path)
    run = RunDirectory(path)
    judge = JUDGE_BEFORE.get(judge, judge)
    if judge == "people":
        require_reading(path, trusts)
        if prompts or seed is not None or eval_data:
            raise UserError("--judge people asks no model: leave --prompts, --seed and --eval-data out.")
        evaluate_preferences(run, model, against, as_json)
        return
    require_yes(run.path, of_evaluation(run, run.read_config(), judge), trusts)
    for at in filter(None, map(checkpoint_of, (model, against))):
        at.allow(trusts)
    options = {"--model": known(model), "--against": known(against), "--judge": known(judge, JUDGES)}
    arguments = [part for option, value in options.items() if value for part in (option, value)]
    arguments += ["--prompts", str(prompts)] if prompts else []
    arguments += [] if seed is None else ["--seed", str(seed)]
    arguments += [part for text in eval_data for part in ("--eval-data", absolute(text))]
    result_file, answers_file = run.comparison_of(run.last_step)
    if run.step(run.last_step).is_finished and not arguments:
        arguments = ["--model", run.last_step.command]
    else:  # the run's own comparison would seem to be done
        result_file = path / "evaluations" / f"{file_name(model, against, judge, prompts, seed, eval_data)}.json"
        answers_file = result_file.with_suffix(".jsonl")
        arguments += ["--to", str(result_file)]
    with run.locked():
        result_file.parent.mkdir(exist_ok=True)
        run_stage_script("evaluation", run, 1, arguments, progress=sys.stderr if as_json else None)
    result = json.loads(result_file.read_text(encoding="utf-8"))
    if as_json:
        show_json(result)
    else:
        print(evaluation_table(result, answers_file))
    print(f"Written to {result_file}, the answers to {answers_file}", file=sys.stderr)


def evaluate_preferences(run: RunDirectory, model: str, against: str, as_json: bool) -> None:
    """Print what people said of the models, of each two or of those that are named. Loads none."""
    collected = PreferenceFile(run.preferences).read()
    if not collected:
        raise UserError(f"{run.path} has no preferences yet: rlhf-chat prefer {typed(run.path)} collects them.")
    first, second = (label(run, source) if source else "" for source in (model, against))
    there = [preferences.in_order(pair, run.path.resolve().name) for pair in preferences.compared(collected)]
    turned = [pair[::-1] if first == pair[1] or second == pair[0] else pair for pair in there]
    pairs = [pair for pair in turned if first in ("", pair[0]) and second in ("", pair[1])]
    if (model or against) and not pairs:
        listed = ", ".join(map(" against ".join, there)) or "none"
        raise UserError(
            f"Nobody has judged {' against '.join(filter(None, (first, second)))} in {run.preferences} (there are: "
            f"{listed}); rlhf-chat prefer {typed(run.path)} --against MODEL asks for it."
        )
    result = {"pairs": [preferences.win_rates(collected, *pair) for pair in pairs], **preferences.overview(collected)}
    result_file = run.path / "evaluations" / f"{file_name(model, against, 'people', 0, None)}.json"
    result_file.parent.mkdir(exist_ok=True)
    write_json(result_file, result)
    if as_json:
        show_json(result)
    else:
        print(overview_table(result))
    print(f"Written to {result_file}", file=sys.stderr)


def label(run: RunDirectory, source: str) -> str:
    """What preferences call the model that `source` stands for: one of the run's own, a path, or the label itself."""
    if at := checkpoint_of(source):
        return f"{at.run.path.resolve().name}/{at.name}"
    path = Path(source).expanduser()
    if source == "base":
        return f"{run.path.resolve().name}/base"
    if source in WORDS:
        return label_of_step(run, run.read_config(), step_of(source))
    return label_of(find_chat_models(path, compare=False)[0][1]) if path.exists() else source


def known(source: str, words: tuple[str, ...] = WORDS) -> str:
    """A preset's model for its name; anything else is looked up later. Raises UserError for what it cannot be."""
    if not source or source in words or Path(source).expanduser().exists() or checkpoint_of(source):
        return source
    try:
        return settings_for_model(source)["model"]
    except UserError as error:
        if words is JUDGES:  # a preset's name is no way out
            listed = ", ".join(words)
            raise UserError(
                f"There is no judge '{source}': --judge takes {listed}, or a reward model's directory or hub id."
            ) from None
        raise UserError(f"{error} Of the run itself: {', '.join(words)}.") from None


def file_name(
    model: str, against: str, judge: str, prompts: int, seed: int | None, eval_data: Sequence[str] = ()
) -> str:
    """`rlhf-against-base-by-learned-50`: what was asked, as far as it was."""
    parts = [model or "model", f"against-{against}" if against else "", f"by-{judge}" if judge else ""]
    parts += [f"on-{text}" for text in eval_data]
    parts += [f"{prompts}-prompts" if prompts else "", "" if seed is None else f"seed-{seed}"]
    return re.sub(r"[^\w.-]+", "_", "-".join(filter(None, parts)).replace("/", "_")).strip("._") or "model"


class Round(NamedTuple):
    """A run of the chain, as text; what was not measured is empty."""

    name: str
    pairs: str
    over_before: str
    by_people: str
    over_first: str
    kl: str
    length: str
    guard_rails: str


HEADINGS = Round(
    *("", "pairs", "over the one before", "by people", "over the first SFT model"),
    *("KL (to that one)", "length", "guard rails"),
)


def first_sft(run: RunDirectory) -> Path | None:
    """The SFT model with which the chain began; None where there is none, or where `run` began with it itself."""
    first, *later = rounds_of(run)
    model = first.step(SFT).model.resolve()
    known = later and first.step(SFT).is_finished and str(model) != run.read_config().sft_model
    return model if known else None


def over_first_file(run: RunDirectory, step: Step) -> Path:
    """The comparison of the step's model with the first SFT model."""
    return run.path / "evaluations" / f"{step.command}-against-first-sft.json"


def rounds(run: RunDirectory) -> list[Round]:
    """A row for each run of the chain that ends with `run`; none where it goes on from nothing."""
    chain = rounds_of(run)
    return [round_of(run, before) for run, before in zip(chain, [None, *chain], strict=False)] if chain[1:] else []


def round_of(run: RunDirectory, before: RunDirectory | None) -> Round:
    evaluation = run.read_comparison(run.last_step) or {}
    file = over_first_file(run, run.last_step)
    first = read_json(file, "delete it") if file.exists() else evaluation if before is None else {}
    pair = pair_of(evaluation)
    ours = evaluation.get(list(pair)[-1], {})
    bad = [sign.text for sign in guard_signs(evaluation, *pair) if not sign.is_good] if evaluation else []
    counts = read_counts(run.data)["rows"] if (run.data / COUNTS_FILE).exists() else {}
    by = by_whom(run)
    return Round(
        f"{run.path.resolve().name} ({run.last_step.name})",
        f"{counts.get(f'{PAIRS.name}_train', 0):,}" + (f" ({by})" if by else ""),
        share(evaluation.get("win_rate")),
        people_over(run, before),
        share(first.get("win_rate")),
        kl_of(evaluation) + (f" ({far})" if before is not None and (far := kl_of(first)) else ""),
        f"{ours['length']:.1f}" if ours else "",
        "; ".join(bad) or ("hold" if ours else ""),
    )


def kl_of(evaluation: Mapping[str, Any]) -> str:
    measures = evaluation.get(list(pair_of(evaluation))[-1], {})
    return f"{measures['kl']:.2f}" if "kl" in measures else ""


def by_whom(run: RunDirectory) -> str:
    """`ann 120, bob 80`: the preferences that were there when the run was prepared; empty of other data."""
    started = begun_at(run)
    given = [
        preference
        for source in run.read_config().data.sources
        for preference in preferences_in(Path(source))
        if not started or preference.time[:19] <= started[:19]
    ]
    return ", ".join(f"{name} {sum(preference.by == name for preference in given):,}" for name in people(given))


def preferences_in(file: Path) -> list[Preference]:
    """The preferences in a file; none where it holds other data or is gone."""
    try:
        return PreferenceFile(file).read() if file.is_file() else []
    except UserError:
        return []


def people_over(run: RunDirectory, before: RunDirectory | None) -> str:
    """How often people preferred the run's model to the one before, by what was collected for both."""
    if before is None:
        return ""
    ours, theirs = (f"{side.path.resolve().name}/{side.last_step.command}" for side in (run, before))
    rates = win_rates([*preferences_in(before.preferences), *preferences_in(run.preferences)], ours, theirs)
    return f"{share(rates['together'])}, {rates['together']['preferences']}" if rates else ""


def rounds_table(run: RunDirectory) -> str:
    """The chain as a table; empty where there is none."""
    rows = rounds(run)
    if not rows:
        return ""
    table = Table(show_lines=True)
    for heading in HEADINGS:
        table.add_column(Text(heading), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = text_console()
    console.print(table)
    return text_of(console)
