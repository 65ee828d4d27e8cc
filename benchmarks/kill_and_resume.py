"""kill -9 at random moments, resume, and compare with a run that nobody disturbed: bitwise.

    python -m benchmarks.kill_and_resume --kills 20 --processes 1 --seed 7

The `tiny` preset is trained twice. The victim loses, at random moments of every step, the command, its launcher, a
rank, or the whole process group; after each kill no process of the run may live on, and the same command is given
again. At the end the weights of all models must be the same bytes and the metrics the same numbers (timings and
memory aside).
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from training.run_directory import RunDirectory
from training.steps import METHODS, Step

ORPHAN_SECONDS = 60.0
UNEQUAL_METRICS = ("time/", "memory/", "tokens_per_second", "plan/", "pipeline/")
TARGETS = ("command", "launcher", "rank", "group")


@dataclass
class Kill:
    step: Step
    after_seconds: float
    target: str
    phase: str
    """The newest file of the step when the kill came: tells loading from training from saving."""


class Running(Protocol):
    """What is used of subprocess.Popen."""

    pid: int

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


Start = Callable[[list[str], Path], Running]
"""Runs rlhf-chat with arguments, as the leader of a session; what it says is appended to a file."""


def start_cold(arguments: list[str], log_file: Path) -> Running:
    program = [sys.executable, "-P", "-m", "rlhf_chat"]
    with open(log_file, "a", encoding="utf-8") as log:
        return subprocess.Popen([*program, *arguments], stdout=log, stderr=log, start_new_session=True)


def members(directory: Path, command: int = 0) -> list[psutil.Process]:
    """Processes that work on this run and what they started, the command (a number) first, ranks last."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        works = process.pid == command or str(directory) in (process.info["cmdline"] or [])
        if works and process.pid != os.getpid():
            with contextlib.suppress(psutil.NoSuchProcess):
                found |= {process, *process.children(recursive=True)}
    return sorted(filter(is_at_work, found), key=lambda process: process.create_time())


def is_at_work(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def kill(running: Running, alive: list[psutil.Process], target: str) -> None:
    """SIGKILL to one part of the run."""
    if target == "group":
        for process in alive:
            silently_kill(process)
        return
    children = [process for process in alive if process.pid != running.pid]
    chosen = {"command": None, "launcher": children[:1], "rank": children[-1:]}[target]
    if not chosen:
        running.kill()
    else:
        silently_kill(chosen[0])


def silently_kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)


def wait_until_gone(directory: Path, were_there: list[psutil.Process]) -> None:
    """Orphans end themselves; AssertionError if one lives on."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while alive := members(directory) + list(filter(is_at_work, were_there)):
        if time.monotonic() > deadline:
            raise AssertionError(f"still running {ORPHAN_SECONDS:g} s after the kill: {[p.cmdline() for p in alive]}")
        time.sleep(0.1)


@dataclass
class Experiment:
    """A run that nobody disturbs and its victim, both in `directory`."""

    directory: Path
    kills: int
    """In each step."""
    processes: int
    seed: int
    extra: list[str] = field(default_factory=list)
    start: Start = start_cold

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.undisturbed, self.victim = (RunDirectory(self.directory / name) for name in ("undisturbed", "victim"))

    def run(self, steps: list[Step]) -> list[Kill]:
        """The whole comparison. Returns what was killed when."""
        return [kill for step in steps for kill in self.torment(step, self.finish(self.undisturbed, step))]

    def begin(self, run: RunDirectory, step: Step) -> Running:
        # what --fusion auto chooses depends on measured seconds: two runs may round differently
        command = ["run", "--model", "tiny", "--name", str(run.path), "--steps", str(step.number), "--fusion", "none"]
        command += ["--processes", str(self.processes), "--set", "evaluation.prompts=0", *self.extra]
        return self.start(command, run.path.with_suffix(".log"))

    def finish(self, run: RunDirectory, step: Step) -> float:
        """Run the step to its end; returns the seconds. AssertionError with the log's end if it fails."""
        begun = time.monotonic()
        if self.begin(run, step).wait() != 0:
            raise AssertionError(run.path.with_suffix(".log").read_text()[-3000:])
        return time.monotonic() - begun

    def torment(self, step: Step, seconds: float) -> list[Kill]:
        """Kill the victim's step at moments up to `seconds` after its start.

        A step that ends before its next kill is compared with the undisturbed one and begun anew; so is the last one.
        """
        done: list[Kill] = []
        directory = self.victim.path
        while len(done) < self.kills:
            running = self.begin(self.victim, step)
            delay, target = self.draw.uniform(0.3, seconds), self.draw.choice(TARGETS)
            try:
                running.wait(timeout=delay)
                compare(self.undisturbed, self.victim, [step])
                shutil.rmtree(self.victim.step(step).path)
                continue
            except subprocess.TimeoutExpired:
                pass
            files = [f for f in self.victim.step(step).path.rglob("*") if f.is_file()]
            newest = max(files, key=lambda f: f.stat().st_mtime, default=None)
            phase = str(newest.relative_to(directory)) if newest else "nothing written"
            alive = members(directory, running.pid)
            kill(running, alive, target)
            running.wait()
            wait_until_gone(directory, alive)
            done.append(Kill(step, delay, target, phase))
        self.finish(self.victim, step)
        compare(self.undisturbed, self.victim, [step])
        return done


def weights(run: RunDirectory, step: Step) -> dict[str, str]:
    """SHA-256 of each weights file of the step's model."""
    files = sorted(run.step(step).model.glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def metrics(run: RunDirectory, step: Step) -> list[dict]:
    """Rows of metrics.jsonl without timings and memory."""
    rows = [json.loads(line) for line in run.step(step).metrics_file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(UNEQUAL_METRICS)} for row in rows]


def compare(undisturbed: RunDirectory, victim: RunDirectory, steps: list[Step]) -> None:
    """AssertionError at the first difference."""
    for step in steps:
        ours, theirs = metrics(undisturbed, step), metrics(victim, step)
        assert len(ours) == len(theirs), f"{step.folder}: {len(ours)} rows of metrics against {len(theirs)}"
        for a, b in zip(ours, theirs, strict=True):
            assert a == b, f"{step.folder} metrics differ: {a} against {b}"
        assert weights(undisturbed, step) == weights(victim, step), f"{step.folder}: weights differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills in each step")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, default=Path("runs/kill-and-resume"))
    arguments = parser.parse_args()
    directory = (arguments.directory / f"{arguments.processes}-{arguments.seed}-{os.getpid()}").resolve()
    directory.mkdir(parents=True)
    kills = Experiment(directory, arguments.kills, arguments.processes, arguments.seed).run(list(METHODS["ppo"]))
    for one in kills:
        print(f"{one.step.folder}  {one.target:8s} after {one.after_seconds:5.1f} s, last written: {one.phase}")
    print(f"{len(kills)} kills, seed {arguments.seed}, {arguments.processes} process(es): weights and metrics equal")


if __name__ == "__main__":
    main()
