"""What is doubtful about rows before anything is trained on them. Errors spoil a training; warnings are to be known."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from inference.chat_format import ChatFormat
from inference.preferences import Preference
from training.data.rows import Row
from training.data.sources import parse_source
from training.data.split import choose_groups, kind_of
from training.data_settings import DataSettings
from training.evaluation.preferences import overview

ANSWERS = {
    "pair": ("chosen", "rejected"),
    "good": ("response",),
    "bad": ("response",),
    "sft": ("response",),
    "prompt": (),
}
"""Kind of a row -> keys of its answers."""
LOCATIONS_NAMED = 5
LENGTH_BIAS = 0.6
"""Share of pairs in which the longer answer (or the shorter one) is chosen, from which a reward model may learn it."""
ENOUGH_PAIRS = 20  # with fewer a share says little
MUCH_CUT = 0.01  # share of rows that may be cut without a word


Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    level: Level
    check: str  # a short name, the same for every data set
    sentence: str
    count: int = 0  # of the rows concerned
    places: tuple[str, ...] = ()  # locations of the first of them

    def __str__(self) -> str:
        if not self.places:
            return self.sentence
        more = ", ..." if self.count > len(self.places) else ""
        rows = "row" if self.count == 1 else "rows"
        return f"{self.sentence} ({self.count:,} {rows}: {', '.join(self.places)}{more})"


@dataclass(frozen=True)
class Lines:
    rows: Sequence[Row]
    locations: Sequence[str]

    def where(self, test: Callable[[Row], bool]) -> list[str]:
        return [location for row, location in zip(self.rows, self.locations, strict=True) if test(row)]


@dataclass(frozen=True)
class Size:
    """The size of a row in tokens (characters without a tokenizer)."""

    prompt: int
    answers: tuple[int, ...]  # uncut, each with its end of turn
    is_empty: bool = False  # whether an answer has no token but the end of its turn
    is_same: bool = False  # whether different answers have the same tokens once they are cut

    @classmethod
    def of(cls, row: Row, chat_format: ChatFormat | None, settings: DataSettings) -> "Size":
        texts = answers(row)
        if chat_format is None:
            return cls(0, tuple(len(text) for text in texts))
        ids = [chat_format.response_ids(text) for text in texts]
        cut = [tuple(tokens[: settings.max_response_tokens]) for tokens in ids]
        return cls(
            len(chat_format.prompt_ids(row["prompt"])),
            tuple(len(tokens) for tokens in ids),
            not all(text.strip() and len(tokens) > 1 for text, tokens in zip(texts, ids, strict=True)),
            len(set(cut)) < len(set(texts)),
        )


def lint(lines: Lines, chat_format: ChatFormat | None, settings: DataSettings) -> list[Finding]:
    """List all findings in the rows; what needs tokens is left out without a `chat_format`."""
    sizes = [Size.of(row, chat_format, settings) for row in lines.rows]
    return [
        *same_answers(lines),
        *duplicates(lines, settings),
        *contradictions(lines),
        *one_label(lines),
        *length_bias(lines, sizes),
        *cut_rows(lines, sizes, settings) * (chat_format is not None),
        *untrained_rows(lines, sizes, settings),
    ]


def finding(level: Level, check: str, sentence: str, locations: Sequence[str]) -> list[Finding]:
    return [Finding(level, check, sentence, len(locations), tuple(locations[:LOCATIONS_NAMED]))] if locations else []


def bad_rows(left_out: Iterable[tuple[str, str, bool]]) -> list[Finding]:
    """List what reading a source left out, by reason: an error, unless nothing is wrong with the row itself."""
    locations: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for location, reason, wrong in left_out:
        locations[reason, wrong].append(location)
    findings = []
    for (reason, wrong), at in locations.items():
        findings += finding("error", "bad row", reason, at) if wrong else finding("warning", "left out", reason, at)
    return findings


def same_answers(lines: Lines) -> list[Finding]:
    locations = lines.where(lambda row: kind_of(row) == "pair" and len(set(answers(row))) == 1)
    return finding("error", "chosen = rejected", "a pair has the same answer twice, which teaches nothing", locations)


def duplicates(lines: Lines, settings: DataSettings) -> list[Finding]:
    """Rows that are there before; those of a source whose weight repeats them aside."""
    sources = [parse_source(text) for text in settings.sources]
    repeated = {source.label for source in sources if source.weight > 1}
    seen: set[str] = set()
    locations = []
    for row, location in zip(lines.rows, lines.locations, strict=True):
        text = json.dumps([row["prompt"], *answers(row), row.get("label")])
        if text in seen and row.get("source") not in repeated:
            locations.append(location)
        seen.add(text)
    return finding("warning", "duplicates", "the same row is there before", locations)


def contradictions(lines: Lines) -> list[Finding]:
    """Find pairs whose answers stand the other way round in another pair, and answers with both labels."""
    known = {json.dumps([row["prompt"], *answers(row)]) for row in lines.rows if kind_of(row) == "pair"}

    def is_reversed(row: Row) -> bool:
        if kind_of(row) != "pair" or len(set(answers(row))) == 1:
            return False
        return json.dumps([row["prompt"], *reversed(answers(row))]) in known

    def is_labelled(row: Row) -> bool:
        others = {"good": "bad", "bad": "good"}
        return json.dumps([row["prompt"], *answers(row), others.get(kind_of(row))]) in labelled

    labelled = {json.dumps([row["prompt"], *answers(row), kind_of(row)]) for row in lines.rows if "label" in row}
    locations, both = lines.where(is_reversed), lines.where(is_labelled)
    return [
        *finding("warning", "contradictions", "the pair is there the other way round too", locations),
        *finding("warning", "contradictions", "the answer is labelled as good and as bad", both),
    ]


def one_label(lines: Lines) -> list[Finding]:
    kinds = set(map(kind_of, lines.rows))
    if kinds not in ({"good"}, {"bad"}):
        return []
    sentence = f"all answers are labelled as {kinds.pop()}, so there is nothing to tell apart"
    return finding("error", "one label", sentence, lines.locations)


def length_bias(lines: Lines, sizes: Sequence[Size]) -> list[Finding]:
    """Whether the lengths of the answers tell which is chosen. Equal lengths count for neither side."""
    pairs = [size.answers for row, size in zip(lines.rows, sizes, strict=True) if kind_of(row) == "pair"]
    longer, shorter = sum(chosen > rejected for chosen, rejected in pairs), sum(c < r for c, r in pairs)
    total, most = longer + shorter, max(longer, shorter)
    if total < ENOUGH_PAIRS or most < LENGTH_BIAS * total:
        return []
    which = "longer" if longer > shorter else "shorter"
    sentence = (
        f"the {which} answer is chosen in {most / total:.0%} of the pairs: a reward model may learn length instead"
    )
    return [Finding("warning", "length bias", sentence, total)]


def locations_of(lines: Lines, sizes: Sequence[Size], test: Callable[[Size], bool]) -> list[str]:
    return [location for location, size in zip(lines.locations, sizes, strict=True) if test(size)]


def cut_rows(lines: Lines, sizes: Sequence[Size], settings: DataSettings) -> list[Finding]:
    limits = settings.max_prompt_tokens, settings.max_response_tokens
    prompts = locations_of(lines, sizes, lambda size: size.prompt > limits[0])
    cut = locations_of(lines, sizes, lambda size: max(size.answers, default=0) > limits[1])
    findings = []
    for locations, what in (
        (prompts, f"a prompt over data.max_prompt_tokens={limits[0]} loses its oldest turns"),
        (cut, f"an answer over data.max_response_tokens={limits[1]} is cut and has no end of turn"),
    ):
        share = len(locations) / max(len(lines.rows), 1)
        if share > MUCH_CUT:
            findings += finding("warning", "truncation", f"{what}: {share:.0%} of the rows", locations)
    return findings


def untrained_rows(lines: Lines, sizes: Sequence[Size], settings: DataSettings) -> list[Finding]:
    """Answers that are nothing but the end of the turn, and pairs that are the same once they are cut."""
    empty = locations_of(lines, sizes, lambda size: size.is_empty)
    same = locations_of(lines, sizes, lambda size: size.is_same)
    cut = f"the answers differ only behind data.max_response_tokens={settings.max_response_tokens}, or in no token"
    return [
        *finding("error", "no trained token", "an answer has no token but the end of its turn", empty),
        *finding("error", "chosen = rejected", cut, same),
    ]


def lint_preferences(preferences: Sequence[Preference]) -> list[Finding]:
    """Find what moves people other than the answers, and who agrees no more than chance would."""
    seen, findings = overview(preferences), []
    for name, left in seen["left"].items():
        if left["preferences"] >= ENOUGH_PAIRS and not left["low"] <= 0.5 <= left["high"]:
            side, share = ("left", left["rate"]) if left["rate"] > 0.5 else ("right", 1 - left["rate"])
            sentence = f"{name} prefers the {side} answer in {share:.0%} of the pairs, and sides are drawn at random"
            findings.append(Finding("warning", "side bias", sentence, left["preferences"]))
    agreements = [(f"{name} and the same person later", agreement) for name, agreement in seen["repeated"].items()]
    agreements += [(" and ".join(agreement["people"]), agreement) for agreement in seen["agreement"]]
    for who, agreement in agreements:
        pairs, kappa_low = agreement["pairs"], agreement["kappa_low"]
        if pairs >= ENOUGH_PAIRS and kappa_low is not None and kappa_low <= 0:
            sentence = f"{who} agree on {agreement['same']:.0%} of {pairs} pairs, which may be chance"
            findings.append(Finding("warning", "no agreement", sentence, pairs))
    return findings


def shared_prompts(train: Lines, evaluation: Lines) -> list[Finding]:
    """Questions that are both trained on and evaluated, by the rule that shares rows out."""
    group_of = choose_groups([*train.rows, *evaluation.rows])
    trained = {group_of(row) for row in train.rows}
    locations = evaluation.where(lambda row: group_of(row) in trained)
    return finding("error", "leak", "a held-out row has a question that is trained on too", locations)


def lint_tokenizer(tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat, directory: Path) -> list[Finding]:
    """`tokenizer` as its files have it, before ChatFormat fills in what it lacks."""
    spare = chat_format.tokenizer.pad_token
    findings = [Finding("warning", "chat template", sentence) for sentence in chat_format.differences]
    if tokenizer.pad_token_id is None:
        why = f"{directory} has a tokenizer without a pad token: {spare} is used"
        findings.append(Finding("warning", "pad token", why))
    elif tokenizer.pad_token_id in (tokenizer.eos_token_id, chat_format.end_of_turn_id):
        why = f"{directory} has a tokenizer whose pad token ends the turn ({tokenizer.pad_token}): {spare} is used"
        findings.append(Finding("warning", "pad token", why))
    return findings


def answers(row: Row) -> list[str]:
    return [row[key] for key in ANSWERS[kind_of(row)]]  # type: ignore[literal-required]
