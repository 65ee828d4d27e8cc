"""Who has said yes to what a run's files make a command execute, send to, fetch, read or follow.

What decides lies outside of the run: a file of the user's, where each line has a run's path and hashes of what it may
do. A run that is made here may do what it was told; one that came from elsewhere, or has been changed, needs a yes.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from inference.errors import UserError, reason
from inference.streams import redacted


@dataclass(frozen=True)
class Use:
    """Something outside of a run's own rows and weights that its files ask for."""

    what: str
    """What is done, for `would ...`."""
    setting: str = ""
    """The one that asks for it."""
    content: str = ""
    """SHA-256 of a file that is executed or obeyed."""
    lies_in_run: bool = False
    """Whether who hands the run on hands the file on too."""

    @property
    def text(self) -> str:
        return f"{self.what} ({self.setting})" if self.setting else self.what

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps([self.text, self.content]).encode()).hexdigest()


def require_yes(run: Path, uses: Iterable[Use], trusts: bool) -> None:
    """Raise UserError unless each use is known of this run, or gets its yes: `trusts` (--trust), or by a terminal."""
    asked = unanswered(run, uses)
    if not asked:
        return
    texts = [" ".join(redacted(use.text).split()) for use in asked]
    foreign = f"{run} was not made here, or has been changed or moved since"
    if not trusts and sys.stdin.isatty() and sys.stderr.isatty():
        lines = "".join(f"  {text}\n" for text in texts)
        print(f"{foreign}. This command would\n{lines}Do you trust that? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise UserError("Nothing was done. (--trust says yes beforehand.)")
    elif not trusts:
        raise UserError(f"{foreign}; this command would {'; '.join(texts)}. If you trust that, say so with --trust.")
    remember(run, asked)


def unanswered(run: Path, uses: Iterable[Use]) -> list[Use]:
    """Those that nobody has said yes to."""
    known = keys_of(run)
    return [use for use in dict.fromkeys(uses) if not {use.key, replace(use, content="").key} & known]


def require_reading(target: Path, trusts: bool) -> None:
    """For what reads a run, or a model, and no more."""
    require_yes(target, of_reading(target), trusts)


def made_here(run: Path, uses: Iterable[Use]) -> None:
    """Keep what was typed for the run. A file outside of the run is its user's to change."""
    remember(run, [use if use.lies_in_run else replace(use, content="") for use in uses])


def remember(run: Path, uses: Iterable[Use]) -> None:
    """Add to the record; where it cannot be written that is said, for commands ask then."""
    known = keys_of(run)
    keys = [key for use in uses if (key := use.key) not in known]
    if not keys:
        return
    try:
        file = record_file()
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8") as record:
            record.write("\n" + json.dumps({"run": str(run.resolve()), "keys": keys}))  # the last may be cut short
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        print(f"What {run} may do cannot be kept ({reason(error)}): commands will ask again.", file=sys.stderr)


def keys_of(run: Path) -> set[str]:
    """What the record has of the run at this place."""
    found: set[str] = set()
    try:
        lines = record_file().read_text(encoding="utf-8").splitlines()
    except (OSError, RuntimeError, ValueError):
        return found
    place = str(run.resolve())
    for line in lines:
        try:
            entry = json.loads(line)
            found.update(entry["keys"] if entry["run"] == place else ())
        except (ValueError, LookupError, TypeError):  # a damaged one says nothing
            continue
    return found


def record_file() -> Path:
    """In XDG_STATE_HOME, else ~/.local/state. A relative path does not count: it might lie in the run."""
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (given if given.is_absolute() else Path("~/.local/state").expanduser()) / "rlhf-chat" / "trusted.jsonl"


def of_reading(run: Path) -> list[Use]:
    """What is there where files of the run lead out of it, or are no files; of what is no run, nothing."""
    if not (run / "config.yaml").exists():
        return []
    home, found = run.resolve(), []
    for folder, folders, files in os.walk(home):
        for path in (Path(folder) / name for name in sorted(folders + files)):
            name = path.relative_to(home)
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                found.append(Use(f"follow {name}, which leads to {path.resolve()}"))
            elif path.exists() and not (path.is_file() or path.is_dir()):
                found.append(Use(f"open {name}, which is no plain file"))
    return found
