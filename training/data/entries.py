"""What a file gives: values with the names of their places, or why there is none. Files are opened here."""

import gzip
import io
from pathlib import Path
from typing import IO, Any, cast

from inference.errors import UserError

GZIP = b"\x1f\x8b"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
"""What such a file begins with: what Excel calls Unicode text, and what PowerShell writes."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def printable(text: str) -> str:
    """The text without half characters, which no terminal and no file takes."""
    return text.encode("utf-8", "replace").decode()


class BadRow(Exception):
    """What is wrong with a row, as the rest of a sentence; also the name under which it is counted."""

    def __init__(self, reason: str):
        super().__init__(printable(reason))


class LeftOut(BadRow):
    """Why a row is not used though nothing is wrong with it: it is left out whatever `data.bad_rows` says."""


Entry = tuple[str, Any]
"""The name of a row's place, and its value: a BadRow where it cannot be read."""


def open_bytes(file: Path) -> IO[bytes]:
    """The content, unpacked, and as UTF-8 where it was UTF-16."""
    with open(file, "rb") as raw:
        unpack: Any = gzip.open if file.suffix == ".gz" or raw.read(len(GZIP)) == GZIP else open
    opened = cast(IO[bytes], unpack(file, "rb"))
    if opened.read(2) in UTF16:
        with opened:
            opened.seek(0)
            return io.BytesIO(opened.read().decode("utf-16", errors="replace").encode())
    opened.seek(0)
    return opened


def refuse_pointer(file: Path) -> None:
    """Raise UserError for what git leaves in the place of a large file where git-lfs is not installed."""
    with open(file, "rb") as handle:
        if handle.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{file} is a pointer of Git LFS and not the file itself: run git lfs pull in its repository (git lfs "
                f"install once before), or download the file."
            )
