"""The data source of a run -> the rows that its steps read."""

import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from inference.chat_format import ChatFormat
from inference.disk import writing
from inference.errors import UserError
from training.config import EMBEDDED_DATA, DataSettings
from training.data.chitchat import build_chitchat, load_dialogues
from training.data.eval_data import read_eval_data
from training.data.next_round import SHARES, go_on
from training.data.rated_texts import load_texts
from training.data.reading import SourceRows, blend, read_sources
from training.data.rows import PANEL_FILE, LabelledRow, PairRow, RowSets, write_rows
from training.data.split import USES, keep_once, kind_of, shuffle, split_rows
from training.run_directory import read_json, write_directory, write_json
from training.steps import METHODS

COUNTS_FILE = "counts.json"
LEFT_OUT_FILE = "left_out.jsonl"
PLACES_NAMED = 3
"""How many places the terminal names for each reason; the rest are in the file."""


@dataclass
class DataCounts:
    """How many rows each step got, and what a person should know about them."""

    rows: dict[str, int] = field(default_factory=dict)
    """Rows of each file, by its name without .jsonl."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Rows (of the embedded default: replies) that were left out, by reason."""
    notes: list[str] = field(default_factory=list)
    places: dict[str, list[str]] = field(default_factory=dict)
    """Where the first rows of each reason are."""
    sources: list[str] = field(default_factory=list)
    """Each source with what was found in it."""

    def lines(self) -> list[str]:
        """What the terminal shows."""
        lines = self.sources + [
            f"step {step.number} ({step.title}): {self.rows.get(f'{step.rows.name}_train', 0):,} rows, "
            f"{self.rows.get(f'{step.rows.name}_eval', 0):,} held out"
            for step in METHODS["ppo"]
        ]
        if self.skipped:
            lines.append("left out: " + "; ".join(self.reason(name, count) for name, count in self.skipped.items()))
        return lines + self.notes

    def reason(self, name: str, count: int) -> str:
        places = self.places.get(name, [])
        more = ", ..." if places and count > len(places) else ""
        return f"{name} ({count:,}{': ' if places else ''}{', '.join(places)}{more})"


def prepare_data(
    settings: DataSettings, seed: int, directory: Path, chat_format: ChatFormat, report: Callable[[str], None]
) -> DataCounts:
    """Fill `directory` with a .jsonl file for each set of rows and counts.json; a filled one is left as it is.

    The directory appears whole or not at all. Raises UserError for a source that cannot be used.
    """
    counts_file = directory / COUNTS_FILE
    if counts_file.exists():
        return DataCounts(**read_counts(directory))
    eval_data = read_eval_data(settings, report, chat_format)
    sets, counts, left_out = build_rows(settings, seed, chat_format, report, eval_data.serves)
    if settings.parent:
        counts.notes.append(go_on(sets, Path(settings.parent), seed))
    if eval_data.found:
        counts.notes.append(eval_data.hold_out(sets, seed))
        left_out += [(place, reason) for each in eval_data.found for place, reason, _ in each.left_out]
    counts.rows = count_rows(sets)
    require_both_labels(sets.pairs_train)
    require_difference(sets.pairs_train, settings, chat_format)

    def write(place: Path) -> None:
        for name, rows in sets.items():
            write_rows(place / f"{name}.jsonl", rows)
        if sets.panel:
            write_rows(place / PANEL_FILE, sets.panel)
        if left_out:
            lines = [json.dumps({"place": place, "reason": reason}, ensure_ascii=False) for place, reason in left_out]
            (place / LEFT_OUT_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_json(place / COUNTS_FILE, asdict(counts))

    with writing("the prepared data", directory.parent):
        write_directory(directory, write)
    report(f"Data from {', '.join(settings.sources)}")
    for line in counts.lines():
        report(f"  {line}")
    return counts


def read_counts(directory: Path) -> dict[str, Any]:
    """The values of DataCounts that a filled directory holds. Raises UserError where they are damaged."""
    return read_json(directory / COUNTS_FILE, f"delete {directory}, which the next step makes anew")


def require_difference(rows: Sequence[PairRow | LabelledRow], settings: DataSettings, chat_format: ChatFormat) -> None:
    """Raise UserError where every chosen answer is the rejected one, as far as a model would read them."""
    limit = settings.max_response_tokens
    pairs = [cast(PairRow, row) for row in rows if "chosen" in row]
    if len(pairs) == len(rows) > 0 and all(
        chat_format.response_ids(row["chosen"], limit) == chat_format.response_ids(row["rejected"], limit)
        for row in pairs
    ):  # ends at the first that differs
        raise UserError(
            f"In all {len(pairs)} pairs chosen and rejected are the same in their first {limit} tokens, so there is "
            f"nothing to prefer: raise data.max_response_tokens, or choose other data."
        )


def require_both_labels(rows: Sequence[PairRow | LabelledRow]) -> None:
    """Raise UserError where all answers with a label are good, or all bad, and no pair is beside them."""
    kinds = set(map(kind_of, rows))
    if kinds in ({"good"}, {"bad"}):
        (label,) = kinds
        raise UserError(
            f"All {len(rows)} answers that DPO would learn from are labelled as {label}, so there is nothing to tell "
            f"apart: give some with the other label too, or pairs."
        )


def build_rows(
    settings: DataSettings,
    seed: int,
    chat_format: ChatFormat,
    report: Callable[[str], None],
    evaluated: Collection[str] = (),
) -> tuple[RowSets, DataCounts, list[tuple[str, str]]]:
    """The rows of each step, their counts, and place and reason of what was left out. What is `evaluated` by other data
    holds nothing out of a user's own."""
    if settings.source == EMBEDDED_DATA:
        sets, skipped, notes = build_chitchat(load_dialogues(), load_texts(report), settings, seed, chat_format)
        return sets, DataCounts(count_rows(sets), dict(skipped.most_common()), notes), []
    found = read_sources(settings, report, chat_format)
    sets, notes = split_and_blend(found, settings, seed, evaluated)
    left_out = [(place, reason) for each in found for place, reason, _ in each.left_out]
    reasons = Counter(reason for _, reason in left_out)
    places: dict[str, list[str]] = {reason: [] for reason in reasons}
    for place, reason in left_out:
        if len(places[reason]) < PLACES_NAMED:
            places[reason].append(place)
    sources = [each.describe() for each in found]
    return sets, DataCounts(count_rows(sets), dict(reasons.most_common()), notes, places, sources), left_out


def split_and_blend(
    found: list[SourceRows], settings: DataSettings, seed: int, evaluated: Collection[str] = ()
) -> tuple[RowSets, list[str]]:
    """All sources together are shared out over steps and evaluation, each row once; then their weights count.

    Also returns what a person should know about it. What several sources have is the one's with the largest weight.
    """
    rows = [row for each in sorted(found, key=lambda each: -each.source.weight) for row in each.rows]
    if len(found) > 1:
        for each in found:
            for row in each.rows:
                row["source"] = each.source.label
    elif found[0].source.weight != 1:
        raise UserError(f"{found[0].source} is the only source, so its weight says nothing: leave it out.")
    shares = SHARES if settings.parent else settings.split
    sets = split_rows(rows, shares, settings.held_out, seed, all_serve_all=bool(settings.parent), evaluated=evaluated)
    repeats = keep_once(sets)
    shuffle(sets, seed)
    notes = [f"each prompt or pair is in a set once: {repeats:,} repeats are left out"] if repeats else []
    if sets.steps_share:
        notes.append("too few questions to give each step some of its own: every step trains on all of them")
    elif (
        not settings.parent
        and any("pairs" in USES[kind_of(row)] for row in rows)
        and sum(share > 0 for share in settings.split) > 1
    ):
        shared = ":".join(f"{share:g}" for share in settings.split)
        what = "pairs" if any(kind_of(row) == "pair" for row in rows) else "answers with a label"
        notes.append(f"{what} are shared out over steps 1, 2 and 3 as {shared} (data.split)")
    return blend(sets, {each.source.label: each.source.weight for each in found}, seed), notes


def count_rows(sets: RowSets) -> dict[str, int]:
    return {name: len(rows) for name, rows in sets.items()}
