"""error.json: the sentence that a stage ended with, for the command that started it. A full disk has room for it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from inference.streams import redacted
from training.run_directory import write_json

ROOM = 16_384  # bytes that are reserved for a report


@contextmanager
def room_for_report(file: Path) -> Iterator[None]:
    """Reserve room for the report `file` while a stage runs, and remove an older one. Raises OSError on a full disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    room = room_of(file)
    try:
        with open(room, "wb") as handle:
            handle.write(b" " * ROOM)  # written, so that its blocks are there: a file system may refuse them later
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        with suppress(OSError):
            room.unlink()
        raise OSError(error.errno, error.strerror, str(file)) from error
    try:
        yield
    finally:
        room.unlink(missing_ok=True)


def room_of(file: Path) -> Path:
    return file.with_name(f".{file.name}.room")


def leave_report(file: Path, sentence: str, code: int, traceback: str = "") -> None:
    """Write the report, unless another rank has; on a full disk into the reserved room, without `traceback`."""
    report = {"sentence": redacted(sentence), "code": code}
    with suppress(OSError):  # a run that was refused leaves no directory
        if file.exists():
            return
        try:
            write_json(file, {**report, "traceback": redacted(traceback)} if traceback else report)
        except OSError:
            with open(room_of(file), "r+b") as handle:
                handle.write(json.dumps(report).encode()[:ROOM].ljust(ROOM))
            os.replace(room_of(file), file)
