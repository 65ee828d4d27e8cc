"""Weights of sources: how often the rows of each are trained on."""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence

from training.data.rows import Row, RowSets


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
    """As many copies as the whole part of the weight says, and a random share for the rest; at least one row."""
    whole = int(weight)
    share = min(len(rows), round((weight - whole) * len(rows)))
    return rows * whole + random.Random(salt).sample(rows, share if whole else max(share, 1))
