"""What a data source is called: NAME, NAME@REVISION or NAME@COPY, each with =WEIGHT behind it or not.

rows.jsonl                    a file or directory
Dahoas/rm-static@64fd53c      a data set of the hub, at a revision
stanfordnlp/SHP@copies/SHP    a data set that we know, from a copy of its files
reasoning:chain_sum           a task of reasoning-gym (training/data/reasoning.py)
rows.jsonl=0.5                half of its rows; =2 is every row twice
"""

import re
from dataclasses import dataclass
from pathlib import Path

from inference.errors import UserError

WEIGHT = re.compile(r"(?P<rest>.+)=(?P<weight>[0-9]*\.?[0-9]+)")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FILE_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
PACKINGS = (".gz", ".bz2", ".xz", ".zip")  # that may stand behind them
TASK_PREFIX = "reasoning:"


def ending(file: Path) -> str:
    """Return `.jsonl` for `rows.jsonl` and for `rows.jsonl.gz`."""
    return (file.with_suffix("") if file.suffix.lower() in PACKINGS else file).suffix.lower()


@dataclass(frozen=True)
class Source:
    name: str  # a path, a hub id, or the short name of a data set that we know
    at: str = ""  # behind the @: a revision of the hub, or the path of a copy
    weight: float = 1.0  # how often each of its rows is trained on

    @property
    def is_task(self) -> bool:
        """Whether reasoning-gym makes its rows."""
        return self.name.startswith(TASK_PREFIX)

    @property
    def path(self) -> Path:
        return Path(self.name).expanduser()

    @property
    def copy(self) -> Path | None:
        """The files of a named data set lie here, if not on the hub."""
        is_path = exists(self.at) or self.at.startswith(("/", ".", "~"))
        return Path(self.at).expanduser() if self.at and is_path else None

    @property
    def is_hub_id(self) -> bool:
        return bool(HUB_ID.fullmatch(self.name)) and not self.path.exists() and ending(self.path) not in FILE_ENDINGS

    @property
    def label(self) -> str:
        """Its rows are marked with this; the weight is not in it."""
        return self.name + (f"@{self.at}" if self.at else "")

    def __str__(self) -> str:
        return self.label + (f"={self.weight:g}" if self.weight != 1 else "")


def parse_source(text: str) -> Source:
    """Read a source. A path that exists is taken as it is, whatever signs are in it. Raises UserError."""
    if exists(text):
        return Source(text)
    name, _, at = text.rpartition("@")
    if name and exists(at) and not text.startswith(TASK_PREFIX):
        return Source(name, at)
    weight = 1.0
    if match := WEIGHT.fullmatch(text):
        text, weight = match["rest"], float(match["weight"])
        if weight == 0:
            raise UserError(f"The weight of {text} is 0: leave the source out, or give it a weight above 0.")
    whole = exists(text) or text.startswith(TASK_PREFIX)
    name, _, at = ("", "", "") if whole else text.rpartition("@")
    return Source(name, at, weight) if name and at else Source(text, "", weight)


def exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError):  # a name too long for a file; no home directory
        return False


def absolute(text: str) -> str:
    """Write the source with absolute paths, so that it is the same in other working directories; hub ids stay."""
    source = parse_source(text)
    name = str(source.path.resolve()) if exists(source.name) else source.name
    at = str(Path(source.at).expanduser().resolve()) if source.at and exists(source.at) else source.at
    return str(Source(name, at, source.weight))
