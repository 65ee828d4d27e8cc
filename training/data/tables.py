"""Tables in text: CSV and TSV, the first line with the columns' names. A cell may hold several lines."""

import csv
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from inference.errors import UserError
from training.data.entries import BadRow, Entry, LeftOut, open_bytes
from training.data.shapes import INDEX_COLUMNS, KNOWN_COLUMNS

SEPARATORS = {".csv": ",", ".tsv": "\t"}
OTHER_SEPARATORS = ",;\t|"


def read_table(file: Path, usual: str) -> Iterator[Entry]:
    """The rows; `usual` is the separator that the file's name stands for. An empty cell is no value."""
    csv.field_size_limit(sys.maxsize)  # a long answer is no error
    with open_bytes(file) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        separator, spaced, line = find_dialect(text, usual)
        table = csv.reader(text, delimiter=separator, skipinitialspace=spaced, strict=True)
        names: list[str] | None = None
        number, skipped = 0, line - 1
        while True:
            try:
                cells = next(table, None)
            except csv.Error as error:
                raise UserError(f"{file}, line {line}: {error}; correct the quotes around the cell.") from None
            if cells is None:
                return
            if any(cells) and names is None:
                names = column_names(file, cells)
            elif any(cells) and names is not None:
                number += 1
                yield f"{file}, row {number} (line {line})", table_row(names, cells)
            line = skipped + table.line_num + 1


def find_dialect(text: IO[str], usual: str) -> tuple[str, bool, int]:
    """What stands between cells, whether a space follows it, and the line with the names. `text` is left there.

    The separator that makes most known names of the first line, or most cells. Excel may name it in a line before.
    """
    header, line = text.readline(), 1
    if named := re.fullmatch(r'"?sep=(.)"?\s*', header):
        header, line = text.readline(), 2
    choices = named[1] if named else usual + OTHER_SEPARATORS.replace(usual, "")

    def fit(separator: str) -> tuple[int, bool, int]:
        cells = [cell.strip(' "\r\n').lower() for cell in header.split(separator)]
        return len(KNOWN_COLUMNS.intersection(cells)), separator == usual and len(cells) > 1, len(cells)

    separator = max(choices, key=fit)  # the first, which is the usual one, of equals
    text.seek(0)
    for _ in range(line - 1):
        text.readline()
    return separator, bool(re.search(f'{re.escape(separator)} +"?[^ ]', header)), line


def column_names(file: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not is_utf8(cells):
        raise UserError(f"{file} is not UTF-8 text in the line with its columns' names; save it as UTF-8.")
    refuse_twice(file, names)
    return names


def refuse_twice(file: Path, names: list[str]) -> None:
    """Raise UserError for two columns of one name, of which a row would keep one without a word."""
    twice = [name for i, name in enumerate(names) if name in names[:i] and name.lower() not in INDEX_COLUMNS]
    if twice:
        raise UserError(f"{file} has two columns named '{twice[0]}': give one of them another name.")


def table_row(names: list[str], cells: list[str]) -> Any:
    if len(cells) != len(names):
        return BadRow(f"the row has {len(cells)} cells and the first line {len(names)}")
    if not is_utf8(cells):
        return BadRow("the line is not UTF-8 text")
    if [cell.strip() for cell in cells] == names:
        return LeftOut("the names of the columns again")
    return {name: cell or None for name, cell in zip(names, cells, strict=True)}


def is_utf8(cells: list[str]) -> bool:
    """Whether there is none of the signs that surrogateescape makes of other bytes."""
    return not any("\udc80" <= sign <= "\udcff" for cell in cells if not cell.isascii() for sign in cell)
