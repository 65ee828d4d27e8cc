"""Formulas by name: a table has the entries that a setting may name, and takes others from a file of the user's."""

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

OWN = re.compile(r"(?P<file>.+\.py):(?P<name>[^\W\d]\w*)(?P<facts>\(.*\))?")


@dataclass(frozen=True)
class Entry:
    """A formula, and what has to be known of it before it is asked: its facts, which the classes of entries add."""

    formula: Callable[..., Any]

    def complaint(self, result: Any, *given: Any) -> str:
        """Say what is wrong with the `result` of the formula at `given`; '' where nothing is."""
        raise NotImplementedError

    def example(self, settings: Any) -> tuple[Any, ...]:
        """Make what a formula of a user's own is tried on before anything trains; `settings` are those of its step."""
        raise NotImplementedError

    @property
    def facts(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "formula"}


E = TypeVar("E", bound=Entry)


class Table(Generic[E]):
    """The entries that `setting` may name. Settings store one of a user's own as `FILE.py:NAME(FACTS)`, so that whoever
    reads them knows the facts and runs no code."""

    def __init__(self, setting: str, kind: type[E], entries: Mapping[str, E]):
        self.setting, self.kind, self.entries = setting, kind, entries

    def stored(self, given: str) -> str:
        """Write `given` as settings store it. Raises ValueError where there is no such entry."""
        if given in self.entries:
            return given
        if (own := OWN.fullmatch(given)) is None:
            names = ", ".join(self.entries)
            raise ValueError(
                f"must be one of {names}, or path/to/file.py:name of an entry of your own (docs/estimators.md), not "
                f"{given!r}"
            )
        file = Path(own["file"]).expanduser().absolute()
        call = facts_of(own) if own["facts"] else self._call_in(file, own["name"])
        try:
            facts = self._checked(literals(call)).facts
        except ValueError as error:
            raise ValueError(f"{file}:{own['name']} {error}") from None
        return f"{file}:{own['name']}({', '.join(f'{name}={value!r}' for name, value in facts.items())})"

    def entry(self, value: str) -> E:
        """Return a setting's entry; one of a user's own without its formula (training.formulas.own loads it)."""
        own = OWN.fullmatch(value)
        return self._checked(literals(facts_of(own))) if own else self.entries[value]

    def own(self, value: str) -> tuple[Path, str] | None:
        """Return file and name of an entry that is not in the table; None for one that is."""
        own = OWN.fullmatch(value)
        return (Path(own["file"]), own["name"]) if own else None

    def _checked(self, facts: dict[str, Any]) -> E:
        """Make an entry of these facts, without its formula. Raises ValueError for facts that it does not have."""
        types = {field.name: type(field.default) for field in fields(self.kind) if field.name != "formula"}
        for name, value in facts.items():
            if type(value) is not types.get(name):
                known = ", ".join(f"{name} ({kind.__name__})" for name, kind in types.items())
                raise ValueError(f"says {name}={value!r}; what it may say is {known}")
        return self.kind(formula=not_loaded, **facts)

    def _call_in(self, file: Path, name: str) -> ast.Call:
        """Find what `name` is set to in `file`, which is read and not run. Raises ValueError where that is no entry."""
        kind = self.kind.__name__
        try:
            tree = ast.parse(file.read_bytes())
        except OSError as error:
            raise ValueError(f"{file} cannot be read ({error.strerror}); give path/to/file.py:name") from None
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{file} is no Python that can be read ({error})") from None
        for line in tree.body:
            named = [ast.unparse(target) for target in getattr(line, "targets", [getattr(line, "target", line)])]
            value = getattr(line, "value", None)
            if name in named and isinstance(value, ast.Call) and ast.unparse(value.func).endswith(kind):
                return value
        raise ValueError(f"{file} must have a line `{name} = {kind}(formula, ...)` (docs/estimators.md)")


def facts_of(own: re.Match[str]) -> ast.Call:
    """Read the facts in a setting. Raises ValueError where they cannot be read."""
    try:
        return cast(ast.Call, ast.parse(f"entry{own['facts']}", mode="eval").body)
    except SyntaxError:
        raise ValueError(f"has {own['facts']}, which cannot be read; leave it out") from None


def literals(call: ast.Call) -> dict[str, Any]:
    """Read the keyword arguments of a call. Raises ValueError where one has no name, or has to be computed."""
    if len(call.args) > 1 or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError("must name its facts one by one, as in `samples=2`")
    try:
        return {str(key.arg): ast.literal_eval(key.value) for key in call.keywords if key.arg != "formula"}
    except ValueError:
        raise ValueError("must say True, False, numbers and texts as they are, not compute them") from None


def not_loaded(*_: Any) -> Any:
    raise AssertionError("training.formulas.own loads it")
