"""Values of any file -> what JSON can hold, so that a row is the same whichever file it was read from."""

import base64
import math
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

TEXT = frozenset([str])


def plain(value: Any) -> Any:
    """`value` in text, numbers, truth values, lists and objects; what has no value (null, NaN) is None.

    Keys without a value are left out, also further in: a table has a value for every column of every row, and JSON
    lines only for those that a row has.
    """
    if isinstance(value, dict):
        if TEXT.issuperset(map(type, value.values())):  # as of most messages
            return value
        return {key: new for key, old in value.items() if (new := plain(old)) is not None}
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], tuple) and all(len(item) == 2 for item in value):  # a map of Arrow
            return plain({str(key): item for key, item in value})
        return [plain(item) for item in value]
    return plain_scalar(value)


def plain_scalar(value: Any) -> Any:
    """Dates and times as ISO 8601 writes them, durations in seconds, bytes as the text they hold, or in base64."""
    if value != value:  # NaT, a Decimal that is no number
        return None
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        number = float(value)
        return number if Decimal(repr(number)) == value else str(value)  # all digits, if a float loses some
    if isinstance(value, (bytes, bytearray)):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return plain(value.item()) if hasattr(value, "item") else str(value)
