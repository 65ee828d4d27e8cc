"""The rows of a run that goes on from another one: what was held out there stays held out, its prompts serve here."""

from pathlib import Path

from inference.errors import UserError
from training.data.rows import RowSets, read_rows
from training.data.split import choose_groups, identity, once, shuffle

SHARES = (0, 1, 1)
"""`data.split` of such a run, whose step 1 is done: pairs serve steps 2 and 3."""


def go_on(sets: RowSets, parent: Path, seed: int) -> str:
    """Lay the new rows, `sets`, over those of the run directory `parent`; returns a sentence about it.

    The held-out prompts and all demonstrations are the parent's, in its order, so that rounds are compared on the same
    ones. No question is trained on that was held out there. Raises UserError where the parent's rows are not there.
    """
    theirs = RowSets()
    for name, _ in sets.items():
        setattr(theirs, name, read_rows(rows_file(parent, name)))
    group_of = choose_groups([row for each in (sets, theirs) for _, rows in each.items() for row in rows])
    trained, held_out = (
        {group_of(row) for name, rows in theirs.items() if name.endswith(part) for row in rows}
        for part in ("_train", "_eval")
    )
    held_out_there = held_out - trained  # the texts of the embedded default are held out, and not what they answer
    moved = once([row for row in sets.pairs_train if group_of(row) in held_out_there], evaluation=True)
    sets.pairs_eval += moved
    aside = held_out_there | set(map(group_of, sets.pairs_eval))
    sets.pairs_train = [row for row in sets.pairs_train if group_of(row) not in aside]
    known = {identity(row, evaluation=True) for row in sets.prompts_train}
    sets.prompts_train += [row for row in theirs.prompts_train if identity(row, evaluation=True) not in known]
    sets.prompts_train = [row for row in sets.prompts_train if group_of(row) not in aside]
    shuffle(sets, seed)
    sets.prompts_eval, sets.sft_train, sets.sft_eval = theirs.prompts_eval, theirs.sft_train, theirs.sft_eval
    also = f"; pairs whose question was held out there, and so is here: {len(moved):,}" * bool(moved)
    return f"the held-out prompts, the demonstrations and most prompts are those of {parent}{also}"


def rows_file(parent: Path, name: str) -> Path:
    """Raises UserError where it is not there."""
    file = parent / "data" / f"{name}.jsonl"
    if not file.exists():
        raise UserError(
            f"{file} is missing, and what was held out there must stay held out: bring the rows of {parent} back, or "
            f"begin a run of its own with rlhf-chat rlhf RUN --sft-model MODEL, with a new RUN."
        )
    return file
