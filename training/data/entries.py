"""What a file gives: values with their locations, or why there is none. Files are opened here."""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile

from inference.errors import UserError

UTF16 = (b"\xff\xfe", b"\xfe\xff")
"""How files begin that Excel calls Unicode text, or that PowerShell writes."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def printable(text: str) -> str:
    """Return the text without half characters, which no terminal and no file takes."""
    return text.encode("utf-8", "replace").decode()


class BadRow(Exception):
    """What is wrong with a row, as the rest of a sentence; also the name under which it is counted."""

    def __init__(self, reason: str):
        super().__init__(printable(reason))


class LeftOut(BadRow):
    """Why a row is not used though nothing is wrong with it: it is left out whatever `data.bad_rows` says."""


class CutShort(BadRow):
    """What is wrong with a last line that has no end: a kill or a full disk may have cut it."""


Entry = tuple[str, Any]
"""The location of a row (`rows.jsonl, line 3`), and its value: a BadRow where it cannot be read."""


def open_bytes(file: Path) -> IO[bytes]:
    """Open the content, unpacked, and as UTF-8 where it was UTF-16."""
    with open(file, "rb") as raw:
        begin = raw.read(6)
    unpack = next((unpack for mark, unpack in UNPACK.items() if begin.startswith(mark)), open)
    opened: IO[bytes] = unpack(file, "rb")
    if opened.read(2) in UTF16:
        with opened:
            opened.seek(0)
            return io.BytesIO(opened.read().decode("utf-16", errors="replace").encode())
    opened.seek(0)
    return opened


def open_member(file: Path, mode: str) -> IO[bytes]:
    """Open the only file in a zip file. Raises UserError where there are several, or it cannot be unpacked."""
    archive = ZipFile(file)
    names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
    if len(names) != 1:
        raise UserError(f"{file} has {len(names)} files in it: unpack it, and give one of them or their directory.")
    try:
        return archive.open(names[0])
    except (RuntimeError, NotImplementedError) as error:  # a password, another kind of packing
        raise UserError(f"{file} cannot be unpacked ({error}); unpack it yourself.") from None


UNPACK: dict[bytes, Callable[[Path, str], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"PK\3\4": open_member,
}
"""What packed files begin with, and who opens them. The file's name does not count."""


def refuse_pointer(file: Path) -> None:
    """Raise UserError for what git leaves instead of a large file where git-lfs is not installed."""
    with open(file, "rb") as handle:
        if handle.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{file} is a pointer of Git LFS and not the file itself: run git lfs pull in its repository (git lfs "
                f"install once before), or download the file."
            )
