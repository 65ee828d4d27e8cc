"""The data source of a run -> the rows that its steps read."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from inference.chat_format import ChatFormat
from training.config import EMBEDDED_DATA, DataSettings
from training.data.chitchat import build_chitchat, load_dialogues
from training.data.rows import RowSets, write_rows
from training.data.split import kind_of, split_rows
from training.data.user_files import read_user_files
from training.run_directory import write_directory, write_json

COUNTS_FILE = "counts.json"
SETS_OF_STEPS = {"step 1 (SFT)": "sft", "step 2 (reward)": "pairs", "step 3 (RLHF)": "prompts"}


@dataclass
class DataCounts:
    """How many rows each step got, and what a person should know about them."""

    rows: dict[str, int] = field(default_factory=dict)
    """Rows of each file, by its name without .jsonl."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Rows (of the embedded default: replies) that were left out, by reason."""
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What the terminal shows."""
        lines = [
            f"{step}: {self.rows.get(f'{name}_train', 0):,} rows, {self.rows.get(f'{name}_eval', 0):,} held out"
            for step, name in SETS_OF_STEPS.items()
        ]
        if self.skipped:
            lines.append("left out: " + "; ".join(f"{reason} ({count:,})" for reason, count in self.skipped.items()))
        return lines + self.notes


def prepare_data(
    settings: DataSettings, seed: int, directory: Path, chat_format: ChatFormat, report: Callable[[str], None]
) -> DataCounts:
    """Fill `directory` with a .jsonl file for each set of rows and counts.json; a filled one is left as it is.

    The directory appears whole or not at all. Raises UserError for a source that cannot be used.
    """
    counts_file = directory / COUNTS_FILE
    if counts_file.exists():
        return DataCounts(**json.loads(counts_file.read_text(encoding="utf-8")))
    sets, counts = build_rows(settings, seed, chat_format)

    def write(place: Path) -> None:
        for name, rows in sets.items():
            write_rows(place / f"{name}.jsonl", rows)
        write_json(place / COUNTS_FILE, asdict(counts))

    write_directory(directory, write)
    report(f"Data from {settings.source}")
    for line in counts.lines():
        report(f"  {line}")
    return counts


def build_rows(settings: DataSettings, seed: int, chat_format: ChatFormat) -> tuple[RowSets, DataCounts]:
    skipped: Counter[str]
    notes: list[str] = []
    if settings.source == EMBEDDED_DATA:
        sets, skipped, notes = build_chitchat(load_dialogues(), settings, seed, chat_format)
    else:
        rows, skipped = read_user_files(settings)
        sets = split_rows(rows, settings.split, settings.held_out, seed)
        if any(kind_of(row) == "pair" for row in rows) and sum(share > 0 for share in settings.split) > 1:
            shares = ":".join(f"{share:g}" for share in settings.split)
            notes.append(f"pairs are shared out over steps 1, 2 and 3 as {shares} (data.split)")
    return sets, DataCounts({name: len(rows) for name, rows in sets.items()}, dict(skipped.most_common()), notes)
