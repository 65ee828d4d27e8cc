"""Files -> the values in them, one for each row, with the name of its place. What a value means is not known here."""

from collections.abc import Iterable, Iterator
from lzma import LZMAError
from pathlib import Path
from zipfile import BadZipFile
from zlib import error as ZlibError

from inference.errors import UserError, reason
from training.data.entries import Entry, open_bytes, refuse_pointer
from training.data.find_files import is_saved
from training.data.json_files import read_json
from training.data.sources import ending
from training.data.tables import SEPARATORS, read_table, refuse_twice

ARROW_ROWS = 1000
"""Rows that are turned into Python objects at a time."""


def read_file(file: Path, columns: Iterable[str] = ()) -> Iterator[Entry]:
    """The entries of a file. `columns` are those that a Parquet file is read for (all if none of them is there)."""
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
    """A data set of `Dataset.save_to_disk`."""
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
    """Arrow's stream, or its file with a table of contents at the end."""
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
