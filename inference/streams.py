"""What our processes print. Work ends neither with who reads it nor with what an encoding cannot show."""

import codecs
import errno
import io
import json
import os
import re
import select
import sys
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO, cast

from inference.redaction import redacted
from inference.screen import Screen

STAND_INS = "rlhf_chat.stand_ins"
READER_GONE = (errno.EPIPE, errno.EIO)
"""Of a pipe, and of a terminal."""
EXIT_READER_GONE = 141
"""What a shell says of a command that SIGPIPE has ended."""


CONTROL_CHARACTERS = dict.fromkeys(
    [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
)
"""They would move the cursor, change the terminal, or turn the order of what is read; tabs and new lines do not."""
PROGRESS = re.compile(r"\r[^\x00-\x1f\x7f-\x9f]*|(\r|\n|\x1b\[A)*")
"""How a progress bar of a library writes over its line, and moves between lines."""


def printable(text: str) -> str:
    """`text`, of a model, a file or a user, without what would steer a terminal."""
    return text.translate(CONTROL_CHARACTERS)


def json_text(values: Any) -> str:
    """What is not printable is escaped."""
    text = json.dumps(values, indent=2, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda found: f"\\u{ord(found[0]):04x}", text)


def show_json(values: Any) -> None:
    """Print data for people and programs: in whole lines, however narrow the terminal is."""
    stream = unguarded(sys.stdout)
    text = json_text(values) + "\n"
    io.TextIOWrapper.write(stream, text) if isinstance(stream, Screen) else stream.write(text)


class Shown:
    """A stream that shows `printable` text, without secrets where it `redacts`. rich, which steers the terminal itself,
    writes to `rich_proxied_file`."""

    def __init__(self, stream: TextIO, redacts: bool = False):
        self.rich_proxied_file, self.redacts = stream, redacts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)

    def write(self, text: str) -> int:
        shown = text if PROGRESS.fullmatch(text) else printable(text)
        self.rich_proxied_file.write(redacted(shown) if self.redacts else shown)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)


class GuardedFile(io.FileIO):
    """A descriptor for what is shown. What it does not take is lost; with `ends` it ends the command, once."""

    def __init__(self, descriptor: int, ends: bool):
        super().__init__(descriptor, "w", closefd=False)
        self.ends = ends

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # full, and set not to wait by who shares it
                select.select([], [self], [])
            return written
        except OSError as error:
            if not self.ends:
                return len(data)
            self.ends = False  # flushing at the exit comes here again
            if error.errno in READER_GONE:
                raise SystemExit(EXIT_READER_GONE) from error
            raise


def guard_output(ends: bool = False) -> None:
    """Put stdout and stderr behind a GuardedFile; characters that their encoding lacks get a stand-in, and what would
    steer a terminal goes.

    `ends`: what the process prints is all that it is for, so it ends when nobody reads it. May be called again.
    """
    use_utf8()
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started the process: no file of ours shall take its number
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115
    codecs.register_error(STAND_INS, stand_ins)
    sys.stdout, sys.stderr = guarded(sys.stdout, ends), guarded(sys.stderr, redacts=True)


def use_utf8() -> None:
    """Start this process again in Python's UTF-8 mode where its locale has another encoding.

    File names are the same in every locale then, and so is what libraries open. What is shown keeps the encoding.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding if sys.stdout is not None else "utf-8")
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)


def guarded(stream: TextIO, ends: bool = False, redacts: bool = False) -> TextIO:
    """`stream`, guarded where it is a file and not what a caller reads in this process."""
    stream = unguarded(stream)
    is_ours = type(stream) in (io.TextIOWrapper, Screen)
    if not (isinstance(stream, io.TextIOWrapper) and is_ours) or stream.name == os.devnull:
        return stream
    with suppress(OSError):
        stream.flush()
    file = GuardedFile(stream.fileno(), ends)
    guarded_stream = (Screen if file.isatty() else io.TextIOWrapper)(
        io.BufferedWriter(file),
        stream.encoding,
        STAND_INS,
        line_buffering=stream.line_buffering or file.isatty(),
        write_through=stream.write_through,
    )
    return cast(TextIO, Shown(guarded_stream, redacts))


def unguarded(stream: TextIO) -> TextIO:
    """For data, of which nothing may be left out."""
    return getattr(stream, "rich_proxied_file", stream)


def stand_ins(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs: lines of tables become - | +, brackets [ ], all else that cannot be encoded ?."""
    assert isinstance(error, UnicodeEncodeError)
    return "".join(map(stand_in, error.object[error.start : error.end])), error.end


def stand_in(character: str) -> str:
    name = unicodedata.name(character, "")
    if not name.startswith("BOX DRAWINGS"):
        return {"Ps": "[", "Pe": "]", "Pd": "-"}.get(unicodedata.category(character), "?")
    return "+" if " AND " in name else "|" if name.endswith("VERTICAL") else "-"
