"""Sharing a user's rows out: some are held out for evaluation, the rest go to the three steps.

All rows with the same question (the user's first message, however it is written) stay together, whatever their system
message: no question is both trained on and evaluated, and nor are two parts of one conversation.
"""

import hashlib
import json
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar, cast

from inference.chat_template import Message
from inference.errors import UserError
from training.data.rows import LabelledRow, PairRow, PromptRow, Row, RowSets, SFTRow

T = TypeVar("T")
USES = {
    "pair": ("sft", "pairs", "prompts"),
    "good": ("sft", "pairs", "prompts"),
    "bad": ("pairs", "prompts"),
    "sft": ("sft",),
    "prompt": ("prompts",),
}
"""What rows of a kind can be, by their use in training. Where nothing else gives prompts, demonstrations do as well."""
SHARES = ("sft", "pairs", "prompts")  # that data.split has


def split_rows(
    rows: Sequence[Row],
    shares: tuple[float, float, float],
    held_out: float,
    seed: int,
    all_serve_all: bool = False,
    evaluated: Collection[str] = (),
) -> RowSets:
    """Share pairs out over the three steps, in proportion to `shares` (as DeepSpeed-Chat); demonstrations go to step 1
    and prompts to step 3. Demonstrations alone train step 1, and all their prompts serve step 3 too. Where
    `all_serve_all`, each pair serves each step that has a share.

    `held_out` is the share of the questions set aside for evaluation, at least one of each kind with two or more; none
    of a kind whose uses are all `evaluated` by other data. Nothing is trained on their rows, so they serve every step
    that they can. Rows are group by group, in their own order.
    """
    check_shares(shares)
    group_of = choose_groups(rows)
    kinds: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        kinds[kind_of(row)][group_of(row)].append(row)
    aside: set[str] = set()
    for kind, groups in kinds.items():
        used = [use for use, share in zip(SHARES, shares, strict=True) if share > 0 and use in USES[kind]]
        if not set(used) <= set(evaluated):
            aside |= hold_out(groups, held_out, seed)
    for groups in kinds.values():  # what one kind holds out may be all that another has
        if groups.keys() <= aside:
            aside.remove(in_random_order(list(groups), f"{seed} hold out")[-1])
    sets = RowSets()
    for kind, groups in kinds.items():
        served = {use: share for use, share in zip(SHARES, shares, strict=True) if use in USES[kind] and share > 0}
        trained = {name: group for name, group in groups.items() if name not in aside}
        too_few = not all_serve_all and 0 < len(trained) < len(served)  # a step would have none
        sets.steps_share |= too_few
        assigned = assign_uses(trained, served, seed)
        for name, group in groups.items():
            for use in served:
                if name in aside or too_few or all_serve_all or assigned[name] == use:
                    add_rows(sets, use, group, evaluation=name in aside)
    if kinds.keys() == {"sft"} and shares[2] > 0:
        for name, group in kinds["sft"].items():
            add_rows(sets, "prompts", group, evaluation=name in aside)
    return sets


def check_shares(shares: tuple[float, float, float]) -> None:
    if not (min(shares) >= 0 and 0 < sum(shares) < float("inf")):
        raise UserError(f"data.split={list(shares)} must be three shares of 0 or more, not all of them 0.")


def kind_of(row: Row) -> str:
    """Name the kind of a row; `good` and `bad` are answers with a label."""
    if "label" in row:
        return "good" if cast(LabelledRow, row)["label"] else "bad"
    return "pair" if "chosen" in row else "sft" if "response" in row else "prompt"


def choose_groups(rows: Sequence[Row]) -> Callable[[Row], str]:
    """Return the function that names a row's group: its question. Where all rows have the same one, the user's next
    messages count as well, and at last the whole prompt."""
    for count in range(1, max((len(questions(row["prompt"])) for row in rows), default=0) + 1):
        first = opening(rows[0]["prompt"], count)
        if any(opening(row["prompt"], count) != first for row in rows):
            return lambda row: opening(row["prompt"], count)
    return lambda row: json.dumps([one_spelling(message["content"]) for message in row["prompt"]])


def questions(prompt: Sequence[Message]) -> list[str]:
    return [message["content"] for message in prompt if message["role"] == "user"]


def opening(prompt: Sequence[Message], count: int = 1) -> str:
    """Write the user's first `count` messages in one spelling, which no trained row shares with one held out."""
    return "\n".join(one_spelling(text) for text in questions(prompt)[:count])


def keep_once(sets: RowSets) -> int:
    """Leave each row in a set once, the first of equal ones; returns how many went."""
    gone = 0
    for name, rows in sets.items():
        distinct = once(rows, evaluation=name.endswith("_eval"))
        gone += len(rows) - len(distinct)
        rows[:] = distinct
    return gone


def once(rows: Sequence[T], evaluation: bool) -> list[T]:
    first: dict[tuple[Any, ...], T] = {}
    for row in rows:
        first.setdefault(identity(row, evaluation), row)
    return list(first.values())


def shuffle(sets: RowSets, seed: int) -> None:
    for name, rows in sets.items():
        random.Random(f"{seed} order {name}").shuffle(rows)


def identity(row: Any, evaluation: bool) -> tuple[Any, ...]:
    """Return what two rows that are the same have in common; spaces around a message do not count, and in evaluation
    nor does what a reward function is told beside a prompt."""
    prompt = tuple((message["role"], message["content"].strip()) for message in row["prompt"])
    extra = "" if evaluation or "extra" not in row else json.dumps(row["extra"], sort_keys=True, default=str)
    return prompt, row.get("response"), row.get("label"), row.get("chosen"), row.get("rejected"), extra


def in_random_order(names: Sequence[str], salt: str) -> list[str]:
    """Order by hash, so that the order of the files and rows does not matter."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{salt} {name}".encode()).digest())


def hold_out(groups: dict[str, list[Row]], share: float, seed: int) -> set[str]:
    """Names of about `share` of the groups; those that have more than that share of the rows are passed over."""
    if len(groups) < 2:
        return set()
    wanted, rows = max(1, round(share * len(groups))), share * sum(map(len, groups.values()))
    order = in_random_order(list(groups), f"{seed} hold out")
    chosen = [name for name in order if len(groups[name]) <= max(1, rows)][:wanted]
    return set(chosen) or {min(order, key=lambda name: len(groups[name]))}


def assign_uses(groups: dict[str, list[Row]], shares: dict[str, float], seed: int) -> dict[str, str]:
    """Choose the use of each group: always the one that is furthest behind its share of the rows. A use that would have
    none gets a group of the use with the most groups."""
    assigned: dict[str, str] = {}
    given = dict.fromkeys(shares, 0)
    for name in in_random_order(list(groups), f"{seed} steps") if shares else []:
        total = sum(given.values()) + len(groups[name])
        behind = {use: total * shares[use] / sum(shares.values()) - given[use] for use in shares}
        assigned[name] = max(behind, key=lambda use: behind[use])
        given[assigned[name]] += len(groups[name])
    for use in shares:
        (most, count), *_ = Counter(assigned.values()).most_common(1) or [(use, 0)]
        if use not in assigned.values() and count > 1:
            assigned[next(name for name, owner in reversed(assigned.items()) if owner == most)] = use
    return assigned


def add_rows(sets: RowSets, use: str, group: list[Row], evaluation: bool) -> None:
    """Append what is used of the rows: responses (of pairs the chosen one), pairs, or prompts."""
    for row in group:
        source: dict[str, str] = {"source": row["source"]} if "source" in row else {}
        if use == "sft":
            response = cast(PairRow, row)["chosen"] if kind_of(row) == "pair" else cast(SFTRow, row)["response"]
            sft = sets.sft_eval if evaluation else sets.sft_train
            sft.append(cast(SFTRow, {"prompt": row["prompt"], "response": response, **source}))
        elif use == "pairs":
            (sets.pairs_eval if evaluation else sets.pairs_train).append(cast(PairRow | LabelledRow, row))
        else:
            prompts = sets.prompts_eval if evaluation else sets.prompts_train
            extra = {"extra": cast(PromptRow, row)["extra"]} if "extra" in row else {}
            prompts.append(cast(PromptRow, {"prompt": row["prompt"], **extra, **source}))


INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\U000e0000-\U000e007f]"
)
"""Signs that change nothing a reader sees: soft hyphens, joiners, directions, fillers, variants, tags."""
PLAIN = str.maketrans("\u2018\u2019\u02bc\u201c\u201d\u2010\u2011\u2012\u2013\u2014\u2212", "'''\"\"------")
"""Quotation marks and dashes as word processors set them."""
BEFORE = " \"'`*_#>([\u00bf\u00a1"
BEHIND = " .,;:?!\"'`*_)]\u3001\u3002"  # marks around a text: of its end, quotation, Markdown


def one_spelling(text: str) -> str:
    """`text` without what case, Unicode form, spaces and the marks around it make different."""
    text = text.casefold() if text.isascii() else one_alphabet(text)
    bare = " ".join(text.split())
    return bare.removeprefix("- ").lstrip(BEFORE).rstrip(BEHIND) or bare


def one_alphabet(text: str) -> str:
    text = unicodedata.normalize("NFKC", INVISIBLE.sub("", text)).translate(PLAIN)
    return unicodedata.normalize("NFKC", text.casefold())  # folding a sign may take it apart
