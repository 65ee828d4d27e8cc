"""Files that appear whole; what a disk refuses, and the sentence that says what was not written and the way out."""

import errno
import fcntl
import hashlib
import math
import os
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from inference.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_DISK = "the disk is full"
TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "PyTorchFileWriter")
"""torch.save loses the reason why a write failed, and says one of these."""
LITTLE_BYTES = 2**20
"""Where fewer are free, that was the reason."""
GO_ON = "then the same command goes on where it stopped"


@contextmanager
def writing(what: str, path: Path, then: str = GO_ON) -> Iterator[None]:
    """Inside, a write that the disk refuses raises a UserError with `what` was not written at `path`.

    `then` says how it goes on once that is put right. Errors of other kinds pass through.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # besides OSError, kinds of safetensors, tokenizers and torch
        reason = disk_reason(error, path)
        if reason is None:
            raise
        if reason == FULL_DISK:
            sentence = f"The disk of {path} is full, so {what} could not be written: make room, {then}."
        else:
            sentence = f"{path} cannot be written ({reason}), {what} is not there: set that right, {then}."
        raise UserError(sentence) from error


def disk_reason(error: BaseException | None, path: Path) -> str | None:
    """Why the disk of `path` refused, for `error` or what caused it; None where it is about something else."""
    if is_disk_full(error):
        return FULL_DISK
    while error is not None:
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            return error.strerror or os.strerror(error.errno)
        if isinstance(error, RuntimeError) and any(text in str(error) for text in TORCH_WRITER):
            return FULL_DISK if free_bytes(path) < LITTLE_BYTES else "a write failed"
        error = error.__cause__ or error.__context__
    return None


def write_text(file: Path, text: str, keeps_rights: bool = False) -> None:
    """Replace a file at once: a reader or a crash sees the old text or the new one.

    With `keeps_rights` its mode, and as far as possible its group, are those of the file that is replaced.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")  # ranks may write the same file at the same time
    try:
        with open(temporary, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            if keeps_rights:
                before = file.stat()
                with suppress(PermissionError):  # of a group that one is not in
                    os.fchown(handle.fileno(), -1, before.st_gid)
                os.fchmod(handle.fileno(), stat.S_IMODE(before.st_mode))
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(file)) from error  # of a full disk it knows no name


def settle(path: Path) -> None:
    """Bring the file `path`, or all files in it, to the disk, with the rights that the umask gives new ones.

    safetensors writes its own for their owner alone, and copies have those of what they were made from.
    """
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    probe = path.with_name(f".{path.name}.{os.getpid()}.rights")
    try:
        probe.touch(exist_ok=False)
        rights = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
    for file in files:
        if stat.S_IMODE(file.stat().st_mode) != rights:
            file.chmod(rights)
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that `path` is on, or would be."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def is_disk_full(error: BaseException | None) -> bool:
    """Whether `error` or what caused it is 'no space left on device' (or the user's quota)."""
    while error is not None:
        if getattr(error, "errno", None) in FULL or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def file_sentence(error: BaseException) -> str | None:
    """The sentence for what the operating system says of a file; None for an error of another kind.

    The last resort, at the boundaries: where it is known what was being written, `writing` says more.
    """
    path = ""
    if isinstance(error, OSError) and isinstance(error.filename, str | os.PathLike):
        path = os.fspath(error.filename)
    if is_disk_full(error):
        return f"The disk{f' of {path}' if path else ''} is full: make room, {GO_ON}."
    if not path or not isinstance(error, OSError):
        return None
    return f"{path} cannot be used ({error.strerror}): check that place and its rights, {GO_ON}."


NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
"""Errors of flock on a file system that has no locks."""


@contextmanager
def hold_lock(
    file: Path,
    busy: str,
    wait_seconds: float = math.inf,
    waits: Callable[[], object] = lambda: None,
    again_seconds: float = 0.1,
) -> Iterator[None]:
    """Hold the exclusive lock `file`; its directory is made. `waits` is called once if it has to wait, in which case it
    looks every `again_seconds` whether the lock is free.

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
            if error.errno not in NO_LOCKS:
                raise
            with ExitStack() as held:
                return _take_without_flock(file, held) is not None
    return False


def _take(file: Path, held: ExitStack) -> str | None:
    """Take the lock until `held` ends; else what is known of its holder."""
    with ExitStack() as until_refused:
        handle = until_refused.enter_context(_open(file))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ""
        except OSError as error:
            if error.errno not in NO_LOCKS:
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
