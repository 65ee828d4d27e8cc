"""Entries of a user's own, loaded: their formulas run in this process, as reward functions do."""

from dataclasses import fields, is_dataclass, replace
from functools import cache
from operator import attrgetter
from typing import Any, TypeVar

from torch import Tensor

from training.config import RunConfig
from training.formulas.table import Entry, Table
from training.formulas.tables import TABLES
from training.reward_sources import RewardFailed, sentences
from training.user_code import UserFile

E = TypeVar("E", bound=Entry)


@cache
def loaded(table: Table[E], value: str) -> E:
    """Load the entry of a setting with its formula. Raises RewardFailed where a user's own is unavailable; what its
    formula raises, and a result of another shape, become that too."""
    entry, own = table.entry(value), table.own(value)
    if own is None:
        return entry
    (path, name), kind = own, table.kind.__name__
    setting = f"{table.setting}={path}:{name}"
    if not path.is_file():
        raise RewardFailed(f"{setting}: there is no file {path}; put it there again.")
    file = UserFile(path)
    with sentences(f"{setting}: the file cannot be loaded"):
        theirs = getattr(file.load(), name, None)
    if not isinstance(theirs, table.kind):
        raise RewardFailed(f"{setting}: {name} is no {kind}; write `{name} = {kind}(formula, ...)`.")
    if theirs.facts != entry.facts:
        raise RewardFailed(
            f"{setting}: the run was made with {entry.facts}, and the file now says {theirs.facts}; put that back, or "
            f"make a new run."
        )

    def formula(*given: Any) -> Any:
        with sentences(f"{setting} failed"), file.running():
            result = theirs.formula(*map(copied, given))
        if complaint := theirs.complaint(result, *given):
            raise RewardFailed(f"{setting} {complaint}; correct it and give the command again.")
        return result

    return replace(theirs, formula=formula)


def copied(given: Any) -> Any:
    """Copy what the formula may change; what is made of a copied tensor is differentiated through it."""
    if is_dataclass(given) and not isinstance(given, type):
        return replace(given, **{field.name: copied(getattr(given, field.name)) for field in fields(given)})
    if isinstance(given, Tensor):
        return given.clone()
    return list(given) if isinstance(given, list) else given


def try_own(config: RunConfig) -> None:
    """Ask the formulas of the user's own once before anything trains, about made-up numbers. Raises RewardFailed."""
    loaded.cache_clear()  # the files may have been corrected since
    for table in TABLES:
        value = attrgetter(table.setting)(config)
        if table.own(value):
            entry = loaded(table, value)
            entry.formula(*entry.example(attrgetter(table.setting.partition(".")[0])(config)))
