"""Sources -> rows with their locations, and a report of what each source holds."""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, cast

from inference.chat_format import ChatFormat
from inference.collecting import without_collecting
from inference.errors import UserError
from inference.preferences import Preference
from training.data.entries import BadRow, CutShort, LeftOut
from training.data.files import read_file
from training.data.find_files import PLAIN, HubSet, fetch_files, find_files, find_set, matching
from training.data.formats import KNOWN_KEYS, read_row
from training.data.rated_answers import Rating, better_first
from training.data.reasoning import read_task
from training.data.rows import PairRow, Row, RowSets
from training.data.shapes import PREFERENCE_COLUMNS, UNDECIDED
from training.data.sources import Source, parse_source
from training.data.split import kind_of
from training.data_settings import DataSettings
from training.evaluation.preferences import newest


def require_accepted(rows: Sequence[Row], chat_format: ChatFormat) -> None:
    """Raise BadRow where the template refuses a prompt, with the way out if there is one."""
    prompt = rows[-1]["prompt"]  # of a conversation the longest, which begins with all the others
    if why := chat_format.refusal(prompt):
        what = "the model's chat template refuses the row"
        if prompt[0]["role"] == "system" and not chat_format.refusal(prompt[1:]):
            what = "the model's chat template refuses a system message, whose text can stand before the question"
        raise BadRow(f"{what} ({why})")


JUDGED_AGAIN = "the same person has judged these answers again"
KEYS_NAMED = 12
NAMES_OF_KINDS = {
    "pair": "pairs",
    "good": "good answers",
    "bad": "bad answers",
    "sft": "demonstrations",
    "prompt": "prompts",
}


@dataclass
class SourceRows:
    source: Source
    rows: list[Row] = field(default_factory=list)
    locations: list[str] = field(default_factory=list)  # the file of each row with its line, or its number
    formats: Counter[str] = field(default_factory=Counter)  # lines in each format
    left_out: list[tuple[str, str, bool]] = field(default_factory=list)
    """The location of each line that gave no row, the reason, and whether something was wrong with it."""
    notes: list[str] = field(default_factory=list)
    preferences: list[Preference] = field(default_factory=list)
    """What people said of two answers (docs/preferences.md), of rows that are used and others."""

    @property
    def reasons(self) -> Counter[str]:
        return Counter(reason for _, reason, _ in self.left_out)

    def describe(self) -> str:
        """Say what was read, as `rows.jsonl: 412 pairs (preference, text)`."""
        kinds = Counter(kind_of(row) for row in self.rows)
        counts = ", ".join(
            f"{count:,} {NAMES_OF_KINDS[kind].removesuffix('s' * (count == 1))}" for kind, count in kinds.most_common()
        )
        formats = "; ".join(name for name, _ in self.formats.most_common())
        notes = "".join(f"; {note}" for note in self.notes)
        return f"{self.source}: {counts or 'no rows'} ({formats or 'no format'}){notes}"


def read_sources(
    settings: DataSettings, report: Callable[[str], None] = print, chat_format: ChatFormat | None = None
) -> list[SourceRows]:
    """Read all sources of `settings`, in their order. A row that the template of `chat_format` refuses is a bad one.

    Raises UserError for a source that does not exist, cannot be read or has no row, and for a bad row unless such rows
    are to be skipped.
    """
    sources = [parse_source(text) for text in settings.sources]
    if twice := [source.label for i, source in enumerate(sources) if source.label in {s.label for s in sources[:i]}]:
        raise UserError(f"{twice[0]} is given twice as a data source: give it once, with a weight: {twice[0]}=2.")
    with without_collecting():
        results = [read_source(source, settings, report, chat_format) for source in sources]
    for result in results:
        if not result.rows:
            reasons = result.reasons.most_common(1)
            why = f"none of its rows can be used ({reasons[0][0]})" if reasons else "it is empty"
            raise UserError(f"{result.source} gives no data, {why}; each row must be an object with {KNOWN_KEYS}.")
    return results


def read_source(
    source: Source,
    settings: DataSettings,
    report: Callable[[str], None],
    chat_format: ChatFormat | None = None,
) -> SourceRows:
    result = SourceRows(source)
    files, hub_set, result.notes = locate(source, report) if not source.is_task else ([], PLAIN, [])
    used, unused, extra = 0, set[str](), set[str]()
    ratings: dict[int, Rating] = {}
    judged: list[tuple[Row, Preference]] = []
    entries = (entry for file in files for entry in read_file(file, hub_set.columns))
    for location, value in read_task(source.name) if source.is_task else entries:
        preferences: list[Preference] = []
        try:
            if isinstance(value, CutShort) and result.preferences:  # the next one would cut it off
                raise LeftOut("the last line was cut short")
            if isinstance(value, BadRow):
                raise value
            if isinstance(value, dict):
                preferences = preferences_in(value)
                result.preferences += preferences
                value = hub_set.adapt(value)
            read = read_row(value, settings.comparisons == "all", settings.keeps_labels)
            if chat_format is not None:
                require_accepted(read.rows, chat_format)
        except BadRow as error:
            left_out = isinstance(error, LeftOut)
            if settings.bad_rows == "refuse" and not left_out:
                raise UserError(
                    f"{location}: {error}; correct the row, or leave such rows out with --set data.bad_rows=skip."
                ) from None
            result.left_out.append((location, str(error), not left_out))
            continue
        judged += product(read.rows, preferences)
        result.rows += read.rows
        result.locations += [location] * len(read.rows)
        if read.rating is not None:
            ratings[len(result.rows) - 1] = read.rating
            if read.rating.is_bad:
                continue
        result.formats[read.format] += 1
        unused |= read.unused
        extra |= read.extra
        used += 1
        if used == settings.limit:
            break
    unused -= pair_up(result, ratings, settings.comparisons == "all")
    leave_out_judged_again(result, judged)
    undecided = [
        f"{result.reasons[why]:,} {why.removeprefix('both answers are ')}"
        for why in UNDECIDED.values()
        if result.reasons[why]
    ]
    result.notes += [f"{' and '.join(undecided)}, which teach nothing"] * bool(undecided)
    if count := result.reasons[JUDGED_AGAIN]:
        result.notes.append(f"{count:,} left out that the same person judged again")
    for keys, what in ((unused, "not used"), (extra, "for a reward function only")):
        if keys:
            more = f" and {len(keys) - KEYS_NAMED} more" if len(keys) > KEYS_NAMED else ""
            result.notes.append(f"{what}: {', '.join(sorted(keys)[:KEYS_NAMED])}{more}")
    return result


def preferences_in(value: dict[str, Any]) -> list[Preference]:
    """Return what somebody said of two answers, if the value is that."""
    if not value.keys() >= PREFERENCE_COLUMNS:
        return []
    with suppress(ValueError):
        return [Preference.of(json.dumps(value))]
    return []


def leave_out_judged_again(result: SourceRows, judged: Sequence[tuple[Row, Preference]]) -> None:
    """Keep each person's last word on two answers only; `judged` has the rows that come from preferences."""
    last = set(map(id, newest(result.preferences)))
    earlier = {id(row) for row, preference in judged if id(preference) not in last}
    if not earlier:
        return
    both = list(zip(result.rows, result.locations, strict=True))
    result.left_out += [(location, JUDGED_AGAIN, False) for row, location in both if id(row) in earlier]
    result.rows = [row for row, _ in both if id(row) not in earlier]
    result.locations = [location for row, location in both if id(row) not in earlier]


def pair_up(result: SourceRows, ratings: dict[int, Rating], every: bool) -> set[str]:
    """Make pairs of answers that have a row each; returns the columns that said which is better."""
    if not ratings:
        return set()
    pairing = pair_rows(result.rows, ratings, every)
    used = pairing.answers | pairing.left_out.keys()
    remaining = [i for i in range(len(result.rows)) if i in pairing.pairs or i not in used]
    result.left_out += [(result.locations[i], reason, False) for i, reason in sorted(pairing.left_out.items())]
    result.locations = [result.locations[i] for i in remaining for _ in pairing.pairs.get(i, [None])]
    result.rows = [row for i in remaining for row in pairing.pairs.get(i, [result.rows[i]])]
    columns = {ratings[i].column for i in pairing.answers}
    if columns:
        count = sum(map(len, pairing.pairs.values()))
        pairs = f"{count:,} pair{'s' * (count > 1)}"
        result.notes.append(f"{pairs} of answers in several rows, by {', '.join(sorted(columns))}")
    return columns


def locate(source: Source, report: Callable[[str], None]) -> tuple[list[Path], HubSet, list[str]]:
    """Find the files of a source, how its rows are read, and notes. Raises UserError with the way out."""
    hub_set = None if source.path.exists() else find_set(source.name)
    if hub_set is not None:
        if source.copy is not None:
            files = matching(source.copy, hub_set.files) if source.copy.is_dir() else []
            if files:
                return files, hub_set, []
            files, notes = find_files(source.copy)
            return files, hub_set, notes
        files, notes = fetch_files(source.name, hub_set.repository, source.at, hub_set.files, report)
        return files, hub_set, notes
    if source.is_hub_id and source.copy is None:
        files, notes = fetch_files(source.name, source.name, source.at, (), report)
        return files, PLAIN, notes
    if source.copy is None and source.at:
        raise UserError(
            f"There is no data source {source.name}: only data sets of the hub take a revision, owner/name@REVISION."
        )
    files, notes = find_files(source.copy or source.path)
    return files, PLAIN, notes


def blend(sets: RowSets, weights: Mapping[str, float], seed: int) -> RowSets:
    """`sets` with the rows of each source (its name in the row's `source`) as often as its weight says.

    A training row of weight 2.5 is there twice, and half of such rows, drawn by the seed, a third time. Weights below
    1 draw that share. Held-out rows are there once at most. Nothing is drawn before the split, so that no row is on
    both sides of it.
    """
    if all(weight == 1 for weight in weights.values()):
        return sets
    result = RowSets()
    for name, rows in sets.items():
        evaluation = name.endswith("_eval")
        chosen = [
            row
            for source, group in by_source(rows).items()
            for row in drawn(
                group, min(weights[source], 1.0) if evaluation else weights[source], f"{seed} {name} {source}"
            )
        ]
        random.Random(f"{seed} blend {name}").shuffle(chosen)
        setattr(result, name, chosen)
    return result


def by_source(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["source"]].append(row)
    return groups


def drawn(rows: list[Row], weight: float, salt: str) -> list[Row]:
    """Copy the rows as often as the whole part of the weight says, and draw a share for the rest; at least one row."""
    whole = int(weight)
    share = min(len(rows), round((weight - whole) * len(rows)))
    return rows * whole + random.Random(salt).sample(rows, share if whole else max(share, 1))


BAD_ALONE = "an answer that is labelled as bad, and its prompt has none that is labelled as good"
BAD_AND_GOOD = "the same answer to the prompt is labelled as bad and as good"
NOT_IN_PAIR = "one of several rated answers to its prompt, of which the best and the worst are the pair"


@dataclass
class Pairing:
    """Which rows of a source become pairs, all by their indices in the list of its rows."""

    pairs: dict[int, list[PairRow]] = field(default_factory=lambda: defaultdict(list))
    answers: set[int] = field(default_factory=set)  # in any pair
    left_out: dict[int, str] = field(default_factory=dict)  # with the reason

    def add(self, rows: Sequence[Any], better: int, worse: int, margin: float | None = None) -> None:
        """Add a pair at the index of the better answer, or, if that has one, of the worse."""
        row = {
            "prompt": rows[better]["prompt"],
            "chosen": rows[better]["response"],
            "rejected": rows[worse]["response"],
        }
        if margin is not None:
            row["margin"] = margin
        self.pairs[worse if better in self.pairs else better].append(cast(PairRow, row))
        self.answers |= {better, worse}


def pair_rows(rows: Sequence[Any], ratings: Mapping[int, Rating], every: bool = False) -> Pairing:
    """Pair answers to the same prompt. Each that is labelled as bad is paired with one labelled as good, these in turn,
    or with `every` one; of answers with scores the best and the worst are the pair, or every two with different scores,
    and where all are alike they stay as they are."""
    groups: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for i, rating in ratings.items():
        prompt = [(message["role"], message["content"].strip()) for message in rows[i]["prompt"]]
        groups[json.dumps(prompt), rating.is_label].append(i)
    pairing = Pairing()
    for (_, is_label), indices in groups.items():
        if is_label:
            good, bad = ([i for i in indices if ratings[i].is_bad == is_bad] for is_bad in (False, True))
            pair_by_label(pairing, rows, good, bad, every)
        else:
            pair_by_score(pairing, rows, {i: ratings[i].value for i in indices}, every)
    return pairing


def pair_by_label(pairing: Pairing, rows: Sequence[Any], good: list[int], bad: list[int], every: bool) -> None:
    for turn, i in enumerate(bad):
        others = [other for other in good if rows[other]["response"] != rows[i]["response"]]
        for other in others if every else others[turn % max(1, len(others)) :][:1]:
            pairing.add(rows, other, i)
        if not others:
            pairing.left_out[i] = BAD_AND_GOOD if good else BAD_ALONE


def pair_by_score(pairing: Pairing, rows: Sequence[Any], scores: dict[int, float], every: bool) -> None:
    best, worst = (choose(scores, key=lambda i: scores[i]) for choose in (max, min))
    if scores[best] == scores[worst] or rows[best]["response"] == rows[worst]["response"]:
        return
    for better, worse in better_first(scores) if every else [(best, worst)]:
        if rows[better]["response"] != rows[worse]["response"]:
            pairing.add(rows, better, worse, scores[better] - scores[worse])
    pairing.left_out |= dict.fromkeys(scores.keys() - pairing.answers, NOT_IN_PAIR)
