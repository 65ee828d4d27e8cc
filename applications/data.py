"""`rlhf-chat data show | lint`: what is in a data source or in a run's data, as the model sees it. Trains nothing."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from rich.text import Text
from transformers import AutoTokenizer

from applications.preset_store import settings_for_model
from applications.report_table import overview_lines
from inference.chat_format import ChatFormat
from inference.console import PrintableConsole
from inference.errors import UserError
from inference.model_store import resolve_model
from inference.preferences import Preference
from inference.streams import show_json, to_stderr
from inference.weights import quiet_transformers
from training.config import RunConfig
from training.config_files import load_config
from training.data.chitchat import build_chitchat, load_dialogues
from training.data.entries import BadRow
from training.data.lint import ANSWERS, Finding, Lines, bad_rows, lint, lint_preferences, lint_tokenizer, shared_prompts
from training.data.prepare import COUNTS_FILE, read_counts
from training.data.rated_texts import load_texts
from training.data.reading import JUDGED_AGAIN, NAMES_OF_KINDS, read_source, require_accepted
from training.data.rows import Row, RowSets, read_rows
from training.data.shapes import UNDECIDED
from training.data.sources import parse_source
from training.data.split import kind_of
from training.data_settings import EMBEDDED_DATA, DataSettings
from training.evaluation.preferences import overview
from training.opening import settings_of_new_run
from training.run_directory import RunDirectory
from training.trust import of_looking, require_yes

KINDS = {"sft": ("sft",), "pairs": ("pair", "good", "bad"), "prompts": ("prompt",)}
"""What --kind takes -> what kind_of a row may be."""


@dataclass
class Target:
    """What a command looks at."""

    settings: DataSettings
    chat_format: ChatFormat | None = None
    model: Path | None = None
    split_seed: int = 1
    train: dict[str, Lines] = field(default_factory=dict)
    """`sft`, `pairs`, `prompts` -> rows."""
    evaluation: dict[str, Lines] = field(default_factory=dict)
    """What a run holds out; empty for a source."""
    described: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str, bool]] = field(default_factory=list)
    preferences: list[Preference] = field(default_factory=list)


def open_target(target: str, model: str | None, overrides: list[str] | None, trusts: bool = False) -> Target:
    """The rows of a run or of a source, with the tokenizer of its model. Raises UserError with the way out."""
    run = RunDirectory(Path(target).expanduser())
    data: dict[str, Any] = {"data": {"source": [target]}}
    if run.config_file.exists():
        if overrides:
            raise UserError(
                f"{target} is a run and has settings of its own: leave --set out, or give its data instead."
            )
        config = run.read_config()
        require_yes(run.path, of_looking(run, config), trusts)
        opened = with_model(config, model or config.sft_model or config.model)
        if (run.data / COUNTS_FILE).exists():
            return read_prepared(opened, run.data)
    elif model is not None:
        config = settings_of_new_run(settings_for_model(model), [], overrides or [], data, None)
        opened = with_model(config, config.model)
    else:
        opened = Target(load_config([], overrides or [], {"model": "none"}, data).data)
    if opened.settings.source == EMBEDDED_DATA:
        return read_embedded(opened)
    return read_user_data(opened)


def with_model(config: RunConfig, source: str) -> Target:
    path = resolve_model(settings_for_model(source)["model"], to_stderr)
    with quiet_transformers():
        return Target(config.data, ChatFormat.load(path), path, config.split_seed)


def read_prepared(opened: Target, directory: Path) -> Target:
    """The rows that a run's steps read."""
    for name in KINDS:
        for sets, part in ((opened.train, "train"), (opened.evaluation, "eval")):
            lines = accepted(opened, directory / f"{name}_{part}.jsonl")
            if lines.rows:
                sets[name] = lines
    counts = read_counts(directory)
    opened.described = [
        *counts.get("sources", []),
        *(f"left out: {reason} ({n:,})" for reason, n in counts["skipped"].items()),
    ]
    return opened


def accepted(opened: Target, file: Path) -> Lines:
    """The rows of a file that the model's template takes; others, of runs that began before it was asked, are set
    apart."""
    rows: list[Row] = []
    locations: list[str] = []
    for number, row in enumerate(cast(list[Row], read_rows(file)), 1):
        location = f"{file}, line {number}"
        try:
            if opened.chat_format is not None:
                require_accepted([row], opened.chat_format)
        except BadRow as error:
            opened.left_out.append((location, str(error), True))
        else:
            rows.append(row)
            locations.append(location)
    return Lines(rows, locations)


def read_embedded(opened: Target) -> Target:
    if opened.chat_format is None:
        raise UserError(f"'{EMBEDDED_DATA}' is cut to a model's tokens: say for which, with --model smollm2-135m.")
    texts = load_texts(to_stderr)
    sets: RowSets = build_chitchat(load_dialogues(), texts, opened.settings, opened.split_seed, opened.chat_format)[0]
    for name, rows in sets.items():
        kind, _, part = name.partition("_")
        lines = Lines(rows, [f"{EMBEDDED_DATA} {name} {number}" for number in range(1, len(rows) + 1)])
        (opened.train if part == "train" else opened.evaluation)[kind] = lines
    return opened


def read_user_data(opened: Target) -> Target:
    """All sources, unsplit; bad rows are set apart."""
    settings = opened.settings.model_copy(update={"bad_rows": "skip"})
    rows: list[Row] = []
    locations: list[str] = []
    for text in settings.sources:
        source = read_source(parse_source(text), settings, to_stderr, opened.chat_format)
        rows += source.rows
        locations += source.locations
        opened.described.append(source.describe())
        opened.left_out += [left for left in source.left_out if left[1] not in (*UNDECIDED.values(), JUDGED_AGAIN)]
        opened.preferences += source.preferences
    for name, kinds in KINDS.items():
        chosen = [i for i, row in enumerate(rows) if kind_of(row) in kinds]
        if chosen:
            opened.train[name] = Lines([rows[i] for i in chosen], [locations[i] for i in chosen])
    return opened


# Show


def show_command(
    target: str, model: str | None, kind: str | None, rows: int, overrides: list[str] | None, trusts: bool = False
) -> None:
    """`rlhf-chat data show`."""
    if kind is not None and kind not in KINDS:
        raise UserError(f"There are no rows of kind '{kind}': --kind takes {', '.join(KINDS)}.")
    opened = open_target(target, model, overrides, trusts)
    console = PrintableConsole(soft_wrap=True, highlight=False)
    for line in opened.described:
        console.print(line, markup=False)
    for finding in bad_rows(opened.left_out):
        console.print(f"{finding.check}: {finding}", markup=False)
    shown = {name: lines for name, lines in opened.train.items() if kind in (None, name)}
    if not shown:
        raise UserError(
            f"{target} has no rows of kind '{kind}'." if kind else f"{target} has no rows that can be used."
        )
    console.print(legend(opened.chat_format is not None, console.is_terminal))
    for lines in shown.values():
        for row, location in zip(lines.rows[:rows], lines.locations, strict=False):
            console.print()
            for text in show_row(row, location, opened, console.is_terminal):
                console.print(text)


def legend(has_tokens: bool, colours: bool) -> Text:
    marks = "in colour" if colours else "between ⟦ and ⟧"
    what = f"What is trained on stands {marks}; of pairs, both answers are scored."
    return Text(what if has_tokens else f"{what} Give --model to see its template, tokens and cuts.", "italic")


def show_row(row: Row, location: str, opened: Target, colours: bool) -> list[Text]:
    """Title, and prompt with answer for each answer of a row."""
    kind = kind_of(row)
    title = [NAMES_OF_KINDS[kind].removesuffix("s"), location, *([row["source"]] if "source" in row else [])]
    texts: list[Text] = []
    prompt, cut = prompt_text(row, opened)
    title += cut
    for key in ANSWERS[kind]:
        answer, cut = answer_text(row[key], opened)  # type: ignore[literal-required]
        label = [Text(f"{key}:", "bold")] if kind == "pair" else []
        title += [f"{key} {note}" for note in cut]
        style = "red" if key == "rejected" or kind == "bad" else "green"
        texts += [*label, Text(prompt, "dim") + (Text(answer, style) if colours else Text(f"⟦{answer}⟧"))]
    return [Text(" · ".join(title), "bold cyan"), *(texts or [Text(prompt, "dim")])]


def prompt_text(row: Row, opened: Target) -> tuple[str, list[str]]:
    """The prompt as the model gets it, and how long it is and whether it was cut."""
    if opened.chat_format is None:
        return "".join(f"{message['role']}: {message['content']}\n" for message in row["prompt"]) + "assistant: ", []
    limit = opened.settings.max_prompt_tokens
    ids = opened.chat_format.prompt_ids(row["prompt"], limit)
    whole = len(opened.chat_format.prompt_ids(row["prompt"]))
    return as_text(opened.chat_format, ids), [f"prompt {length(len(ids), whole)}"]


def answer_text(text: str, opened: Target) -> tuple[str, list[str]]:
    if opened.chat_format is None:
        return text, []
    whole = opened.chat_format.response_ids(text)
    ids = whole[: opened.settings.max_response_tokens]
    return as_text(opened.chat_format, ids), [length(len(ids), len(whole))]


def length(shown: int, whole: int) -> str:
    return f"{shown} tokens" if shown == whole else f"{shown} of {whole} tokens"


def as_text(chat_format: ChatFormat, ids: list[int]) -> str:
    return str(chat_format.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


# Lint


def lint_command(
    target: str, model: str | None, as_json: bool, overrides: list[str] | None, trusts: bool = False
) -> int:
    """`rlhf-chat data lint`; returns the exit code: 1 where there are errors."""
    opened = open_target(target, model, overrides, trusts)
    findings = all_findings(opened)
    errors = sum(finding.level == "error" for finding in findings)
    counts = {name: len(lines.rows) for name, lines in opened.train.items()}
    if as_json:
        told = [asdict(finding) for finding in findings]
        values = {"data": target, "rows": counts, "errors": errors, "findings": told}
        values |= {"preferences": overview(opened.preferences)} if opened.preferences else {}
        show_json(values)
        return 1 if errors else 0
    console = PrintableConsole(soft_wrap=True, highlight=False)
    for line in opened.described:
        console.print(line, markup=False)
    for line in overview_lines(overview(opened.preferences)) if opened.preferences else ():
        console.print(line, markup=False)
    for finding in findings:
        style = "bold red" if finding.level == "error" else "yellow"
        console.print(Text(f"{finding.level}: ", style) + Text(finding.check, "bold") + f": {finding}")
    if opened.chat_format is None:
        console.print("Tokens were not looked at (cuts, rows without a trained token, the tokenizer): give --model.")
    console.print(f"{sum(counts.values()):,} rows, {errors} errors, {len(findings) - errors} warnings")
    return 1 if errors else 0


def all_findings(opened: Target) -> list[Finding]:
    """Errors first."""
    findings = bad_rows(opened.left_out)
    if not opened.train:
        findings.append(Finding("error", "no rows", "there is no row to train on"))
    for lines in opened.train.values():
        findings += lint(lines, opened.chat_format, opened.settings)
    findings += lint_preferences(opened.preferences)
    rows = [row for lines in opened.train.values() for row in lines.rows]
    locations = [location for lines in opened.train.values() for location in lines.locations]
    for lines in opened.evaluation.values():
        findings += shared_prompts(Lines(rows, locations), lines)
    if opened.model is not None and opened.chat_format is not None:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(str(opened.model))
        findings += lint_tokenizer(tokenizer, opened.chat_format, opened.model)
    return sorted(findings, key=lambda finding: finding.level != "error")
