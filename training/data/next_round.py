"""The rows of a run that goes on from another one: what was held out there stays held out, its prompts serve here."""

from pathlib import Path
from typing import Any, cast

from inference.errors import UserError
from training.data.rows import PANEL_FILE, PanelRow, RowSets, read_rows
from training.data.split import choose_groups, identity, once, shuffle

SHARES = (0, 1, 1)
"""`data.split` of such a run, whose step 1 is done: pairs serve steps 2 and 3."""


def go_on(sets: RowSets, parent: Path, seed: int) -> str:
    """Lay the new rows, `sets`, over those of the run directory `parent`; returns a sentence about it.

    The held-out prompts (if it has some), all demonstrations and the texts that people rated are the parent's, in its
    order, so that rounds are compared on the same ones. No question is trained on that was held out there. Raises
    UserError where the parent's rows are not there, and where no pair is left to train on.
    """
    theirs = RowSets()
    for name, _ in sets.items():
        setattr(theirs, name, read_rows(rows_file(parent, name)))
    new, old = ([row for _, rows in each.items() for row in rows] for each in (sets, theirs))
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
    """Raises UserError where it is not there."""
    file = parent / "data" / f"{name}.jsonl"
    if not file.exists():
        raise UserError(
            f"{file} is missing, and what was held out there must stay held out: bring the rows of {parent} back, or "
            f"begin a run of its own with rlhf-chat rlhf RUN --sft-model MODEL, with a new RUN."
        )
    return file
