"""JSON lines, and JSON documents of several shapes. What the file holds counts, not which of the two names it has."""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inference.errors import UserError
from training.data.entries import BadRow, CutShort, Entry, open_bytes
from training.data.messages import looks_like_messages
from training.data.shapes import KNOWN_COLUMNS

SPACE = re.compile(r"\s*")


def read_json(file: Path, is_lines: bool) -> Iterator[Entry]:
    """The rows of a file; `is_lines`: whether its name says that it has JSON lines."""
    with open_bytes(file) as handle:
        lines = (line for line in handle if line.strip())
        first, more = next(lines, b""), next(lines, None)
    value = parse_line(first)
    if (is_lines or more is not None) and not isinstance(value, BadRow) and not is_list_of_rows(value):
        return read_lines(file)
    try:
        return read_document(file)
    except UserError:
        if is_lines:
            return read_lines(file)  # of which each is judged
        raise


def read_lines(file: Path) -> Iterator[Entry]:
    """JSON lines; blank ones are no rows."""
    with open_bytes(file) as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                value = parse_line(line)
                is_cut = isinstance(value, BadRow) and not line.endswith(b"\n")
                yield f"{file}, line {number}", CutShort(str(value)) if is_cut else value


def parse_line(line: bytes) -> Any:
    """The value of a line of JSON, or a BadRow."""
    try:
        return DECODER.decode(line.removeprefix(BOM_UTF8).decode())
    except UnicodeDecodeError:
        return BadRow("the line is not UTF-8 text")
    except BadRow as error:
        return error
    except (ValueError, RecursionError):
        return BadRow("the line is not JSON")


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ. Raises BadRow where one is there twice: a value would be lost without a word."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRow(f"'{twice[:30]}' is there twice in one object")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=once)


def read_document(file: Path) -> Iterator[Entry]:
    """A file that is one value, or objects one behind the other that take several lines each."""
    with open_bytes(file) as handle:
        content = handle.read()
    try:
        values = all_values(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text; save it as UTF-8.") from None
    except BadRow as error:
        raise UserError(f"{file}: {error}; leave one of the two out.") from None
    except RecursionError:
        raise UserError(f"{file} is nested too deeply to be data; it must be a list of objects.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON (line {error.lineno}: {error.msg}); correct it there.") from None
    rows = rows_of(values[0], file) if len(values) == 1 else values
    return ((f"{file}, row {number}", row) for number, row in enumerate(rows, start=1))


def all_values(text: str) -> list[Any]:
    """The JSON values of a text, one behind the other."""
    place = 0
    values: list[Any] = []
    while True:
        place = SPACE.match(text, place).end()  # type: ignore[union-attr]  # it always matches
        if place == len(text):
            return values
        value, place = DECODER.raw_decode(text, place)
        values.append(value)


def rows_of(value: Any, file: Path) -> list[Any]:
    """The rows of a document: a list, an object with such a list in it, columns, rows under names, or one row."""
    if is_list_of_rows(value):
        return list(value)
    if not isinstance(value, dict):
        if isinstance(value, list):
            return [value] if looks_like_messages(value) else value
        raise UserError(f"{file} must hold a list of objects, one for each row.")
    lists = [name for name, rows in value.items() if is_list_of_rows(rows) and (len(value) == 1 or not is_known(value))]
    if len(lists) > 1:
        raise UserError(f"{file} has several lists of rows ({', '.join(lists[:5])}): save one in a file of its own.")
    if lists:
        return list(value[lists[0]])
    if columns := rows_of_columns(value):
        return columns
    objects = [row for row in value.values() if isinstance(row, dict)]
    if value and len(objects) == len(value) and not is_known(value):
        return objects
    return [value]


def is_list_of_rows(value: Any) -> bool:
    """Not one of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and not looks_like_messages(value)


def is_known(row: dict[str, Any]) -> bool:
    return any(name.strip().lower() in KNOWN_COLUMNS for name in row)


def rows_of_columns(value: dict[str, Any]) -> list[Any]:
    """The rows of {"prompt": [...], ...} or, as pandas writes it, {"prompt": {"0": ..., ...}, ...}; else none."""
    if not is_known(value):
        return []
    columns = [list(cells.values()) if isinstance(cells, dict) else cells for cells in value.values()]
    kinds, alike = {type(cells) for cells in value.values()}, all(isinstance(cells, list) for cells in columns)
    if len(kinds) > 1 or not alike or len({len(cells) for cells in columns}) != 1:
        return []
    if any(looks_like_messages(cells) for cells in columns):  # it is one row
        return []
    return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
