"""What our processes print. Work ends neither with who reads it nor with what an encoding cannot show."""

import codecs
import errno
import io
import json
import logging
import os
import re
import select
import sys
import unicodedata
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TextIO, cast
from urllib.parse import unquote

from rich.cells import cell_len

USUAL_COLUMNS = 100  # where there is no terminal
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\].*?(?:\x07|\x1b\\)")
"""What colours text or moves the cursor."""


class Screen(io.TextIOWrapper):
    """A line that the terminal has no room for is broken between words, and goes on below its text."""

    _column = 0

    def write(self, text: str) -> int:
        width = columns(self.fileno())
        for part in re.split("([\n\r])", text):
            if part in ("\n", "\r"):
                self._column = 0
            elif self._column + cells(part) > width:
                part, self._column = broken(part, self._column, width)
            else:
                self._column += cells(part)
            super().write(part)
        return len(text)


def broken(line: str, column: int, width: int) -> tuple[str, int]:
    """A line that begins in `column`, broken into several ones, and the column behind it."""
    stops = [match.end() for match in re.finditer("^ +|  +", CONTROL.sub("", line))] if column == 0 else []
    indent = max((stop for stop in stops if stop <= width // 2), default=0)
    text = gap = ""
    for word in re.findall(" +|[^ ]+", line):
        if word.isspace():
            gap = word
            continue
        if column > indent and column + cells(gap + word) > width:
            gap, column = " " * max(0, min(indent, width - cells(word))), 0
            text += "\n"
        text += gap + word
        column += cells(gap + word)
        gap = ""
    return text, (column - 1) % width + 1 if column else 0


def cells(text: str) -> int:
    """Columns that a text takes on a terminal: 2 for each wide character, none for control sequences."""
    return cell_len(CONTROL.sub("", text))


def columns(descriptor: int = 1) -> int:
    """The terminal's columns, or as COLUMNS says; 100 where there is none."""
    if (said := os.environ.get("COLUMNS", "")).isdecimal() and int(said):
        return int(said)
    with suppress(OSError):
        return os.get_terminal_size(descriptor).columns or USUAL_COLUMNS
    return USUAL_COLUMNS


HIDDEN = "***"
VARIABLE = re.compile(r"\$\{(\w+)\}")
"""How a setting names an environment variable that holds its secret."""
_OF_URL = re.compile(r"(?<=://)(?:[^\s/'\":@]*:)?([^\s/'\"]*)@")
_NAMED = re.compile(
    r"(?i)((?:^|[\s?&;\"'.:_-]|api|access|auth)"
    r"(?:token|key|secret|password|passwd|passphrase|pwd|pw|jwt|signature|sig|credentials?|authorization|auth)"
    r"[\"']?\s*[=:]\s*)"
    r"(\$\{\w+\}|\"[^\"]*\"|'[^']*'|(?:(?:bearer|basic|token)\s+)?[^\s&;,\"'#}]+)"
)
_OPTION = re.compile(r"(?i)--?(?:[a-z0-9_-]+[_-])?(?:token|key|secret|password|auth)")
_KNOWN = re.compile(
    r"\b(?:hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox[abp]-|AKIA|eyJ)[\w.-]{12,}|(?<=\bbearer )[\w.~+/=-]{8,}",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(r"(?i)(?:token|key|secret|password|passwd|passphrase|credentials)$")
SHORTEST = 8
"""Characters of a value from the environment that is looked for: shorter ones occur in words."""


def redacted(text: str) -> str:
    """`text` without user and password in URLs, values of names such as `token=`, keys known by how they begin, and
    secrets of the environment. Names of variables stay: `${REWARD_KEY}`."""
    text = _OF_URL.sub(lambda match: match[0] if _names_variable(match[1]) else f"{HIDDEN}@", text)
    text = _NAMED.sub(lambda match: match[0] if _names_variable(match[2]) else match[1] + HIDDEN, text)
    text = _KNOWN.sub(HIDDEN, text)
    for secret in secrets_of_environment():
        text = text.replace(secret, HIDDEN)
    return text


def _names_variable(text: str) -> bool:
    return VARIABLE.fullmatch(text.strip("\"'")) is not None


def secrets_of_environment() -> list[str]:
    """Values of variables that are called `..._KEY` and the like, and passwords of proxies; the longest first."""
    secrets = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)} | _FILLED_IN
    for name, value in os.environ.items():
        if name.lower().endswith("_proxy") and "@" in value:
            userinfo = value.rpartition("://")[2].rpartition("@")[0]
            secrets |= {userinfo, unquote(userinfo.partition(":")[2])}
    return sorted((secret for secret in secrets if len(secret) >= SHORTEST), key=len, reverse=True)


_FILLED_IN: set[str] = set()


def filled_in(text: str, write: Callable[[str], str] = str) -> str:
    """`text` with the values of the environment variables that it names, as `write` writes them. Raises KeyError with
    the name of one that is not set."""

    def value(match: re.Match[str]) -> str:
        secret = os.environ[match[1]]
        _FILLED_IN.update((secret, write(secret)))
        return write(secret)

    return VARIABLE.sub(value, text)


def redacted_values(values: Any) -> Any:
    """Settings as data, with their texts redacted."""
    if isinstance(values, dict):
        return {key: redacted_values(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [redacted_values(value) for value in values]
    return redacted(values) if isinstance(values, str) else values


def redacted_arguments(arguments: list[str]) -> list[str]:
    """A command line; what follows an option such as `--token` is hidden too."""
    shown, hides = [], False
    for argument in arguments:
        shown.append(HIDDEN if hides else redacted(argument))
        hides = _OPTION.fullmatch(argument) is not None
    return shown


class RedactedLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


STAND_INS = "rlhf_chat.stand_ins"
READER_GONE = (errno.EPIPE, errno.EIO)  # of a pipe, and of a terminal
EXIT_READER_GONE = 141
"""A shell gives this code of a command that SIGPIPE has ended."""
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
    """JSON in which what is not printable is escaped."""
    text = json.dumps(values, indent=2, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda match: f"\\u{ord(match[0]):04x}", text)


def show_json(values: Any) -> None:
    """Print data for people and programs: in whole lines, however narrow the terminal is."""
    stream = unguarded(sys.stdout)
    text = json_text(values) + "\n"
    io.TextIOWrapper.write(stream, text) if isinstance(stream, Screen) else stream.write(text)


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


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
    """A descriptor for what is shown. A failed write loses its text; with `ends` it ends the command, once."""

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
    """The stream itself, for data, of which nothing may be left out."""
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
