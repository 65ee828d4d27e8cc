"""`rlhf-chat compare`: runs side by side: the settings that differ, and what came out; seeds together."""

import csv
import hashlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from applications.report_table import ROWS, pair_of, training_signs
from applications.runs import RATES, UNREADABLE, Measure, measures_of, named_runs, state_of, steps_of, why_unreadable
from inference.console import PrintableConsole
from inference.errors import UserError
from inference.streams import columns, redacted_values
from training.changes import teaches, was_lengthened
from training.config import RunConfig
from training.evaluation.statistics import guard_signs
from training.inputs import CODE
from training.opening import read_starts
from training.run_directory import RunDirectory
from training.steps import REWARD, Step
from training.trust import require_reading

NO_SETTINGS = ("fork_of", "data.parent", "announce")  # they say where a run comes from, or are only printed
BOUNDS = "out of bounds"
FIRST = ("win_rate", "kl", "length", "true_score", "learned_reward")  # columns of a narrow terminal


@dataclass(frozen=True, eq=False)
class Result:
    """A run, as it is compared with others."""

    run: RunDirectory
    config: RunConfig
    state: str
    judge: str
    drawn: str  # how many answers were drawn for the comparison, and how; empty where it was not made
    measures: Mapping[str, Measure]
    out_of_bounds: Sequence[str]
    lengthened: Sequence[str]
    code: Sequence[Mapping[str, str]]
    """Files of the user's that the last step ran -> their hashes, each time that these were others."""

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Dotted keys -> values; where a seed follows that of the run, or of the models, that one."""
        values = dict(flat(redacted_values(self.config.model_dump(mode="json", exclude={"architecture"}))))
        seeds = {key: self.config.seed for key, value in values.items() if is_seed(key) and value == -1}
        return {key: value for key, value in (values | seeds).items() if key not in NO_SETTINGS}


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing that teaches, the user's code included, but in seeds."""

    results: Sequence[Result]

    def measure(self, key: str) -> tuple[Measure, float, int] | None:
        """Mean, standard deviation and number of runs that have it; None where fewer than two do."""
        measures = [result.measures[key] for result in self.results if key in result.measures]
        if len(measures) < 2:
            return None
        values = [measure.value for measure in measures]
        return replace(measures[0], value=mean(values), low=None, high=None), stdev(values), len(values)


class Comparison:
    def __init__(self, results: Sequence[Result]):
        known = {key for result in results for key in result.settings}
        every = sorted(known, key=lambda key: (is_seed(key), key != "seed", key))
        values = {key: [result.settings.get(key) for result in results] for key in every}
        differ = {key: texts for key in every if len(set(texts := [text_of(value) for value in values[key]])) > 1}
        self.settings = [key for key in differ if not (is_seed(key) and copies(key, differ))]
        """Keys of settings that differ; a seed that always equals another one is left out."""
        taught = [key for key in differ if not is_seed(key) and any(teaches(key, result.config) for result in results)]
        groups: dict[str, list[Result]] = {}
        for result in results:
            alike = [text_of(result.settings.get(key)) for key in taught], result.code
            groups.setdefault(json.dumps(alike), []).append(result)
        self.groups = list(map(Group, groups.values()))
        self.results = [result for group in self.groups for result in group.results]
        measures = {key: measure for result in self.results for key, measure in result.measures.items()}
        order = list(dict.fromkeys((*FIRST, *RATES, *(key for _, key, _ in ROWS), *measures)))
        self.measures = {key: measures[key] for key in sorted(measures, key=order.index)}
        """Key -> one that shows its title; those of the comparison come first."""
        self.names = short_names([result.run.path.resolve() for result in self.results])

    def name(self, result: Result) -> str:
        return self.names[result.run.path.resolve()]

    def notes(self) -> Iterator[str]:
        """How to read the figures, and what keeps those of some runs from being on one scale with those of others."""
        if len(self.groups) < len(self.results):
            yield "± is the standard deviation between runs that differ in seeds alone."
        for group in self.groups:
            of_seeds: dict[str, list[str]] = {}
            for result in group.results:
                seeds = json.dumps([value for key, value in result.settings.items() if is_seed(key)])
                of_seeds.setdefault(seeds, []).append(self.name(result))
            for names in (names for names in of_seeds.values() if len(names) > 1):
                yield f"{', '.join(names)} have the same seeds: what lies between them is not what seeds make."
        judges = {result: result.judge for result in self.results}
        if any(judges.values()):
            by = self.with_names(judges)
            yield f"Win rates are over the SFT model that a run began with, by {by}; in brackets 95 % intervals."
        drawn = {result: result.drawn for result in self.results}
        if len({*drawn.values()} - {""}) > 1:
            yield f"Not all runs were measured alike: {self.with_names(drawn)}."
        scored = [r for r in self.results if "learned_reward" in r.measures or "reward" in r.judge]
        if len({identity(result) for result in scored}) > 1:
            yield "The learned reward is another one in some runs: what it says of them is not on one scale."
        files = {(name, content) for result in self.results for run in result.code for name, content in run.items()}
        for name, times in Counter(name for name, _ in sorted(files)).items():
            if times > 1:
                yield f"{name} is not the same in all runs, or was changed on the way."
        prompts = {digest(result.run.data / "prompts_eval.jsonl") for result in self.results} - {""}
        if len(prompts) > 1:
            yield "The held-out prompts are not the same in all runs, so figures differ by them too."
        for result in self.results:
            yield from (f"{self.name(result)}: {time}." for time in result.lengthened)

    def with_names(self, texts: Mapping[Result, str]) -> str:
        """Each text once; where there are several, with the names of its runs."""
        several = {*texts.values()} - {""}
        return "; ".join(
            text + f" ({', '.join(self.name(r) for r in texts if texts[r] == text)})" * (len(several) > 1)
            for text in dict.fromkeys(filter(None, texts.values()))
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "runs": [
                {
                    "run": str(result.run.path),
                    "state": result.state,
                    "group": number,
                    "settings": {key: result.settings.get(key) for key in self.settings},
                    "judge": result.judge,
                    "results": {key: measure.as_json for key, measure in result.measures.items()},
                    "out_of_bounds": list(result.out_of_bounds),
                }
                for number, group in enumerate(self.groups, 1)
                for result in group.results
            ],
            "groups": [
                {
                    "group": number,
                    "runs": len(group.results),
                    "results": {
                        key: {"mean": of_group[0].value, "deviation": of_group[1], "runs": of_group[2]}
                        for key in self.measures
                        if (of_group := group.measure(key)) is not None
                    },
                }
                for number, group in enumerate(self.groups, 1)
            ],
            "notes": list(self.notes()),
        }

    def csv_rows(self) -> Iterator[dict[str, Any]]:
        """A row a run; a result with an interval is three columns."""
        for run in self.as_json()["runs"]:
            row = {"run": run["run"], "state": run["state"], "group": run["group"], **run["settings"]}
            for key in self.measures:
                result = run["results"].get(key, "")
                row[key] = result["value"] if isinstance(result, dict) else result
                if self.measures[key].low is not None:
                    row |= {f"{key}_{end}": result[end] if isinstance(result, dict) else "" for end in ("low", "high")}
            yield row | {"judge": run["judge"], "out_of_bounds": "; ".join(run["out_of_bounds"])}

    def table(self) -> tuple[list[str], list[tuple[int, Group, bool, list[str]]]]:
        """Headings; then rows: number of the group, the group, whether the row has its means, cells."""
        headings = ["run", *self.settings, *(measure.title for measure in self.measures.values()), BOUNDS]
        rows = []
        for number, group in enumerate(self.groups, 1):
            rows += [(number, group, False, self.row(result)) for result in group.results]
            if len(group.results) > 1:
                rows.append((number, group, True, self.row_of_group(group)))
        return headings, rows

    def row(self, result: Result) -> list[str]:
        state = "" if result.state == "finished" else f" ({result.state})"
        measures = [result.measures[key].text if key in result.measures else "" for key in self.measures]
        settings = [text_of(result.settings.get(key)) for key in self.settings]
        rails = [sign.partition(":")[0] for sign in result.out_of_bounds]  # `KL` of `KL: 7.00 nats ...`
        return [self.name(result) + state, *settings, *measures, ", ".join(rails)]

    def row_of_group(self, group: Group) -> list[str]:
        """Mean ± standard deviation of each result."""
        cells = [f"mean of {len(group.results)}"]
        for key in self.settings:
            values = {text_of(result.settings.get(key)) for result in group.results}
            cells.append(values.pop() if len(values) == 1 else "")
        for key in self.measures:
            if (of_group := group.measure(key)) is None:
                cells.append("")
                continue
            measure, deviation, runs = of_group
            of = f" ({runs} of {len(group.results)})" if runs < len(group.results) else ""
            cells.append(f"{measure.text} ± {measure.show(deviation)}{of}")
        bad = sum(bool(result.out_of_bounds) for result in group.results)
        return [*cells, f"{bad} of {len(group.results)}" if bad else ""]


def compare_command(runs: Sequence[Path], out: Path | None, as_csv: bool, as_json: bool, trusts: bool) -> None:
    """One that cannot be read is left out. Raises UserError where no other is left, or the page cannot be written."""
    if as_csv and as_json:
        raise UserError("--csv and --json are two forms of one table: leave one of them out.")
    results, refused = [], []
    for run in named_runs(runs):
        try:
            require_reading(run.path, trusts)
            results.append(result_of(run))
        except UNREADABLE as error:
            refused.append(f"{run.path} is left out: {why_unreadable(run, error)}")
    if not results:
        raise UserError(" ".join(refused))
    for sentence in refused:
        print(sentence, file=sys.stderr)
    comparison = Comparison(results)
    if as_json:
        print(json.dumps(comparison.as_json(), indent=2, ensure_ascii=False))
    elif as_csv:
        rows = list(comparison.csv_rows())
        writer = csv.DictWriter(sys.stdout, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print_table(comparison)
    if out:
        from applications.report.comparison_page import render_comparison  # draws: a second to import
        from applications.report.page import write_page

        write_page(out, render_comparison(comparison))
        print(f"The curves of all: {out}", file=sys.stderr)


def result_of(run: RunDirectory) -> Result:
    config = run.read_config()
    steps = steps_of(config)
    at = next((step for step in steps if not run.step(step).is_finished), steps[-1])
    evaluation = run.read_comparison(run.last_step) or {}
    signs = training_signs(run, run.last_step) + (guard_signs(evaluation, *pair_of(evaluation)) if evaluation else [])
    measures = {key: measure for key, measure in measures_of(run, config, evaluation) if math.isfinite(measure.value)}
    bad = [sign.text for sign in signs if not sign.is_good]
    judge, state = evaluation.get("win_rate", {}).get("judge", ""), state_of(run, at)[0]
    drawn = ""
    if how := evaluation.get("sampling"):
        asked = f"{evaluation.get('prompts')} prompts"
        drawn = f"{asked}, temperature {how['temperature']:g}, at most {how['max_tokens']} tokens"
    lengthened = [f"step {step.label} was {time}" for step in steps for time in was_lengthened(run.step(step))]
    return Result(run, config, state, judge, drawn, measures, bad, lengthened, code_of(run, at))


def code_of(run: RunDirectory, step: Step) -> list[dict[str, str]]:
    versions: list[dict[str, str]] = []
    for start in read_starts(run):
        files = {name: content for kind in CODE for name, content in start.get(kind, {}).items()}
        if start["what"] == step.folder and files and files not in versions:
            versions.append(files)
    return versions


def print_table(comparison: Comparison) -> None:
    """Print the columns that the terminal has room for; settings, win rate and what is out of bounds in any case."""
    headings, rows = comparison.table()
    first = 1 + len(comparison.settings)
    console = PrintableConsole(width=columns(), highlight=False)
    headings = [heading if " " in heading else heading[::-1].replace(".", "\n.", 1)[::-1] for heading in headings]
    cells = [[row[column] for *_, row in rows] for column in range(len(headings))]
    widths = [
        len(BOUNDS) if heading == BOUNDS else max(map(cell_len, (*cells[column], *heading.split())))
        for column, heading in enumerate(headings)
    ]
    filled = [column for column in range(len(headings)) if column < first or any(cells[column])]
    shown = [column for column in filled if column <= first or headings[column] == BOUNDS]
    for column in (column for column in filled if column not in shown):
        if sum(widths[other] + 2 for other in (*shown, column)) > console.width:
            break
        shown.append(column)
    spare = console.width - sum(widths[column] + 2 for column in shown)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in sorted(shown):
        more = max(0, min(spare, max(map(cell_len, headings[column].splitlines())) - widths[column]))
        width, spare = widths[column] + more if spare >= 0 else None, spare - more
        is_figure = column >= first and headings[column] != BOUNDS
        heading = Text(headings[column])
        table.add_column(heading, overflow="fold", width=width, justify="right" if is_figure else "left")
    for _, _, is_group, row in rows:
        table.add_row(*(Text(row[column]) for column in sorted(shown)), style="bold" if is_group else "")
    console.print(table)
    if left := [headings[column] for column in filled if column not in shown]:
        console.print(f"No room for: {', '.join(left)}. --csv, --json and --out FILE have them.", markup=False)
    for note in comparison.notes():
        console.print(note, markup=False)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def short_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Names of directories; where two are equal, all are paths below what they have in common."""
    names = {path: path.name for path in paths}
    if len(set(names.values())) == len(paths):
        return names
    above = Path(os.path.commonpath(paths))
    return {path: str(path.relative_to(above)) for path in paths}


def is_seed(key: str) -> bool:
    return key.endswith("seed")


def copies(key: str, differ: Mapping[str, Sequence[str]]) -> bool:
    """Whether an earlier one of the settings that differ has the same values."""
    seeds = [other for other in differ if is_seed(other)]
    return any(differ[other] == differ[key] for other in seeds[: seeds.index(key)])


def text_of(value: Any) -> str:
    """A setting as people read it; a path below the working directory from there."""
    if isinstance(value, str) and Path(value).is_absolute() and Path(value).is_relative_to(Path.cwd()):
        return str(Path(value).relative_to(Path.cwd()))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def identity(result: Result) -> object:
    """What identifies the run's reward model, also in a copy of the run that made it."""
    model = Path(result.config.trained_reward_model or result.run.step(REWARD).model)
    return digest(model.parent / "result.json") or str(model.resolve())


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""
