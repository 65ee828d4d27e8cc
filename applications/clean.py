"""`rlhf-chat clean` deletes what runs can do without, and says how much it is and what is impossible then."""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from applications.runs import files_in, named_runs
from inference.errors import UserError, typed
from training.changes import PLAN
from training.metrics import size
from training.run_directory import RunDirectory, StepDirectory, numbered, remove_directory
from training.steps import STEPS
from training.trust import require_reading

LEFT_OVER = (".*.tmp", ".*.old", ".*.room")
"""What a process that was killed leaves half written, or half deleted."""


OF_NUMBERS = ("checkpoints", "best")
"""Directories in which what is old was being deleted, for training too."""


@dataclass(frozen=True)
class Part:
    """A file or directory of a run that can go."""

    kind: str
    path: Path


def clean_command(runs: Sequence[Path], everything: bool, yes: bool, trusts: bool) -> None:
    """Delete after a yes, typed or in the terminal; a run that is in use is left as it is.

    Raises UserError where no run can be cleaned.
    """
    refused = []
    with ExitStack() as held:
        free = []
        for run in named_runs(runs):
            try:
                require_reading(run.path, trusts)
                run.read_config()
                if (run.path / PLAN).exists():
                    raise UserError("it is being made longer; first give the command that does it again.")
                with ExitStack() as taken:
                    taken.enter_context(run.locked())
                    for step in STEPS:
                        if run.step(step).path.is_dir():
                            taken.enter_context(run.step(step).locked(0))
                    held.push(taken.pop_all())
                free.append(run)
            except UserError as error:
                refused.append(f"{run.path} is left as it is: {error}")
        if not free:
            raise UserError(" ".join(refused))
        parts = {run: list(parts_of(run, everything)) for run in free}
        for run in free:
            for line in (f"{run.path}: {what_is(parts[run])}", *(f"  then {loss}" for loss in lost(run, parts[run]))):
                print(line)
        for sentence in refused:
            print(sentence, file=sys.stderr)
        all_parts = [part for of_run in parts.values() for part in of_run]
        if not all_parts:
            return
        frees = f"{size(freed(all_parts))} in {len(free)} run{'s' * (len(free) > 1)}"
        if not yes and not agreed(frees):
            print(f"Nothing was deleted; --yes frees {frees}.")
            return
        frees = f"Freed {frees}."
        for part in all_parts:
            delete(part)
        print(frees)


def agreed(frees: str) -> bool:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    print(f"Free {frees}? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def parts_of(run: RunDirectory, everything: bool) -> Iterator[Part]:
    """No models, and nothing that a link leads to."""
    home = run.path.resolve()
    for part in candidates(run, everything):
        path = part.path
        if not path.is_symlink() and path.exists() and path.resolve().is_relative_to(home):
            yield part


def candidates(run: RunDirectory, everything: bool) -> Iterator[Part]:
    folders = [run.path]
    for step in map(run.step, STEPS):
        numbers, best = numbered(step.checkpoints), numbered(step.best)
        newest = [] if everything else numbers[-1:]
        needed = {max((n for n in best if n <= at), default=-1) for at in newest}
        if not everything and not step.is_finished:
            needed |= set(best[-1:])
        yield from (Part("checkpoints", step.checkpoints / str(n)) for n in numbers if n not in newest)
        yield from (Part("best models so far", step.best / str(n)) for n in best if n not in needed)
        folders += [step.path, step.checkpoints, step.best]
    yield Part("tokens of the rows, which are made again", run.tokens)
    for folder in folders:
        for pattern in LEFT_OVER:
            for path in sorted(folder.glob(pattern)):
                is_whole = pattern == ".*.old" and folder.name not in OF_NUMBERS  # what is being replaced
                if not is_whole or path.with_name(path.name[1:-4]).exists():  # else it may be all there is
                    yield Part("left by processes that were killed", path)


def what_is(parts: Sequence[Part]) -> str:
    """`1.2 GiB (1.1 GiB: 3 checkpoints; 80 MiB: tokens)`."""
    if not parts:
        return "nothing to free"
    kinds = Counter(part.kind for part in parts)
    texts = [
        f"{size(freed(part for part in parts if part.kind == kind))}: {f'{count} ' * (count > 1)}{kind}"
        for kind, count in kinds.items()
    ]
    return f"{size(freed(parts))} ({'; '.join(texts)})"


def freed(parts: Iterable[Part]) -> int:
    """Bytes of files that have no other name elsewhere."""
    names: Counter[tuple[int, int]] = Counter()
    files: dict[tuple[int, int], os.stat_result] = {}
    for part in parts:
        for file in files_in(part.path) if part.path.is_dir() else [part.path.lstat()]:
            key = file.st_dev, file.st_ino
            names[key] += 1
            files[key] = file
    return sum(file.st_size for key, file in files.items() if names[key] >= file.st_nlink)


def lost(run: RunDirectory, parts: Sequence[Part]) -> Iterator[str]:
    """What is impossible without them."""
    gone = {part.path for part in parts}
    for step in map(run.step, STEPS):
        numbers = numbered(step.checkpoints)
        if left_out := [n for n in numbers if step.checkpoints / str(n) in gone]:
            yield from impossible(step, left_out, len(left_out) == len(numbers))


def impossible(step: StepDirectory, numbers: Sequence[int], are_all: bool) -> Iterator[str]:
    if not step.step.leaves_scorer:  # whose checkpoints nothing opens
        names = ", ".join(typed(f"{step.path}@{number}") for number in numbers)
        yield f"{names} cannot be opened any more"
    if are_all and step.is_finished:
        yield f"step {step.step.label} cannot be made longer"
    elif are_all:
        yield f"step {step.step.label} begins again: {numbers[-1]} {step.step.unit}s of it are lost"


def delete(part: Part) -> None:
    """Delete a part so that a crash halfway leaves nothing that looks whole."""
    if not part.path.is_dir():
        part.path.unlink(missing_ok=True)
    elif part.path.name.startswith("."):
        shutil.rmtree(part.path)
    else:
        remove_directory(part.path)
