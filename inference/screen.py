"""A terminal of any width: lines break between words, whoever prints them."""

import io
import os
import re
from contextlib import suppress

from rich.cells import cell_len

USUAL_COLUMNS = 100
"""Of what is printed where there is no terminal."""
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
    """A line that begins in `column`, on several ones, and the column behind it."""
    stops = [found.end() for found in re.finditer("^ +|  +", CONTROL.sub("", line))] if column == 0 else []
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
    """Of the terminal, or as COLUMNS says; 100 where there is none."""
    if (said := os.environ.get("COLUMNS", "")).isdecimal() and int(said):
        return int(said)
    with suppress(OSError):
        return os.get_terminal_size(descriptor).columns or USUAL_COLUMNS
    return USUAL_COLUMNS
