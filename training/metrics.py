"""What a run shows and keeps: metrics.jsonl, samples.jsonl, progress bars (plain lines in a pipe)."""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from inference.console import PrintableConsole
from inference.disk import GO_ON, writing
from inference.errors import UserError
from inference.redaction import redacted
from inference.streams import printable
from training.run_directory import write_text

PLAIN_LINE_SECONDS = 10.0
WARNING = "Warning: "
"""How a line begins that a log and the report repeat."""


class Journal:
    """A file of JSON lines, each with the number of the optimiser step or iteration that it belongs to."""

    def __init__(self, file: Path):
        self.file = file

    def write(self, number: int, values: dict[str, Any]) -> None:
        line = json.dumps({"number": number, **values}, ensure_ascii=False) + "\n"
        with writing("a line of it", self.file), open(self.file, "a", encoding="utf-8") as handle:
            handle.write(line)

    def rewind(self, number: int) -> None:
        """Forget what was written after `number`, and a last line that a crash cut short."""
        if not self.file.exists():
            return
        kept = [row for row in self.read() if row["number"] <= number]
        write_text(self.file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    def read(self) -> list[dict[str, Any]]:
        """The lines, without a last one that a crash cut short. Raises UserError for any other that is damaged."""
        rows: list[dict[str, Any]] = []
        if not self.file.exists():
            return rows
        with open(self.file, "rb") as lines:
            for place, line in enumerate(lines, 1):
                row = read_line(line)
                if row is not None:
                    rows.append(row)
                elif line.endswith(b"\n"):
                    raise UserError(f"Line {place} of {self.file} is damaged: delete that line, {GO_ON}.")
        return rows


def read_line(line: bytes) -> dict[str, Any] | None:
    """A journal's line; None where it is damaged."""
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("number"), int) else None


class NullJournal(Journal):
    """For ranks other than the first: nothing is written."""

    def __init__(self) -> None:
        super().__init__(Path("/dev/null"))

    def write(self, number: int, values: dict[str, Any]) -> None:
        pass

    def rewind(self, number: int) -> None:
        pass


WIDE = 70
"""Columns of a terminal that has room for a bar and its figures."""


class Display:
    """Progress on a terminal; in a pipe a line every few seconds. What is said is also kept in `log`."""

    def __init__(self, quiet: bool = False, log: Path | None = None):
        self.quiet, self.log = quiet, log
        self.console = PrintableConsole(file=sys.stdout, soft_wrap=True, highlight=False)

    def say(self, line: str) -> None:
        line = redacted(line)
        if not self.quiet:
            self.console.print(line, markup=False)
            if self.log is not None:
                with suppress(OSError), open(self.log, "a", encoding="utf-8") as log:
                    log.write(f"{printable(line)}\n")

    @contextmanager
    def progress(self, name: str, total: int, done: int = 0) -> Iterator["Bar"]:
        if self.quiet:
            yield Bar()
        elif self.console.is_terminal:
            columns: tuple[ProgressColumn, ...] = (
                TextColumn("{task.description}"),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("left"),
            )
            if self.console.width >= WIDE:
                figures = TextColumn("{task.fields[text]}")
                passed = TimeElapsedColumn(), TextColumn("passed")
                columns = (columns[0], BarColumn(), columns[1], *passed, *columns[2:], figures)
            with Progress(*columns, console=self.console) as progress:
                yield TerminalBar(progress, progress.add_task(name, total=total, completed=done, text=""))
        else:
            yield PlainBar(self, name, total, done)


class Bar:
    """Takes steps, shows nothing."""

    def advance(self, text: str = "") -> None:
        pass


class TerminalBar(Bar):
    def __init__(self, progress: Progress, task: TaskID):
        self.bar, self.task = progress, task

    def advance(self, text: str = "") -> None:
        self.bar.update(self.task, advance=1, text=text)


class PlainBar(Bar):
    def __init__(self, display: Display, name: str, total: int, done: int):
        self.display, self.name, self.total, self.first, self.done = display, name, total, done, done
        self.started = self.shown = time.monotonic()

    def advance(self, text: str = "") -> None:
        self.done += 1
        now = time.monotonic()
        if self.done < self.total and now - self.shown < PLAIN_LINE_SECONDS:
            return
        self.shown = now
        left = (now - self.started) / (self.done - self.first) * (self.total - self.done)
        parts = f"{self.name} {self.done}/{self.total}", f"{duration(left)} left", text
        self.display.say(" · ".join(filter(None, parts)))


def held_out_line(name: str, number: int, evaluation: Mapping[str, float], is_best: bool = False) -> str:
    """What an evaluation found, for people."""
    found = {key.removeprefix("eval/"): value for key, value in evaluation.items() if key.startswith("eval/")}
    shown = " · ".join(f"{key.replace('_', ' ')} {value:z.3f}" for key, value in found.items())
    return f"{name} {number}: held-out {shown or 'rows: none'}{' · the best so far' * is_best}"


def duration(seconds: float) -> str:
    """1:05 or 2:03:04."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(bytes_: float) -> str:
    """`1.5 GiB`, `212 GiB`, `38 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(bytes_) < 1023.5 or unit == "TiB":
            break
        bytes_ /= 1024
    return f"{bytes_:.1f} {unit}" if bytes_ < 9.95 and unit != "B" else f"{bytes_:.0f} {unit}"
