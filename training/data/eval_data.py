"""Rows for evaluation alone (`--eval-data`): they take the place of what would be held out of the data."""

from collections.abc import Callable
from dataclasses import dataclass, field

from inference.chat_format import ChatFormat
from inference.errors import UserError
from training.config import DataSettings
from training.data.reading import SourceRows, read_sources
from training.data.rows import Row, RowSets
from training.data.split import USES, add_rows, choose_groups, keep_once, kind_of, shuffle


@dataclass
class EvalData:
    found: list[SourceRows] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return [row for each in self.found for row in each.rows]

    @property
    def uses(self) -> dict[str, set[str]]:
        """Kinds of its rows -> what they evaluate: sft, pairs, prompts. Demonstrations alone give prompts as well."""
        kinds = set(map(kind_of, self.rows))
        return {kind: {*USES[kind], *["prompts"] * (kinds == {"sft"})} for kind in kinds}

    @property
    def serves(self) -> set[str]:
        return {use for uses in self.uses.values() for use in uses}

    def sets(self, seed: int) -> RowSets:
        """Its rows in the sets that they serve, each once."""
        sets, uses_of = RowSets(), self.uses
        for row in self.rows:
            for use in uses_of[kind_of(row)]:
                add_rows(sets, use, [row], evaluation=True)
        keep_once(sets)
        shuffle(sets, seed)
        return sets

    def hold_out(self, sets: RowSets, seed: int) -> str:
        """Put its rows where `sets` evaluates what it serves, and take its questions out of training; returns a
        sentence about it. Raises UserError where nothing is left to train on."""
        group_of = choose_groups([*self.rows, *(row for _, rows in sets.items() for row in rows)])
        known, ours = set(map(group_of, self.rows)), self.sets(seed)
        before = after = 0
        for name, rows in sets.items():
            use, _, part = name.partition("_")
            if part == "train":
                kept = [row for row in rows if group_of(row) not in known]
                before, after = before + len(rows), after + len(kept)
                setattr(sets, name, kept)
            elif use in self.serves:
                setattr(sets, name, getattr(ours, name))
        if before and not after:
            raise UserError(
                "Every question of the data is in the evaluation data too, so nothing is left to train on: give other "
                "evaluation data (--eval-data), or none."
            )
        left_out = f"; {before - after:,} training rows with a question of it are left out" * (after < before)
        return f"{' and '.join(each.describe() for each in self.found)}: for evaluation alone{left_out}"


def read_eval_data(
    settings: DataSettings, report: Callable[[str], None], chat_format: ChatFormat | None = None
) -> EvalData:
    """What `settings.eval_source` names; empty where it names nothing. Raises UserError as `read_sources` does."""
    if not settings.eval_sources:
        return EvalData()
    apart = settings.model_copy(update={"source": settings.eval_sources, "limit": 0})
    found = read_sources(apart, report, chat_format)
    if weighted := [each.source for each in found if each.source.weight != 1]:
        raise UserError(f"{weighted[0]}: each row of evaluation data counts once, so leave the weight out.")
    return EvalData(found)
