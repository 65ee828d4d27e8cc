"""Locks that end with the process that holds them, however it ends; also on file systems that know none."""

import errno
import fcntl
import hashlib
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from inference.errors import UserError

NOT_KNOWN = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
"""What flock says on a file system that has no locks."""


@contextmanager
def hold_lock(
    file: Path,
    busy: str,
    wait_seconds: float = math.inf,
    waits: Callable[[], object] = lambda: None,
    again_seconds: float = 0.1,
) -> Iterator[None]:
    """Hold the exclusive lock `file`; its directory is made. `waits` is called once if it has to wait.

    While it waits it looks every `again_seconds` whether the lock is free.

    Raises UserError, which begins with `busy`, where another process still holds it after `wait_seconds`.
    """
    deadline, waited = time.monotonic() + max(wait_seconds, again_seconds), False  # `is_held` takes it for a moment
    with ExitStack() as held:
        while (holder := _take(file, held)) is not None:
            if time.monotonic() >= deadline:
                raise UserError(f"{busy}{holder}; wait until it has ended, or stop it.")
            if not waited:
                waits()
                waited = True
            time.sleep(again_seconds)
        yield


def is_held(file: Path) -> bool:
    """Whether a process holds the lock `file`. Makes no file, and holds up nobody for longer than a look takes."""
    if not file.exists():
        return False
    with open(file, encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno not in NOT_KNOWN:
                raise
            with ExitStack() as held:
                return _take_without_flock(file, held) is not None
    return False


def _take(file: Path, held: ExitStack) -> str | None:
    """Take the lock until `held` ends; else what is known of who has it."""
    with ExitStack() as until_refused:
        handle = until_refused.enter_context(_open(file))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ""
        except OSError as error:
            if error.errno not in NOT_KNOWN:
                raise
            holder = _take_without_flock(file, until_refused)
            if holder is not None:
                return holder
        if not _is_there(file, handle):  # who held it has removed it
            return _take(file, held)
        held.push(until_refused.pop_all())
        return None


def _open(file: Path) -> IO[str]:
    for _ in range(3):
        file.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # who held it has removed the directory in this moment
            return open(file, "a", encoding="utf-8")
    return open(file, "a", encoding="utf-8")


def _is_there(file: Path, handle: IO[str]) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(file), os.fstat(handle.fileno()))
    return False


def _take_without_flock(file: Path, held: ExitStack) -> str | None:
    """A name that one process of this machine may have, and ends with it; and a file that says which machine has it.

    Raises UserError where such names are not known either.
    """
    name = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()
    local = held.enter_context(socket.socket(socket.AF_UNIX))
    try:
        local.bind(f"\0rlhf-chat/{name}")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return ""
        raise UserError(
            f"{file.parent} lies on a file system without locks, where two commands would write over each other: "
            f"choose a place on another one, or mount it with locks."
        ) from None
    here, owner = socket.gethostname(), file.with_name(f"{file.name}.host")
    try:
        with open(owner, "x", encoding="utf-8") as new:
            new.write(here)
    except FileExistsError:
        there = owner.read_text(encoding="utf-8")
        if there != here:  # what this machine has left there is of a process that is gone
            return f" on {there or 'another machine'} (if nothing runs there any more, delete {owner})"
    held.callback(owner.unlink, missing_ok=True)
    return None
