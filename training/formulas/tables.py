"""All tables of formulas, and which entries of a run are of its user's own."""

from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

from training.formulas.estimators import ESTIMATORS, SHAPINGS
from training.formulas.losses import DPO_LOSSES
from training.formulas.table import Table

TABLES: tuple[Table, ...] = (ESTIMATORS, SHAPINGS, DPO_LOSSES)


def own_files(config: Any) -> Iterator[tuple[str, Path]]:
    """Yield setting and file of each entry of a RunConfig that is in no table."""
    for table in TABLES:
        if own := table.own(attrgetter(table.setting)(config)):
            yield table.setting, own[0]
