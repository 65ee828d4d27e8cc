"""Files -> the values in them, one for each row, with the name of its place. What a value means is not known here."""

import csv
import gzip
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from inference.errors import UserError
from training.data.sources import FILE_ENDINGS

SEPARATORS = {".csv": ",", ".tsv": "\t"}
NOT_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""What `datasets` and the hub write beside the data."""
PARQUET_ROWS = 1000
"""Rows that are turned into Python objects at a time."""


class BadRow(Exception):
    """What is wrong with a row, as the rest of a sentence; also the name under which it is counted."""


class LeftOut(BadRow):
    """Why a row is not used though nothing is wrong with it: it is left out whatever `data.bad_rows` says."""


Entry = tuple[str, Any]
"""The name of a row's place, and its value: a BadRow where it cannot be read."""


def ending(file: Path) -> str:
    """`.jsonl` of `rows.jsonl` and of `rows.jsonl.gz`."""
    return (file.with_suffix("") if file.suffix == ".gz" else file).suffix.lower()


def find_files(path: Path) -> tuple[list[Path], list[str]]:
    """The data files that `path` means, in the order of their names, and what a person should know about the choice.

    Of a directory these are the files right in it, or else those in its folders. Where some belong to a training
    split, the others are not read. Raises UserError with the way out.
    """
    if not path.exists():
        raise UserError(
            f"There is no data source {path}: give a file, a directory, a data set of the hub as owner/name, or "
            f"'chitchat'."
        )
    kinds = ", ".join(FILE_ENDINGS)
    if not path.is_dir():
        if ending(path) not in FILE_ENDINGS:
            raise UserError(f"{path} is none of {kinds} (or one of them with .gz): save the data in one of these.")
        return [path], []
    files = data_files(path)
    files = [file for file in files if file.parent == path] or files
    if not files:
        raise UserError(f"The directory {path} has no data files ({kinds}); put the data there.")
    return training_split(path, files)


def data_files(root: Path) -> list[Path]:
    """All data files in a directory and its folders, in the order of their names, hidden ones aside."""
    return [
        file
        for file in sorted(root.rglob("*"))
        if file.is_file()
        and ending(file) in FILE_ENDINGS
        and file.name not in NOT_DATA
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
    ]


def training_split(root: Path, files: list[Path]) -> tuple[list[Path], list[str]]:
    """The files whose name, or whose folder's, begins with `train`, if there are such; else all."""
    train = [file for file in files if any(part.startswith("train") for part in file.relative_to(root).parts)]
    left = [str(file.relative_to(root)) for file in files if file not in train]
    if not train or not left:
        return files, []
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    return train, [f"not of the training split, so not read: {', '.join(left[:3])}{more}"]


def read_file(file: Path, columns: Iterable[str] | None = None) -> Iterator[Entry]:
    """The entries of a file. `columns` are those that a Parquet file is read for (all if none of them is there)."""
    kind = ending(file)
    try:
        if kind == ".parquet":
            yield from read_parquet(file, columns)
        elif kind in SEPARATORS:
            yield from read_table(file, SEPARATORS[kind])
        elif kind == ".json" and not is_lines(file):
            yield from read_document(file)
        else:
            yield from read_lines(file)
    except (OSError, EOFError) as error:  # gzip's too
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{file} cannot be read ({reason}); check its permissions, or copy it again.") from None


def open_bytes(file: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file)) if file.suffix == ".gz" else open(file, "rb")


def read_lines(file: Path) -> Iterator[Entry]:
    """JSON lines; blank ones are no rows."""
    with open_bytes(file) as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                yield f"{file}, line {number}", parse_line(line)


def parse_line(line: bytes) -> Any:
    """The value of a line of JSON, or a BadRow."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return BadRow("the line is not UTF-8 text")
    except (ValueError, RecursionError):
        return BadRow("the line is not JSON")


def is_lines(file: Path) -> bool:
    """Whether a .json file holds JSON lines: its first line is a whole object, and others follow."""
    with open_bytes(file) as handle:
        lines = (line for line in handle if line.strip())
        first, more = next(lines, b""), next(lines, None)
    return more is not None and isinstance(parse_line(first), dict)


def read_document(file: Path) -> Iterator[Entry]:
    """A .json file with a list of rows, an object with one such list in it, or one row."""
    with open_bytes(file) as handle:
        content = handle.read()
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text; save it as UTF-8.") from None
    except RecursionError:
        raise UserError(f"{file} is nested too deeply to be data; it must be a list of objects.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON (line {error.lineno}: {error.msg}); correct it there.") from None
    if isinstance(value, dict):
        lists = [rows for rows in value.values() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
        value = lists[0] if len(value) == 1 and lists else [value]
    if not isinstance(value, list):
        raise UserError(f"{file} must hold a list of objects, one for each row.")
    for number, row in enumerate(value, start=1):
        yield f"{file}, row {number}", row


def read_table(file: Path, separator: str) -> Iterator[Entry]:
    """CSV or TSV, the first line with the columns' names; a cell may hold several lines, or messages as JSON."""
    csv.field_size_limit(sys.maxsize)  # a long answer is no error
    with open_bytes(file) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        table = csv.reader(text, delimiter=separator, strict=True)
        names: list[str] | None = None
        number, line = 0, 1
        while True:
            try:
                cells = next(table, None)
            except csv.Error as error:
                raise UserError(f"{file}, line {line}: {error}; correct the quotes around the cell.") from None
            if cells is None:
                return
            if cells and names is None:
                names = [cell.strip() for cell in cells]
            elif cells and names is not None:
                number += 1
                yield f"{file}, row {number} (line {line})", table_row(names, cells)
            line = table.line_num + 1


def table_row(names: list[str], cells: list[str]) -> Any:
    if len(cells) != len(names):
        return BadRow(f"the row has {len(cells)} cells and the first line {len(names)}")
    if any(
        "\udc80" <= sign <= "\udcff" for cell in cells for sign in cell
    ):  # what surrogateescape makes of other bytes
        return BadRow("the line is not UTF-8 text")
    return {name: messages_in(cell) for name, cell in zip(names, cells, strict=True)}


def messages_in(cell: str) -> Any:
    """The messages that a cell holds as JSON; any other text stays text."""
    if not cell.lstrip().startswith("[{"):
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    is_messages = all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in value)
    return value if is_messages else cell


def read_parquet(file: Path, columns: Iterable[str] | None) -> Iterator[Entry]:
    import pyarrow
    from pyarrow import parquet

    try:
        source = parquet.ParquetFile(file)
        wanted = [name for name in source.schema_arrow.names if columns is None or name in columns] or None
        number = 0
        for batch in source.iter_batches(PARQUET_ROWS, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{file} is not a whole Parquet file ({reason}); copy it again.") from None
