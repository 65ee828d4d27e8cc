"""Files -> the values in them, one for each row, with the name of its place. What a value means is not known here."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from inference.errors import UserError
from training.data.entries import Entry, open_bytes, refuse_pointer
from training.data.find_files import ending
from training.data.json_files import read_json
from training.data.tables import SEPARATORS, read_table, refuse_twice

ARROW_ROWS = 1000
"""Rows that are turned into Python objects at a time."""


def read_file(file: Path, columns: Iterable[str] = ()) -> Iterator[Entry]:
    """The entries of a file. `columns` are those that a Parquet file is read for (all if none of them is there)."""
    kind = ending(file)
    try:
        refuse_pointer(file)
        if kind == ".parquet":
            yield from read_parquet(file, columns)
        elif kind == ".arrow":
            yield from read_arrow(file)
        elif kind in SEPARATORS:
            yield from read_table(file, SEPARATORS[kind])
        else:
            yield from read_json(file, is_lines=kind != ".json")
    except (OSError, EOFError) as error:  # gzip's too
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{file} cannot be read ({reason}); check its permissions, or copy it again.") from None


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


def read_arrow(file: Path) -> Iterator[Entry]:
    """A file of `Dataset.save_to_disk`: Arrow's stream, or its file with a table of contents at the end."""
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
    reason = str(error).splitlines()[0].rstrip(".")
    return UserError(f"{file} is not a whole {kind} file ({reason}); copy it again.")
