"""Systems that take turns: each is a process of its own that makes one PPO iteration when it is asked to.

The process that asks reads one line of JSON an answer. What the libraries print goes to the system's log.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import psutil

QUIET = 0.05
"""Share of the machine that other processes may use while we measure."""
PHASES = ("generate", "score", "train", "total")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY")


class Channel:
    """The worker's end: the real standard output carries answers, everything printed later goes to stderr."""

    def __init__(self) -> None:
        self.answers: TextIO = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(self, values: dict[str, Any]) -> None:
        self.answers.write(json.dumps(values) + "\n")
        self.answers.flush()

    def wait(self) -> int:
        """The number of the iteration that is wanted. Raises SystemExit when no more are."""
        line = sys.stdin.readline()
        if not line:
            raise SystemExit(0)
        return int(line)


def serve(notes: dict[str, str], iterate: Callable[[int], dict[str, float]], channel: Channel) -> None:
    """Answer until nobody asks any more. `notes` say what this system is; `iterate` gives the seconds of PHASES."""
    channel.answer(notes)
    while True:
        channel.answer({**iterate(channel.wait()), "peak_gb": peak_gb()})


def measured(
    what: str, step: Callable[[int], dict[str, float]], steps: int, channel: Channel | None
) -> list[dict[str, float]]:
    """What `step` gives for numbers 0 to `steps`, of which the first warms up; with a channel, what it asks for."""
    if channel is not None:
        serve({"what": what}, step, channel)
    return [step(number) for number in range(steps + 1)]


def print_medians(rows: Sequence[dict[str, float]], names: Iterable[str] = ()) -> None:
    for name in names or rows[0]:
        print(f"{name:10s} {statistics.median(row[name] for row in rows):.4f}")


def peak_gb() -> float:
    """The most memory that this process has used."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


@dataclass(frozen=True)
class System:
    """A name for tables and the command that starts it."""

    name: str
    command: list[str]


class Failed(Exception):
    """A system ended before it answered."""


class Worker:
    """The asking end. Use as a context manager: the process ends with the block."""

    def __init__(self, system: System, log: Path):
        self.system, self.log = system, log
        environment = {name: value for name, value in os.environ.items() if name not in THREAD_VARIABLES}
        environment["CUDA_VISIBLE_DEVICES"] = ""  # the work is for a CPU
        with open(log, "w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                system.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )

    @cached_property
    def notes(self) -> dict[str, Any]:
        """What the system says that it is, once it is ready."""
        return self._answer()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def iterate(self, number: int) -> dict[str, float]:
        """One iteration: seconds by phase, and `others`, the share of the machine that other processes used."""
        assert self.notes  # it is ready
        before, own, begun = busy_seconds(), self._own_seconds(), time.perf_counter()
        self.process.stdin.write(f"{number}\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        answer = self._answer()
        used = (busy_seconds() - before) - (self._own_seconds() - own)
        share = used / ((time.perf_counter() - begun) * (os.cpu_count() or 1))
        return {**answer, "others": min(1.0, max(0.0, share))}  # processor times come in ticks of 10 ms

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            self.process.wait()
            raise Failed(f"{self.system.name} ended without an answer:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def _own_seconds(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system


def busy_seconds() -> float:
    """Processor seconds that this machine has worked, all cores together."""
    times = psutil.cpu_times()
    # guest time is in user time already
    return times.user + times.system + getattr(times, "nice", 0.0) + getattr(times, "steal", 0.0)


def wait_until_quiet(seconds: float) -> None:
    """Wait, at most so long, for a second in which the machine is nearly idle."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        before = busy_seconds()
        time.sleep(1)
        if (busy_seconds() - before) / (os.cpu_count() or 1) < QUIET:
            return
