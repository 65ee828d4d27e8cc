"""The data source of a run -> the rows that its steps read."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from inference.chat_format import ChatFormat
from inference.disk import write_text, writing
from inference.errors import UserError
from training.config import RunConfig
from training.data.chitchat import build_chitchat, load_dialogues
from training.data.rated_texts import load_texts
from training.data.reading import SourceRows, blend, read_sources
from training.data.rows import (
    DEMONSTRATIONS_FILE,
    PANEL_FILE,
    LabelledRow,
    PairRow,
    PanelRow,
    Row,
    RowSets,
    SFTRow,
    read_rows,
    write_rows,
)
from training.data.split import (
    USES,
    add_rows,
    choose_groups,
    identity,
    keep_once,
    kind_of,
    once,
    opening,
    shuffle,
    split_rows,
)
from training.data_settings import EMBEDDED_DATA, DataSettings
from training.run_directory import read_json, write_directory, write_json
from training.steps import METHODS


@dataclass
class EvalData:
    sources: list[SourceRows] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return [row for source in self.sources for row in source.rows]

    @property
    def uses(self) -> dict[str, set[str]]:
        """Kinds of its rows -> what they evaluate: sft, pairs, prompts. Demonstrations alone give prompts as well."""
        kinds = set(map(kind_of, self.rows))
        return {kind: {*USES[kind], *["prompts"] * (kinds == {"sft"})} for kind in kinds}

    @property
    def serves(self) -> set[str]:
        return {use for uses in self.uses.values() for use in uses}

    def sets(self, seed: int) -> RowSets:
        sets, uses_of = RowSets(), self.uses
        for row in self.rows:
            for use in uses_of[kind_of(row)]:
                add_rows(sets, use, [row], evaluation=True)
        keep_once(sets)
        shuffle(sets, seed)
        return sets

    def hold_out(self, sets: RowSets, seed: int) -> str:
        """Evaluate `sets` on these rows where they serve, and take their questions out of training; returns a sentence
        about it. Raises UserError where nothing is left to train on."""
        group_of = choose_groups([*self.rows, *(row for _, rows in sets.items() for row in rows)])
        known, ours = set(map(group_of, self.rows)), self.sets(seed)
        before = after = 0
        for name, rows in sets.items():
            use, _, part = name.partition("_")
            if part == "train":
                remaining = [row for row in rows if group_of(row) not in known]
                before, after = before + len(rows), after + len(remaining)
                setattr(sets, name, remaining)
            elif use in self.serves:
                setattr(sets, name, getattr(ours, name))
        if before and not after:
            raise UserError(
                "Every question of the data is in the evaluation data too, so nothing is left to train on: give other "
                "evaluation data (--eval-data), or none."
            )
        left_out = f"; {before - after:,} training rows with a question of it are left out" * (after < before)
        return f"{' and '.join(source.describe() for source in self.sources)}: for evaluation alone{left_out}"


def read_eval_data(
    settings: DataSettings, report: Callable[[str], None], chat_format: ChatFormat | None = None
) -> EvalData:
    """Read what `settings.eval_source` names; empty where it names nothing. Raises UserError as `read_sources` does."""
    if not settings.eval_sources:
        return EvalData()
    apart = settings.model_copy(update={"source": settings.eval_sources, "limit": 0})
    sources = read_sources(apart, report, chat_format)
    if weighted := [read.source for read in sources if read.source.weight != 1]:
        raise UserError(f"{weighted[0]}: each row of evaluation data counts once, so leave the weight out.")
    return EvalData(sources)


SHARES = (0, 1, 1)
"""`data.split` of a run that goes on from another, whose step 1 is done: pairs serve steps 2 and 3."""


def go_on(sets: RowSets, parent: Path, seed: int) -> str:
    """Lay the new rows, `sets`, over those of the run directory `parent`; returns a sentence about it.

    The held-out prompts (if it has some), all demonstrations and the texts that people rated are the parent's, in its
    order, so that rounds are compared on the same ones. No question is trained on that was held out there. Raises
    UserError where the parent's rows are not there, and where no pair is left to train on.
    """
    theirs = RowSets()
    for name, _ in sets.items():
        setattr(theirs, name, read_rows(rows_file(parent, name)))
    new, old = ([row for _, rows in row_sets.items() for row in rows] for row_sets in (sets, theirs))
    group_of, question_of = choose_groups(new), choose_groups(new + old)  # the new ones may all begin alike
    trained, held_out = (
        {question_of(row) for name, rows in theirs.items() if name.endswith(part) for row in rows}
        for part in ("_train", "_eval")
    )
    held_out_there = held_out - trained  # the texts of the embedded default are held out, and not what they answer
    held_out_here = [] if theirs.prompts_eval else cast(list[Any], sets.prompts_eval)
    aside = set(map(group_of, [*sets.pairs_eval, *held_out_here]))

    def left(rows: list[Any]) -> list[Any]:
        return [row for row in rows if group_of(row) not in aside and question_of(row) not in held_out_there]

    moved = once([row for row in sets.pairs_train if question_of(row) in held_out_there], evaluation=True)
    sets.pairs_eval += moved
    sets.pairs_train = left(sets.pairs_train)
    if moved and not sets.pairs_train:
        raise UserError(
            f"No pair is left to train on, as {parent} held out the questions of {len(moved):,}: give pairs on other "
            f"questions, such as those that an empty message takes at rlhf-chat prefer."
        )
    known = {identity(row, evaluation=True) for row in sets.prompts_train}
    sets.prompts_train += [row for row in theirs.prompts_train if identity(row, evaluation=True) not in known]
    sets.prompts_train = left(sets.prompts_train)
    shuffle(sets, seed)
    sets.prompts_eval = held_out_here or theirs.prompts_eval
    sets.sft_train, sets.sft_eval = theirs.sft_train, theirs.sft_eval
    if not sets.panel and (panel := parent / "data" / PANEL_FILE).exists():
        sets.panel = cast(list[PanelRow], read_rows(panel))
    also = f"; pairs whose question was held out there, and so is here: {len(moved):,}" * bool(moved)
    prompts = "" if held_out_here else "the held-out prompts, "
    return f"{prompts}the demonstrations and most prompts are those of {parent}{also}"


def rows_file(parent: Path, name: str) -> Path:
    """Return the file of a set of rows. Raises UserError where it does not exist."""
    file = parent / "data" / f"{name}.jsonl"
    if not file.exists():
        raise UserError(
            f"{file} is missing, and what was held out there must stay held out: bring the rows of {parent} back, or "
            f"begin a run of its own with rlhf-chat rlhf RUN --sft-model MODEL, with a new RUN."
        )
    return file


COUNTS_FILE = "counts.json"
LEFT_OUT_FILE = "left_out.jsonl"
LOCATIONS_NAMED = 3  # the terminal names so many rows for each reason; the rest are in the file


@dataclass
class DataCounts:
    """How many rows each step got, and what a person should know about them."""

    rows: dict[str, int] = field(default_factory=dict)  # of each file, by its name without .jsonl
    skipped: dict[str, int] = field(default_factory=dict)  # rows (of the embedded default: replies) that were left out
    notes: list[str] = field(default_factory=list)
    places: dict[str, list[str]] = field(default_factory=dict)  # locations of the first rows of each reason
    sources: list[str] = field(default_factory=list)  # each with what it holds

    def lines(self) -> list[str]:
        lines = self.sources + [
            f"step {step.number} ({step.title}): {self.rows.get(f'{step.rows.name}_train', 0):,} rows, "
            f"{self.rows.get(f'{step.rows.name}_eval', 0):,} held out"
            for step in METHODS["ppo"]
        ]
        if self.skipped:
            lines.append("left out: " + "; ".join(self.reason(name, count) for name, count in self.skipped.items()))
        return lines + self.notes

    def reason(self, name: str, count: int) -> str:
        locations = self.places.get(name, [])
        more = ", ..." if locations and count > len(locations) else ""
        return f"{name} ({count:,}{': ' if locations else ''}{', '.join(locations)}{more})"


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
    if eval_data.sources:
        counts.notes.append(eval_data.hold_out(sets, seed))
        left_out += [(location, reason) for read in eval_data.sources for location, reason, _ in read.left_out]
    counts.rows = count_rows(sets)
    require_both_labels(sets.pairs_train)
    require_difference(sets.pairs_train, settings, chat_format)

    def write(target: Path) -> None:
        for name, rows in sets.items():
            write_rows(target / f"{name}.jsonl", rows)
        if sets.panel:
            write_rows(target / PANEL_FILE, sets.panel)
        if left_out:
            lines = [
                json.dumps({"place": location, "reason": reason}, ensure_ascii=False) for location, reason in left_out
            ]
            (target / LEFT_OUT_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_json(target / COUNTS_FILE, asdict(counts))

    with writing("the prepared data", directory.parent):
        write_directory(directory, write)
    report(f"Data from {', '.join(settings.sources)}")
    for line in counts.lines():
        report(f"  {line}")
    return counts


def read_counts(directory: Path) -> dict[str, Any]:
    """Read the values of DataCounts that a filled directory holds. Raises UserError where they are damaged."""
    return read_json(directory / COUNTS_FILE, f"delete {directory}, which the next step makes again")


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
    """Make the rows of each step, their counts, and location and reason of what was left out. What is `evaluated` by
    other data holds nothing out of a user's own."""
    if settings.source == EMBEDDED_DATA:
        sets, skipped, notes = build_chitchat(load_dialogues(), load_texts(report), settings, seed, chat_format)
        return sets, DataCounts(count_rows(sets), dict(skipped.most_common()), notes), []
    sources = read_sources(settings, report, chat_format)
    sets, notes = split_and_blend(sources, settings, seed, evaluated)
    left_out = [(location, reason) for read in sources for location, reason, _ in read.left_out]
    locations: dict[str, list[str]] = defaultdict(list)
    for location, reason in left_out:
        locations[reason].append(location)
    counted = Counter(reason for _, reason in left_out)
    first_locations = {reason: at[:LOCATIONS_NAMED] for reason, at in locations.items()}
    described = [read.describe() for read in sources]
    counts = DataCounts(count_rows(sets), dict(counted.most_common()), notes, first_locations, described)
    return sets, counts, left_out


def split_and_blend(
    sources: list[SourceRows], settings: DataSettings, seed: int, evaluated: Collection[str] = ()
) -> tuple[RowSets, list[str]]:
    """Share all sources together out over steps and evaluation, each row once; then their weights count.

    Also returns what a person should know about it. A row that several sources have goes to the one with the largest
    weight.
    """
    rows = [row for read in sorted(sources, key=lambda read: -read.source.weight) for row in read.rows]
    if len(sources) > 1:
        for read in sources:
            for row in read.rows:
                row["source"] = read.source.label
    elif sources[0].source.weight != 1:
        raise UserError(f"{sources[0].source} is the only source, so its weight says nothing: leave it out.")
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
    return blend(sets, {read.source.label: read.source.weight for read in sources}, seed), notes


def count_rows(sets: RowSets) -> dict[str, int]:
    return {name: len(rows) for name, rows in sets.items()}


def demonstrations(config: RunConfig, data: Path, chat_format: ChatFormat | None = None) -> list[SFTRow]:
    """Read rows with a prompt and a response from `rlhf.ptx.source` (without the questions that the run holds out) or
    the run's `data`, where the former are stored once they were read. Raises UserError without any."""
    source, file = config.rlhf.ptx.source, data / DEMONSTRATIONS_FILE
    if source and file.exists():
        return cast(list[SFTRow], read_rows(file))
    if source:
        given = config.data.model_copy(update={"source": source, "limit": 0})
        (read,) = read_sources(given, lambda _: None, chat_format)
        held_out = {opening(row["prompt"]) for part in data.glob("*_eval.jsonl") for row in read_rows(part)}
        rows = [cast(SFTRow, row) for row in read.rows if "response" in row and opening(row["prompt"]) not in held_out]
    else:
        rows = cast(list[SFTRow], read_rows(data / "sft_train.jsonl"))
    if not rows:
        raise UserError(
            f"rlhf.ptx needs rows with a prompt and a response, and {source or 'the data of step 1'} has none: name a "
            f"file that has in rlhf.ptx.source, or set rlhf.ptx.coefficient=0."
        )
    return rows


def store_demonstrations(config: RunConfig, data: Path, chat_format: ChatFormat) -> None:
    """Raise UserError without any; store those of another file beside the run's own, so that it is read only once."""
    rows, file = demonstrations(config, data, chat_format), data / DEMONSTRATIONS_FILE
    if config.rlhf.ptx.source and not file.exists():
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
