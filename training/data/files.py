"""Files -> the values in them, one for each row, with its location. What a value means is not known here."""

import csv
import io
import json
import re
import sys
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from lzma import LZMAError
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile
from zlib import error as ZlibError

from inference.errors import UserError, reason
from training.data.entries import BadRow, CutShort, Entry, LeftOut, open_bytes, refuse_pointer
from training.data.find_files import is_saved
from training.data.messages import looks_like_messages
from training.data.shapes import INDEX_COLUMNS, KNOWN_COLUMNS
from training.data.sources import ending

SPACE = re.compile(r"\s*")


def read_json(file: Path, is_lines: bool) -> Iterator[Entry]:
    """Read the rows of a file; `is_lines`: whether its name says that it has JSON lines."""
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
    """Read JSON lines; blank ones are no rows."""
    with open_bytes(file) as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                value = parse_line(line)
                is_cut = isinstance(value, BadRow) and not line.endswith(b"\n")
                yield f"{file}, line {number}", CutShort(str(value)) if is_cut else value


def parse_line(line: bytes) -> Any:
    try:
        return DECODER.decode(line.removeprefix(BOM_UTF8).decode())
    except UnicodeDecodeError:
        return BadRow("the line is not UTF-8 text")
    except BadRow as error:
        return error
    except (ValueError, RecursionError):
        return BadRow("the line is not JSON")


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object whose keys differ. Raises BadRow where one is there twice, so that no value is lost unseen."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRow(f"'{twice[:30]}' is there twice in one object")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=once)


def read_document(file: Path) -> Iterator[Entry]:
    """Read a file that is one value, or objects one behind the other that take several lines each."""
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
    position = 0
    values: list[Any] = []
    while True:
        position = SPACE.match(text, position).end()  # type: ignore[union-attr]  # it always matches
        if position == len(text):
            return values
        value, position = DECODER.raw_decode(text, position)
        values.append(value)


def rows_of(value: Any, file: Path) -> list[Any]:
    """Return the rows of a document: a list, an object with such a list, columns, rows under names, or one row."""
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
    """Whether a value is a list of rows and not one of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and not looks_like_messages(value)


def is_known(row: dict[str, Any]) -> bool:
    return any(name.strip().lower() in KNOWN_COLUMNS for name in row)


def rows_of_columns(value: dict[str, Any]) -> list[Any]:
    """Read the rows of {"prompt": [...], ...} or, by pandas, {"prompt": {"0": ..., ...}, ...}; else none."""
    if not is_known(value):
        return []
    columns = [list(cells.values()) if isinstance(cells, dict) else cells for cells in value.values()]
    kinds, alike = {type(cells) for cells in value.values()}, all(isinstance(cells, list) for cells in columns)
    if len(kinds) > 1 or not alike or len({len(cells) for cells in columns}) != 1:
        return []
    if any(looks_like_messages(cells) for cells in columns):  # it is one row
        return []
    return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]


SEPARATORS = {".csv": ",", ".tsv": "\t"}
OTHER_SEPARATORS = ",;\t|"


def read_table(file: Path, usual: str) -> Iterator[Entry]:
    """Read the rows; `usual` is the separator that the file's name stands for. An empty cell is no value."""
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
    """Find what stands between cells, whether a space follows, and the line with the names. `text` is left there.

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


ARROW_ROWS = 1000  # turned into Python objects at a time


def read_file(file: Path, columns: Iterable[str] = ()) -> Iterator[Entry]:
    """Read the entries of a file. `columns` are those that a Parquet file is read for (all if it has none of them)."""
    kind = ending(file)
    try:
        refuse_pointer(file)
        if is_saved(file):
            yield from read_saved(file.parent)
        elif kind == ".parquet":
            yield from read_parquet(file, columns)
        elif kind == ".arrow":
            yield from read_arrow(file)
        elif kind in SEPARATORS:
            yield from read_table(file, SEPARATORS[kind])
        else:
            yield from read_json(file, is_lines=kind != ".json")
    except (OSError, EOFError, ZlibError, LZMAError, BadZipFile) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{file} cannot be read ({why}); check its permissions, or copy it again.") from None


def read_parquet(file: Path, columns: Iterable[str]) -> Iterator[Entry]:
    import pyarrow
    from pyarrow import parquet

    try:
        with open_bytes(file) as handle:
            source = parquet.ParquetFile(handle)
            names = source.schema_arrow.names
            refuse_twice(file, names)
            wanted = [name for name in names if name in columns] or None
            yield from numbered(file, source.iter_batches(ARROW_ROWS, columns=wanted))
    except pyarrow.ArrowException as error:
        raise damaged(file, "Parquet", error) from None


def read_saved(folder: Path) -> Iterator[Entry]:
    """Read a data set of `Dataset.save_to_disk`."""
    import pyarrow
    from datasets import load_from_disk

    try:
        for part in folder.glob("*.arrow"):
            refuse_pointer(part)
        yield from numbered(folder, load_from_disk(str(folder)).with_format("arrow").iter(ARROW_ROWS))
    except (OSError, ValueError, LookupError, TypeError, pyarrow.ArrowException) as error:
        raise UserError(
            f"The data set that was saved in {folder} cannot be read ({reason(error)}): copy it again or, if it was "
            f"saved by a newer version of datasets, install that."
        ) from None


def read_arrow(file: Path) -> Iterator[Entry]:
    """Read Arrow's stream, or its file with a table of contents at the end."""
    import pyarrow
    from pyarrow import ipc

    try:
        with open_bytes(file) as handle:
            if handle.read(6) == b"ARROW1":
                source = ipc.open_file(handle)
                names = source.schema.names
                batches = (source.get_batch(i) for i in range(source.num_record_batches))
            else:
                handle.seek(0)
                stream = ipc.open_stream(handle)
                batches, names = iter(stream), stream.schema.names
            refuse_twice(file, names)
            parts = (batch.slice(at, ARROW_ROWS) for batch in batches for at in range(0, batch.num_rows, ARROW_ROWS))
            yield from numbered(file, parts)
    except pyarrow.ArrowException as error:
        raise damaged(file, "Arrow", error) from None


def numbered(file: Path, batches: Iterable) -> Iterator[Entry]:
    rows = (row for batch in batches for row in batch.to_pylist())
    return ((f"{file}, row {number}", row) for number, row in enumerate(rows, start=1))


def damaged(file: Path, kind: str, error: Exception) -> UserError:
    return UserError(f"{file} is not a whole {kind} file ({reason(error)}); copy it again.")
