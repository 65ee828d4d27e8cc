from typing import Any

from training.data.entries import LeftOut
from training.data.formats import read_row
from training.data.reading import BAD_ALONE
from training.data.rows import Row


def parse_row(value: Any) -> list[Row]:
    """The rows that one value gives by itself. Raises BadRow."""
    read = read_row(value)
    if read.rating is not None and read.rating.is_bad:
        raise LeftOut(BAD_ALONE)
    return read.rows
