"""The very best plan of a small space: branch and bound over all plans, none left out unseen.

Calls are decided one after another. A partial plan is dropped if even its bound, with every undecided call as fast as
can be and in nobody's way, is no better than a plan that is known; or if all ranks together could not do its work in
that time.
"""

import numpy as np

from inference.errors import UserError
from training.planner.search import PlanResult
from training.planner.table import UNDECIDED, Array, Choices, PlanTable

MOST_PARTIAL_PLANS = 20_000_000
CHUNK = 50_000
MARGIN = 1e-9
"""Plans faster by less than this share count as equally good."""


def best_plan(table: PlanTable, known: PlanResult) -> PlanResult:
    """The optimum: `known`, the better the faster, or what beats it. Raises UserError if the space is too large."""
    areas = [_areas(table, call) for call in range(len(table.columns))]
    partial = np.full((len(table.columns), 1), UNDECIDED)
    bound = known.seconds * (1 - MARGIN)
    for call in np.argsort([-area[UNDECIDED] for area in areas], kind="stable"):
        partial = _decided(table, partial, int(call), areas, bound)
    seconds, fullness = table.evaluate(partial)
    if not len(seconds):
        return known
    best = int(seconds.argmin())
    return PlanResult(table.plan(partial[:, best]), float(seconds[best]), float(fullness[best]))


def _decided(table: PlanTable, partial: Choices, call: int, areas: list[Array], bound: float) -> Choices:
    """Every partial plan with every option of one more call, as far as they can still be the best."""
    options = _different_options(table, call, is_first=bool((partial == UNDECIDED).all()))
    kept: list[Choices] = [partial[:, :0]]
    count, step = 0, max(1, CHUNK // len(options))
    for first in range(0, partial.shape[1], step):
        plans = np.repeat(partial[:, first : first + step], len(options), axis=1)
        plans[call] = np.tile(options, plans.shape[1] // len(options))
        work = np.sum([area[plans[i]] for i, area in enumerate(areas)], axis=0) / table.cluster.size
        plans = plans[:, work + table.controller_seconds < bound]
        seconds, fullness = table.evaluate(plans)
        kept.append(plans[:, (seconds < bound) & (fullness <= 1)])
        count += kept[-1].shape[1]
        if count > MOST_PARTIAL_PLANS:
            raise UserError(f"More than {MOST_PARTIAL_PLANS} plans would have to be compared; use the search instead.")
    return np.concatenate(kept, axis=1)


def _different_options(table: PlanTable, call: int, is_first: bool) -> Choices:
    """All; but of meshes in one node that are alike while nothing else is decided, only the first."""
    column = table.columns[call]
    options = np.arange(len(column.options))
    if not is_first or table.cluster.nodes > 1:
        return options
    return np.array([i for i in options if column.options[i].assignment.layout.mesh[0] == 0])


def _areas(table: PlanTable, call: int) -> Array:
    """Rank-seconds of each option: (options + 1)."""
    column = table.columns[call]
    areas = column.seconds * table.has_rank[column.mesh].sum(axis=1)
    areas[UNDECIDED] = areas[:UNDECIDED].min()
    return areas
