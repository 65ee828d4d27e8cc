"""`rlhf-chat runs`: which runs are there, how far each is, and what came out."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from applications.report_table import ROWS, pair_of, share, shown
from inference.console import PrintableConsole
from inference.errors import UserError, reason
from inference.streams import columns
from training.config import RunConfig
from training.metrics import Journal, duration, read_line, size
from training.opening import begun_at, read_starts
from training.run_directory import RunDirectory, StepDirectory, read_json
from training.steps import REWARD, Step
from training.termination import EXIT_TERMINATED
from training.trust import of_reading, unanswered

UNREADABLE = (UserError, OSError, LookupError, TypeError, ValueError, AttributeError)
"""What reading a run raises; the last four where a file is JSON, and none that a run writes."""
TAIL = 2**16  # bytes at the end of a journal, in which its last line is


@dataclass(frozen=True)
class Listed:
    """A run as `rlhf-chat runs --json` has it; times in UTC."""

    run: str
    state: str  # running (a command works in it), finished, stopped, failed, or unreadable
    step: str = ""  # the last one, or the one that it is at, and how many iterations or optimiser steps that has done
    model: str = ""
    method: str = ""
    seed: int = 0
    started: str = ""
    written: str = ""  # when anything in it was written last
    seconds: float = 0.0  # that its steps took, from each start to the last line that was saved
    bytes: int = 0  # on the disk; what has several names in it counts once
    result: str = ""  # the win rate with its interval; else the newest figures; of what failed, the sentence
    win_rate: Mapping[str, Any] | None = None

    @property
    def cells(self) -> tuple[str, ...]:
        age = ago(self.started or self.written)
        return self.run, self.state, self.step, age, duration(self.seconds), size(self.bytes), self.result


HEADINGS = ("run", "state", "step", "begun", "trained", "size", "result")


def runs_command(directory: Path, as_json: bool) -> None:
    runs = sorted(map(listed, find_runs(directory)), key=lambda run: run.written, reverse=True)
    if as_json:
        print(json.dumps([asdict(run) for run in runs], indent=2))
    elif not runs:
        print(f"There is no run in {directory}: rlhf-chat run --model tiny makes one.")
    else:
        table = Table(*HEADINGS, box=None, pad_edge=False)
        for run in runs:
            table.add_row(*map(Text, run.cells))
        PrintableConsole(width=columns(), highlight=False).print(table)


def find_runs(directory: Path) -> list[RunDirectory]:
    """The directory itself, or the runs in it and in its folders, by name. Raises UserError where it is not there."""
    if not directory.is_dir():
        raise UserError(f"There is no directory {directory}: say where the runs are, as in rlhf-chat runs DIRECTORY.")
    runs = []
    for folder, below, files in os.walk(directory):
        below[:] = [] if "config.yaml" in files else sorted(name for name in below if not name.startswith("."))
        runs += [RunDirectory(Path(folder))] * ("config.yaml" in files)
    return sorted(runs, key=lambda run: run.path)


def named_runs(directories: Sequence[Path]) -> list[RunDirectory]:
    """The runs that the directories are or have in them, once. Raises UserError where there is none."""
    runs = {run.path.resolve(): run for directory in directories for run in find_runs(directory)}
    if not runs:
        listed = ", ".join(map(str, directories))
        raise UserError(f"There is no run in {listed}: rlhf-chat runs lists those of a directory.")
    return list(runs.values())


def listed(run: RunDirectory) -> Listed:
    """What the files of a run say; one that cannot be read says why."""
    name, (held, written) = str(run.path), measure(run.path)
    try:
        if links := unanswered(run.path, of_reading(run.path)):
            raise UserError(f"Reading it would {'; '.join(use.text for use in links)} (docs/safety.md).")
        config = run.read_config()
        starts = read_starts(run)
        steps = steps_of(config)
        at = next((step for step in steps if not run.step(step).is_finished), steps[-1])
        state, sentence = state_of(run, at)
        comparison = run.read_comparison(run.last_step) or {}
        return Listed(
            name,
            state,
            progress(run.step(at), config),
            config.model,
            config.method,
            config.seed,
            begun_at(run),
            written,
            round(sum(seconds_of(run.step(step), starts) for step in steps), 1),
            held,
            sentence or share(comparison.get("win_rate")) or newest_figures(run.step(at)),
            comparison.get("win_rate"),
        )
    except UNREADABLE as error:
        return Listed(name, "unreadable", written=written, bytes=held, result=why_unreadable(run, error))


def why_unreadable(run: RunDirectory, error: Exception) -> str:
    """Say one of UNREADABLE in a sentence."""
    if isinstance(error, UserError | OSError):
        return str(error)
    return f"A file of {run.path} holds what was never written there ({type(error).__name__}: {reason(error)})."


def steps_of(config: RunConfig) -> list[Step]:
    """The steps that leave a model of the run's own."""
    return [step for step in config.steps if not config.given_model(step)] or config.steps


def state_of(run: RunDirectory, at: Step) -> tuple[str, str]:
    """State of a run that is at a step; with the sentence of what failed."""
    if run.is_in_use:
        return "running", ""
    if run.step(at).is_finished:
        return "finished", ""
    for file in (run.step(at).error_file, run.error_file):
        error = read_json(file, "delete it") if file.exists() else {}
        if error.get("code", EXIT_TERMINATED) != EXIT_TERMINATED:
            return "failed", str(error.get("sentence", ""))
    return "stopped", ""


def progress(step: StepDirectory, config: RunConfig) -> str:
    """`rlhf 40/100`, `sft 12`, `sft` of one that has not begun or is finished."""
    row = {} if step.is_finished else last_row(step.metrics_file)
    of = f"/{config.rlhf.iterations}" if step.step.draws_samples else ""
    return f"{step.step.command} {row['number']}{of}" if row else step.step.command


def newest_figures(step: StepDirectory) -> str:
    """`score 0.52, KL 1.20`, `loss 2.31`: of the last line of the metrics."""
    names = {"reward/score_mean": "score", "kl/reference": "KL", "eval/accuracy": "accuracy"}
    names |= {"eval/loss": "held-out loss", "loss": "loss"}
    row = last_row(step.metrics_file)
    figures = {name: row[key] for key, name in names.items() if key in row}
    return ", ".join(f"{name} {value:.3g}" for name, value in figures.items() if math.isfinite(value))


def last_row(journal: Path) -> dict[str, Any]:
    """The last line that is whole; empty where there is none."""
    if not journal.exists():
        return {}
    with open(journal, "rb") as lines:
        lines.seek(max(0, os.path.getsize(journal) - TAIL))
        rows = (read_line(line) for line in reversed(lines.read().splitlines()))
        return next((row for row in rows if row is not None), {})


def seconds_of(step: StepDirectory, starts: list[dict[str, Any]]) -> float:
    """Sum the seconds from each start of the step to its last saved line; those of a finished step go to its end."""
    begun = [unix(start["time"]) for start in starts if start["what"] == step.path.name]
    last = step.read_result().get("seconds", 0.0) if step.is_finished else None  # of the last start
    if last is not None and len(begun) < 2:
        return float(last)
    if not step.metrics_file.exists():
        return 0.0
    times = [row["time/unix"] for row in Journal(step.metrics_file).read() if "time/unix" in row]
    ends = [*begun[1:], math.inf]
    seconds = [
        max((time - start for time in times if start <= time < end), default=0.0)
        for start, end in zip(begun, ends, strict=False)
    ]
    return sum(seconds if last is None else [*seconds[:-1], last])


def measure(directory: Path) -> tuple[int, str]:
    """Bytes of the files in a directory, each once, and when the newest was written."""
    files = {(file.st_dev, file.st_ino): file for file in files_in(directory)}
    newest = datetime.fromtimestamp(max((file.st_mtime for file in files.values()), default=0.0), UTC)
    return sum(file.st_size for file in files.values()), newest.isoformat(timespec="seconds")


def files_in(directory: Path) -> Iterator[os.stat_result]:
    """What `lstat` says of all files in it; what is deleted meanwhile is left out."""
    for folder, _, files in os.walk(directory):
        for name in files:
            try:
                yield os.lstat(os.path.join(folder, name))
            except FileNotFoundError:
                continue


def unix(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


def ago(time: str) -> str:
    """`40 s`, `5 min`, `3 h`, `2 d` before now."""
    passed = max(0.0, datetime.now(UTC).timestamp() - unix(time))
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if passed >= 2 * seconds:
            return f"{passed / seconds:.0f} {unit}"
    return f"{passed:.0f} s"


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

    @property
    def as_json(self) -> float | dict[str, float | None]:
        return self.value if self.low is None else {"value": self.value, "low": self.low, "high": self.high}

    def show(self, value: float) -> str:
        return shown(value, self.form)


def measures_of(run: RunDirectory, config: RunConfig, evaluation: Mapping[str, Any]) -> Iterator[tuple[str, Measure]]:
    """What the comparison and the steps of a run left."""
    results = {step: run.step(step).read_result() for step in steps_of(config) if run.step(step).is_finished}
    accuracy = {**results.get(REWARD, {}), **evaluation}.get("reward_accuracy", {}).get("all")
    for key, rate in ({key: evaluation.get(key) for key in RATES} | {"reward_accuracy": accuracy}).items():
        if rate:
            yield key, Measure(RATES[key], PERCENT, rate["rate"], rate["low"], rate["high"])
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
