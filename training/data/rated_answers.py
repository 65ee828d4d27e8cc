"""Several answers to one prompt in a row, and what somebody thought of them -> chosen and rejected.

Columns for the better and the worse answer (or several of either), two answers with a winner or a score each, or a list
of answers with a score each. reading.py pairs answers that have a row each.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from training.data.entries import BadRow, LeftOut
from training.data.messages import looks_like_messages, parsed

STEMS = (
    *("response", "answer", "output", "completion", "reply", "generation", "candidate", "summary", "conversation"),
    "text",
)
"""What the column of an answer is called, with something before or behind it."""
LISTS = ("responses", "answers", "outputs", "completions", "replies", "generations", "candidates", "summaries")
TEXT_KEYS = (*STEMS, "content")  # the text of an answer that is an object stands under one of these


def columns_called(words: Iterable[str], *others: str) -> frozenset[str]:
    """Make `good`, `good_answer`, `answer_good` and their like."""
    forms = {form for word in words for stem in STEMS for form in (word, f"{word}_{stem}", f"{stem}_{word}")}
    return frozenset(forms | set(others))


BETTER = columns_called(
    ("chosen", "preferred", "accepted", "good", "better", "best", "positive", "win", "winning"), "winner", "response_j"
)
WORSE = columns_called(
    ("rejected", "dispreferred", "non_preferred", "unpreferred", "bad", "worse", "worst", "negative", "lose", "losing"),
    *("loser", "response_k"),
)
ENDINGS = (("_a", "_b"), ("_1", "_2"), ("_0", "_1"), ("1", "2"), ("0", "1"), ("a", "b"))
TWO = {f"{stem}{first}": (f"{stem}{second}", first, second) for first, second in ENDINGS for stem in STEMS}
"""The column of the first of two answers -> that of the second, and what both names end with."""
SCORES = ("fine-grained_score", "overall_score", "score", "rating", "reward", "pm_score", "helpfulness")
"""More is better. The first one that is there counts."""
RANK = "rank"  # 1 is the best
ORDERS = ("ranking", "rankings")
"""The rank of each answer, or the answers' numbers from the best to the worst: nobody knows."""
WINNER_COLUMNS = (
    "winner",
    "preference",
    "preferred",
    "better",
    "choice",
    "better_response_id",
    "label",
    *sorted(BETTER),
)
"""They name the better one of two answers, or have its number."""
LIKE_A_WINNER = re.compile("winner|prefer|better|verdict")
SHORT = 20  # characters of what may be a winner and not its reason
STRENGTHS = ("overall_preference", "preference_strength")
"""Below 0 where the first of two answers is better, above where the second is (HelpSteer2 and 3)."""
TIE = re.compile(r"\b(ties?|tied|draw|equal|same|both|neither|none)\b|bothbad|^1\.5$")
SCORES_OF_A_PAIR = [
    (form.format("chosen", score), form.format("rejected", score))
    for score in SCORES
    for form in ("{1}_{0}", "{0}_{1}", "{0}-{1}")
]
COLUMNS = BETTER | WORSE | TWO.keys() | set(LISTS)  # a row without any of these has no several answers

TURNS = ("prompt", "response_a", "response_b")
"""The columns in which Chatbot Arena keeps the list of a conversation's turns as text."""

Preferred = tuple[Any, Any, set[str], float | None]
"""The better answer, the worse one, the columns (by their usual names) that say so, and by how much it is better."""


def each_pair(value: Any, every: bool = False) -> list[Any]:
    """Return the value once for each of its pairs, where a column of better or of worse answers holds a list of them,
    or, if it is to be `every` pair, where several answers have a rating."""
    if not isinstance(value, dict):
        return [value]
    names = {str(name).strip().lower(): name for name in value}
    if every and not {"chosen", "rejected"} & names.keys() and (pairs := every_pair(value, names)):
        return pairs
    if not any(isinstance(cell, list) for cell in value.values()):
        return [value]
    if not (BETTER & names.keys() and WORSE & names.keys()):
        return [value]
    columns = [names[usual] for usual in (BETTER | WORSE) & names.keys() if is_several(value[names[usual]])]
    return [
        {**value, **dict(zip(columns, cells, strict=True))} for cells in product(*(value[name] for name in columns))
    ]


def every_pair(value: dict[str, Any], names: Mapping[str, str]) -> list[Any]:
    """Return the value once for each two answers of its list with different ratings, the furthest apart first."""
    rated = rated_list({usual: value[name] for usual, name in names.items() if value[name] is not None})
    if rated is None:
        return []
    answers, scores, used = rated
    rest = {name: cell for name, cell in value.items() if name not in {names[column] for column in used}}
    prompt_from_context(rest, names)
    return [
        {**rest, "chosen": answers[i], "rejected": answers[j], "margin": scores[i] - scores[j]}
        for i, j in better_first(scores)
        if stripped(answers[i]) != stripped(answers[j])
    ]


def stripped(answer: Any) -> Any:
    return answer.strip() if isinstance(answer, str) else answer


def prompt_from_context(row: dict[str, Any], names: Mapping[str, str]) -> None:
    """Take messages in `context` beside several answers as the prompt, as HelpSteer3 has them."""
    if row.get(names.get("prompt", "prompt")) is None and looks_like_messages(row.get(names.get("context", ""))):
        row["prompt"] = row.pop(names["context"])


def better_first(scores: Mapping[int, float]) -> list[tuple[int, int]]:
    """List all two keys of which the first has the higher score, the furthest apart first."""
    pairs = [(i, j) for i, j in product(scores, repeat=2) if scores[i] > scores[j]]
    return sorted(pairs, key=lambda pair: scores[pair[1]] - scores[pair[0]])


def is_several(value: Any) -> bool:
    """Whether a cell is a list of answers, each a text or a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) or looks_like_messages(v) for v in value)


def choose_answers(row: dict[str, Any]) -> None:
    """Make `chosen`, `rejected` and perhaps `margin` of several answers that the row has, and take the columns away
    that say so.

    Raises LeftOut for answers of which none is better, and BadRow for a judgement that cannot be read.
    """
    names = {name.strip().lower(): name for name in row}
    if not COLUMNS & names.keys():
        return
    row |= single_turn(row)
    values = {usual: row[name] for usual, name in names.items() if row[name] is not None}
    if {"chosen", "rejected"} <= values.keys():
        used, margin = require_better(values)
    else:
        choice = better_and_worse(values) or one_of_two(values) or best_and_worst(values)
        if choice is None:
            return
        row["chosen"], row["rejected"], used, margin = choice
        prompt_from_context(row, names)
    for column in used - {"chosen", "rejected"}:
        del row[names[column]]
    if margin is not None and number(row.get("margin")) is None:
        row["margin"] = margin


def single_turn(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read the texts in a row of Chatbot Arena, which writes `["Hi"]`. Raises LeftOut for more turns than one."""
    cells = [row.get(name) for name in TURNS]
    if not all(isinstance(cell, str) and cell.startswith("[") and cell.endswith("]") for cell in cells):
        return {}
    turns = [parsed(cell) for cell in cells]
    if not all(isinstance(turn, list) and len(turn) == len(turns[0]) for turn in turns):
        return {}
    if len(turns[0]) != 1:
        raise LeftOut("a conversation of several turns, of which the two models had each its own")
    return {name: turn[0] for name, turn in zip(TURNS, turns, strict=True)}


def require_better(values: Mapping[str, Any]) -> tuple[set[str], float | None]:
    """Raise LeftOut where a pair's own scores do not say that chosen is better. Returns the columns of the scores, and
    their difference."""
    for columns in SCORES_OF_A_PAIR:
        chosen, rejected = (number(values.get(column)) for column in columns)
        if chosen is not None and rejected is not None:
            if chosen <= rejected:
                raise LeftOut("the chosen answer has no higher score than the rejected one")
            return set(columns), chosen - rejected
    return set(), None


def better_and_worse(values: Mapping[str, Any]) -> Preferred | None:
    better, worse = ([name for name in values if name in words] for words in (BETTER, WORSE))
    if len(better) != 1 or len(worse) != 1 or not all(is_answer(values[name]) for name in better + worse):
        return None
    return values[better[0]], values[worse[0]], {*better, *worse}, None


def is_answer(value: Any) -> bool:
    return isinstance(value, str | dict) or looks_like_messages(value)


def one_of_two(values: Mapping[str, Any]) -> Preferred | None:
    """Judge two answers in columns of their own by scores or a winner."""
    for column, (other, *ends) in TWO.items():
        if not {column, other} <= values.keys():
            continue
        columns = (column, other)
        judged = by_scores(values, columns, ends) or by_winner(values, columns, ends)
        if judged is None:
            continue
        better, used, margin = judged
        if better is None:
            raise LeftOut("neither of the two answers is the better one")
        return values[columns[better]], values[columns[1 - better]], {*columns, *used}, margin
    return None


Judged = tuple[int | None, set[str], float | None]
"""Which of two answers is the better one (None for a tie), the columns that say so, and by how much it is better."""


def by_scores(values: Mapping[str, Any], columns: tuple[str, str], ends: list[str]) -> Judged | None:
    for score in SCORES:
        for form in (f"{score}{{end}}", f"{score}_{{column}}", f"{{column}}_{score}"):
            names = [form.format(end=end, column=column) for end, column in zip(ends, columns, strict=True)]
            first, second = (number(values.get(name)) for name in names)
            if first is not None and second is not None:
                return None if first == second else int(second > first), set(names), abs(second - first)
    return None


def by_winner(values: Mapping[str, Any], columns: tuple[str, str], ends: list[str]) -> Judged | None:
    for name in STRENGTHS:
        if (strength := number(values.get(name))) is not None:
            return None if strength == 0 else int(strength > 0), {name}, abs(strength)
    hot = [f"winner_model{end}" for end in ends]
    if values.keys() >= set(hot):
        first, second = (number(values[name]) or 0 for name in hot)
        return None if first == second else int(second > first), set(hot), None
    others = [name for name, value in values.items() if LIKE_A_WINNER.search(name) and len(str(value)) <= SHORT]
    for name in (*WINNER_COLUMNS, *others):
        if name in values and name not in columns:
            answers = [values[column] for column in columns]
            return named_answer(name, values[name], answers, columns, ends), {name}, None
    return None


def named_answer(name: str, winner: Any, answers: list[Any], columns: tuple[str, str], ends: list[str]) -> int | None:
    """Return the index of the answer that is named, None for a tie. Raises BadRow for what names neither."""
    if winner in answers:
        return answers.index(winner)
    text = re.sub(r"\.0+$", "", str(winner).strip().lower())  # 1.0 is 1
    if TIE.search(text):
        return None
    words = set(re.findall(r"[a-z]+|\d+", text))
    named = [i for i in (0, 1) if {ends[i].strip("_"), "ab"[i], ("first", "second")[i], ("left", "right")[i]} & words]
    if len(named) != 1:
        raise BadRow(f"'{name}' is {text[:SHORT]!r}, which names neither {columns[0]} nor {columns[1]}")
    return named[0]


Scores = tuple[list[float | None], set[str]]
"""Of each answer, more is better; and the columns that they stand in."""


def best_and_worst(values: Mapping[str, Any]) -> Preferred | None:
    """Choose the two answers of a list that are furthest apart. Raises LeftOut where none is better than another."""
    if (rated := rated_list(values)) is None:
        return None
    answers, scores, used = rated
    if len(scores) < 2:
        raise LeftOut("only one answer to the prompt has a score")
    best, worst = (choose(scores, key=lambda i: scores[i]) for choose in (max, min))
    if scores[best] == scores[worst]:
        raise LeftOut("the answers to the prompt have the same score")
    return answers[best], answers[worst], used, scores[best] - scores[worst]


def rated_list(values: Mapping[str, Any]) -> tuple[list[Any], dict[int, float], set[str]] | None:
    """Read a list of answers, each with a score or a rank, in it or in a list beside it: the answers, the scores of
    those that have one by their indices, and the columns."""
    for column in LISTS:
        answers = parsed(values.get(column))
        if not isinstance(answers, list) or not answers or not all(map(is_answer, answers)):
            continue
        rated = scores_in(answers) or scores_beside(values, column, len(answers))
        if rated is not None:
            scores = {i: score for i, score in enumerate(rated[0]) if score is not None}
            return list(map(text_in, answers)), scores, {column, *rated[1]}
    return None


def text_in(answer: Any) -> Any:
    """Return the text of an answer that is an object; any other as it is."""
    if not isinstance(answer, dict) or "role" in answer or "from" in answer:
        return answer
    return next((answer[key] for key in TEXT_KEYS if key in answer), answer)


def scores_in(answers: list[Any]) -> Scores | None:
    """Read the score in each answer that is an object, else the mean of its annotations' ratings (UltraFeedback)."""
    if not all(isinstance(answer, dict) for answer in answers):
        return None
    for key in (*SCORES, RANK):
        if any(key in answer for answer in answers):
            return more_is_better(key, [number(answer.get(key)) for answer in answers]), set()
    ratings = [mean_rating(answer.get("annotations")) for answer in answers]
    return (ratings, set()) if any(rating is not None for rating in ratings) else None


def mean_rating(annotations: Any) -> float | None:
    """Average {"helpfulness": {"Rating": "4"}, ...}; what is not rated (N/A) does not count."""
    aspects = annotations.values() if isinstance(annotations, dict) else ()
    numbers = [number(aspect.get("Rating")) for aspect in aspects if isinstance(aspect, dict)]
    ratings = [rating for rating in numbers if rating is not None]
    return sum(ratings) / len(ratings) if ratings else None


def scores_beside(values: Mapping[str, Any], column: str, count: int) -> Scores | None:
    stem = next(stem for stem in STEMS if column.startswith(stem.removesuffix("y")))
    for key in (*SCORES, RANK, *ORDERS):
        for name in (key, f"{key}s", f"{stem}_{key}s", f"{column}_{key}s"):
            scores = parsed(values.get(name))
            if not isinstance(scores, list):
                continue
            if len(scores) != count:
                raise BadRow(f"there are {count} '{column}' and {len(scores)} '{name}'")
            numbers = [number(score) for score in scores]
            if wrong := [score for score, n in zip(scores, numbers, strict=True) if n is None and score is not None]:
                raise BadRow(f"'{name}' has {str(wrong[0])[:SHORT]!r}, which is no number")
            if key in ORDERS:
                require_plain_order(name, numbers)
            return more_is_better(key, numbers), {name}
    return None


def more_is_better(key: str, numbers: list[float | None]) -> list[float | None]:
    return [None if n is None else -n for n in numbers] if key in (RANK, *ORDERS) else numbers


def require_plain_order(name: str, numbers: list[float | None]) -> None:
    """Raise BadRow where ranks and an order of the same numbers would choose other answers."""
    start = 0 if 0 in numbers else 1
    if sorted(n for n in numbers if n is not None) != list(range(start, start + len(numbers))):
        return
    ends = (start, start + len(numbers) - 1)
    if [numbers.index(end) + start for end in ends] != [numbers[0], numbers[-1]]:
        raise BadRow(
            f"'{name}' may be the rank of each answer, or the answers' numbers from best to worst: call it 'ranks' (1 "
            f"is the best), or write chosen and rejected"
        )


def number(value: Any) -> float | None:
    try:
        result = float(value)
    except (TypeError, ValueError):
        return None
    return result if math.isfinite(result) else None


@dataclass(frozen=True)
class Rating:
    value: float  # more is better; of a label 1 or 0
    column: str
    is_label: bool

    @property
    def is_bad(self) -> bool:
        """Whether a label says so: a score alone cannot."""
        return self.is_label and not self.value


def rating_of(row: Mapping[str, Any]) -> Rating | None:
    for column in (*SCORES, RANK):
        if (value := number(row.get(column))) is not None and not isinstance(row[column], bool):
            return Rating(-value if column == RANK else value, column, is_label=False)
    return None
