"""What a run shows and writes down: metrics.jsonl, samples.jsonl, progress bars (plain lines in a pipe)."""

import hashlib
import importlib.util
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

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
from inference.streams import printable, redacted, redacted_values
from training.config import RunConfig
from training.run_directory import RunDirectory, StepDirectory

PLAIN_LINE_SECONDS = 10.0
WARNING = "Warning: "  # how a line begins that a log and the report repeat
BEGIN = re.compile(rb'\{"number": (\d+),')  # how a journal's line begins


class Journal:
    """A file of JSON lines, each with the number of the optimiser step or iteration that it belongs to."""

    def __init__(self, file: Path):
        self.file = file

    def write(self, number: int, values: dict[str, Any]) -> None:
        self.extend(number, [values])

    def extend(self, number: int, rows: Iterable[dict[str, Any]]) -> None:
        lines = "".join(json.dumps({"number": number, **row}, ensure_ascii=False) + "\n" for row in rows)
        with writing("a line of it", self.file), open(self.file, "a", encoding="utf-8") as handle:
            handle.write(lines)

    def rewind(self, number: int) -> None:
        """Forget what was written after `number`, and a last line that a crash cut short."""
        if not self.file.exists():
            return
        length = 0
        for row, end in self._rows(read_number):  # of rollouts there may be gigabytes
            if row["number"] > number:
                break
            length = end
        with open(self.file, "r+b") as file:
            file.truncate(length)
            file.seek(max(0, length - 1))
            if file.read(1) not in (b"", b"\n"):  # the crash took the end of the line alone
                file.write(b"\n")

    def read(self) -> list[dict[str, Any]]:
        """Read the lines, without a last one that a crash cut short. Raises UserError for any other that is damaged."""
        return [row for row, _ in self._rows(read_line)]

    def read_one(self, number: int | None = None) -> tuple[list[dict[str, Any]], list[int]]:
        """Read the lines of a number (None: the newest), decoding no others, and all numbers in the file."""
        numbers, chosen = set[int](), list[bytes]()
        if self.file.exists():
            with open(self.file, "rb") as lines:
                for line in lines:
                    if (begin := BEGIN.match(line)) and line.endswith(b"\n"):
                        here = int(begin[1])
                        if number is None and here not in numbers:
                            chosen.clear()
                        numbers.add(here)
                        if number in (None, here):
                            chosen.append(line)
        return [row for line in chosen if (row := read_line(line)) is not None], sorted(numbers)

    def _rows(self, read: Callable[[bytes], dict[str, Any] | None]) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield what `read` makes of each line, and where the line ends in the file."""
        if not self.file.exists():
            return
        end = 0
        with open(self.file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                end += len(line)
                if (row := read(line)) is not None:
                    yield row, end
                elif line.endswith(b"\n"):
                    raise UserError(f"Line {number} of {self.file} is damaged: delete that line, {GO_ON}.")


def read_line(line: bytes) -> dict[str, Any] | None:
    """Read a journal's line; None where it is damaged."""
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("number"), int) else None


def read_number(line: bytes) -> dict[str, Any] | None:
    """Read as `read_line`, but the number alone of a line with a journal's beginning and end."""
    begin = BEGIN.match(line)
    return {"number": int(begin[1])} if begin and line.endswith(b"}\n") else read_line(line)


class NullJournal(Journal):
    """A journal for ranks other than the first, which write nothing."""

    def __init__(self) -> None:
        super().__init__(Path("/dev/null"))

    def extend(self, number: int, rows: Iterable[dict[str, Any]]) -> None:
        pass

    def rewind(self, number: int) -> None:
        pass


WIDE = 70  # columns of a terminal that has room for a bar and its figures


class Display:
    """Progress on a terminal; in a pipe a line every few seconds. What is said is also written to `log`."""

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
    metrics = {key.removeprefix("eval/"): value for key, value in evaluation.items() if key.startswith("eval/")}
    shown = " · ".join(f"{key.replace('_', ' ')} {value:z.3f}" for key, value in metrics.items())
    return f"{name} {number}: held-out {shown or 'rows: none'}{' · the best so far' * is_best}"


def duration(seconds: float) -> str:
    """Write seconds as 1:05 or 2:03:04."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(bytes_: float) -> str:
    """Write bytes as `1.5 GiB`, `212 GiB`, `38 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(bytes_) < 1023.5 or unit == "TiB":
            break
        bytes_ /= 1024
    return f"{bytes_:.1f} {unit}" if bytes_ < 9.95 and unit != "B" else f"{bytes_:.0f} {unit}"


PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""Setting of logging and pip extra -> module that it needs."""


class Tracker(Protocol):
    def begin(self, number: int) -> None:
        """Begin to take values; what an earlier start wrote after `number` no longer counts."""

    def write(self, number: int, values: dict[str, float]) -> None: ...


class TrackedJournal(Journal):
    """metrics.jsonl, each line with the time, and its followers. Both kinds of training rewind it before they write."""

    def __init__(self, step: StepDirectory, trackers: Sequence[Tracker]):
        super().__init__(step.metrics_file)
        self.trackers = trackers

    def rewind(self, number: int) -> None:
        super().rewind(number)
        for tracker in self.trackers:
            tracker.begin(number)

    def write(self, number: int, values: dict[str, Any]) -> None:
        super().write(number, {**values, "time/unix": round(time.time(), 3)})
        finite = {key: float(value) for key, value in values.items() if math.isfinite(value)}
        for tracker in self.trackers:
            tracker.write(number, finite)


class TensorBoard:
    """Event files in tensorboard/STEP of the run: `tensorboard --logdir runs/NAME/tensorboard`."""

    def __init__(self, run: RunDirectory, step: StepDirectory):
        self.directory = run.path / "tensorboard" / step.path.name

    def begin(self, number: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.directory), purge_step=number + 1)

    def write(self, number: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, number)
        self.writer.flush()  # a rank may be killed, or end itself without a farewell


class Wandb:
    """One W&B run a step, in one group. A resumed step goes on in the same one and writes some numbers twice."""

    def __init__(self, run: RunDirectory, step: StepDirectory, config: RunConfig):
        self.directory, self.step, self.config = run.path.resolve(), step.path.name, config

    def begin(self, number: int) -> None:
        import wandb

        self.directory.mkdir(parents=True, exist_ok=True)
        of_path = hashlib.sha256(str(self.directory).encode()).hexdigest()[:8]  # two runs may have one name
        self.run = wandb.init(
            project=self.config.logging.wandb_project,
            id=f"{self.directory.name}-{self.step}-{of_path}",
            name=f"{self.directory.name}/{self.step}",
            group=self.directory.name,
            config=redacted_values(self.config.model_dump(mode="json")),
            dir=str(self.directory),
            resume="allow",
        )
        self.run.define_metric("number")
        self.run.define_metric("*", step_metric="number")

    def write(self, number: int, values: dict[str, float]) -> None:
        self.run.log({"number": number, **values})


def metrics_journal(run: RunDirectory, step: StepDirectory, config: RunConfig) -> Journal:
    """Open metrics.jsonl of a step, and what the settings want beside it."""
    require_packages(config)
    trackers: list[Tracker] = []
    if config.logging.tensorboard:
        trackers.append(TensorBoard(run, step))
    if config.logging.wandb:
        trackers.append(Wandb(run, step, config))
    return TrackedJournal(step, trackers)


def require_packages(config: RunConfig) -> None:
    """Raise UserError where a setting needs a package that is not installed."""
    for name, module in PACKAGES.items():
        if getattr(config.logging, name) and importlib.util.find_spec(module) is None:
            raise UserError(
                f"logging.{name}=true needs the package {module}: pip install 'rlhf-chat[{name}]' (in the project: "
                f"pip install -e '.[{name}]'), or leave the setting out."
            )
