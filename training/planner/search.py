"""The search for the best plan: Metropolis chains side by side, restarts, and a last look at every single change.

Deterministic: a number of steps, not of seconds, so that the same seed gives the same plan on any machine.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from inference.errors import UserError
from training.planner.plan import Plan
from training.planner.table import Array, Choices, Column, PlanTable

CHAINS = 512
ROUNDS = 12
STEPS = 300
"""Of every chain in a round."""
KEPT = 10
HOT, COLD = 0.05, 0.001
"""Temperatures at the start and the end of a round: a plan slower by this share is accepted with probability 1/e."""
SECOND_MOVES = 0.3
"""Share of the proposals that change a second call."""
MESH_MOVES = 0.2
"""Share that moves all calls of one mesh, half of them those of a second mesh too."""
PAIRED = 150
"""Meshes of each call that are tried in pairs of changes."""
DISTINCT = 1e-6
"""Kept plans differ in seconds by at least this share; others are the same plan on other ranks."""


@dataclass(frozen=True)
class Found:
    """A plan that fits, its seconds an iteration, and the share of its usable memory that the fullest rank needs."""

    plan: Plan
    seconds: float
    fullness: float


@dataclass(frozen=True)
class Progress:
    """How far the search is."""

    step: int
    steps: int
    best_seconds: float
    """Infinite while no plan fits."""


def search(
    table: PlanTable, seed: int = 0, effort: float = 1.0, progress: Callable[[Progress], bool] | None = None
) -> list[Found]:
    """The best plans, best first, at most ten. `effort` multiplies the steps.

    `progress` is called after every step; where it returns False the search ends with what it has. Raises UserError
    if no plan fits into the devices.
    """
    return _Search(table, seed).run(max(1, round(ROUNDS * effort)), progress)


class _Search:
    def __init__(self, table: PlanTable, seed: int):
        self.table, self.draw = table, np.random.default_rng(seed)
        self.sizes = np.array([len(column.options) for column in table.columns])
        self.fastest = [_fastest_by_mesh(column) for column in table.columns]
        self.kept = Kept(table)

    def run(self, rounds: int, progress: Callable[[Progress], bool] | None) -> list[Found]:
        state = self.start()
        energy = self.energy(state)
        for step in range(rounds * STEPS):
            of_round = step % STEPS
            if of_round == 0 and step:
                state, energy = self.restart(state, energy)
            self.step(state, energy, HOT * (COLD / HOT) ** (of_round / (STEPS - 1)))
            if progress is not None and not progress(Progress(step + 1, rounds * STEPS, self.kept.best_seconds)):
                return self.kept.found()
        self.polish()
        return self.kept.found()

    def start(self) -> Choices:
        """Every chain at the fastest option of each call, but for the half that starts anywhere."""
        fastest = np.array([int(column.seconds.argmin()) for column in self.table.columns])
        state = np.repeat(fastest[:, None], CHAINS, axis=1)
        state[:, ::2] = self.anywhere(CHAINS // 2)
        return state

    def anywhere(self, count: int) -> Choices:
        return np.stack([self.draw.integers(size, size=count) for size in self.sizes])

    def energy(self, choices: Choices) -> Array:
        """What the chains lower: seconds; far above these, the fullness of plans that do not fit. Notes the best."""
        seconds, fullness = self.table.evaluate(choices)
        self.kept.add(choices, seconds, fullness)
        return np.where(fullness <= 1, seconds, 1e9 * fullness)

    def step(self, state: Choices, energy: Array, temperature: float) -> None:
        """One Metropolis step of every chain, in place."""
        proposed = self.propose(state)
        new = self.energy(proposed)
        accepted = np.log(new / energy) < -temperature * np.log(self.draw.random(CHAINS))
        state[:, accepted] = proposed[:, accepted]
        energy[accepted] = new[accepted]

    def propose(self, state: Choices) -> Choices:
        """One call of each chain to another option, in some chains a second one too; in others all calls of a mesh."""
        kinds = self.draw.random(CHAINS)
        result = self.moved(state, np.flatnonzero(kinds > MESH_MOVES))
        result = self.moved(result, np.flatnonzero(kinds > 1 - SECOND_MOVES))
        result = self.remeshed(result, np.flatnonzero(kinds < MESH_MOVES))
        return self.remeshed(result, np.flatnonzero(kinds < MESH_MOVES / 2))

    def moved(self, state: Choices, chains: NDArray[np.int64]) -> Choices:
        """A call of each of `chains` goes to an option on any mesh, on its own mesh, or on that of another call."""
        result, count = state.copy(), len(chains)
        calls = self.draw.integers(len(self.sizes), size=count)
        anchors = np.where(self.draw.random(count) < 0.5, calls, self.draw.integers(len(self.sizes), size=count))
        meshes = self.meshes_of(state)[anchors, chains]
        is_free = self.draw.random(count) < 0.4
        meshes = np.where(is_free, self.draw.integers(len(self.table.has_rank) - 1, size=count), meshes)
        for call in range(len(self.sizes)):
            mine = np.flatnonzero(calls == call)
            result[call, chains[mine]] = self.options_on(call, meshes[mine], state[call, chains[mine]])
        return result

    def remeshed(self, state: Choices, chains: NDArray[np.int64]) -> Choices:
        """All calls on one mesh of each of `chains` go to another mesh."""
        result, count = state.copy(), len(chains)
        meshes = self.meshes_of(state)[:, chains]
        left = meshes[self.draw.integers(len(self.sizes), size=count), np.arange(count)]
        entered = self.draw.integers(len(self.table.has_rank) - 1, size=count)
        for call in range(len(self.sizes)):
            mine = np.flatnonzero(meshes[call] == left)
            result[call, chains[mine]] = self.options_on(call, entered[mine], state[call, chains[mine]])
        return result

    def meshes_of(self, state: Choices) -> Choices:
        return np.stack([column.mesh[options] for column, options in zip(self.table.columns, state, strict=True)])

    def options_on(self, call: int, meshes: NDArray[np.int64], present: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each mesh an option of the call on it: half of them the fastest, half any; `present` where none is."""
        bounds = self.table.columns[call].bounds
        first, last = bounds[meshes], bounds[meshes + 1]
        any_ = first + (self.draw.random(len(meshes)) * (last - first)).astype(np.int64)
        chosen = np.where(self.draw.random(len(meshes)) < 0.5, self.fastest[call][meshes], any_)
        return np.where(first == last, present, chosen)

    def restart(self, state: Choices, energy: Array) -> tuple[Choices, Array]:
        """The better half of the chains goes on; the others begin at the best plans, or anywhere."""
        order = np.argsort(energy, kind="stable")
        state, energy = state[:, order].copy(), energy[order].copy()
        half, quarter = CHAINS // 2, CHAINS // 4
        best = self.kept.choices()
        if best.shape[1]:
            state[:, half : half + quarter] = best[:, np.arange(quarter) % best.shape[1]]
        state[:, half + quarter :] = self.anywhere(CHAINS - half - quarter)
        energy[half:] = self.energy(state)[half:]
        return state, energy

    def polish(self) -> None:
        """Single changes to each plan, and to the best one pairs of changes, until none helps."""
        choices = self.kept.choices()
        for index in range(choices.shape[1]):
            self.descend(choices[:, index])
        if not choices.shape[1]:
            return
        before = float("inf")
        while self.kept.best_seconds < before:
            before = self.kept.best_seconds
            best = self.descend(self.kept.choices()[:, 0])
            candidates = [self.best_by_mesh(best, call) for call in range(len(self.sizes))]
            for one, other in itertools.combinations(range(len(self.sizes)), 2):
                self.energy(_changed(best, {one: candidates[one], other: candidates[other]}))

    def descend(self, choice: NDArray[np.int64]) -> NDArray[np.int64]:
        """The plan that no single change improves, reached by the best change of each call in turn."""
        energy = float(self.energy(choice[:, None])[0])
        improved = True
        while improved:
            improved = False
            for call, size in enumerate(self.sizes):
                changed = _changed(choice, {call: np.arange(size)})
                energies = self.energy(changed)
                best = int(energies.argmin())
                if energies[best] < energy:
                    choice, energy, improved = changed[:, best], float(energies[best]), True
        return choice

    def best_by_mesh(self, choice: NDArray[np.int64], call: int) -> NDArray[np.int64]:
        """Of the options of a call the best on each mesh, as far as these are among the best, in this plan."""
        energies = self.energy(_changed(choice, {call: np.arange(self.sizes[call])}))
        order = np.argsort(energies, kind="stable")
        _, first = np.unique(self.table.columns[call].mesh[order], return_index=True)
        return order[np.sort(first)[:PAIRED]]


def _fastest_by_mesh(column: Column) -> NDArray[np.int64]:
    """(meshes): option numbers; 0 for a mesh without options."""
    pairs = itertools.pairwise(column.bounds)
    return np.array([first + column.seconds[first:last].argmin() if last > first else 0 for first, last in pairs])


def _changed(choice: NDArray[np.int64], options: dict[int, NDArray[np.int64]]) -> Choices:
    """A plan with every combination of these options for some of its calls."""
    combined = np.meshgrid(*options.values(), indexing="ij")
    result = np.repeat(choice[:, None], combined[0].size, axis=1)
    for call, values in zip(options, combined, strict=True):
        result[call] = values.ravel()
    return result


class Kept:
    """The best plans met so far."""

    def __init__(self, table: PlanTable):
        self.table = table
        self.plans: list[tuple[float, float, NDArray[np.int64]]] = []

    @property
    def best_seconds(self) -> float:
        return self.plans[0][0] if self.plans else float("inf")

    def add(self, choices: Choices, seconds: Array, fullness: Array) -> None:
        bound = self.plans[-1][0] if len(self.plans) == KEPT else np.inf
        better = np.flatnonzero((fullness <= 1) & (seconds < bound * (1 - DISTINCT)))
        for index in better[np.argsort(seconds[better], kind="stable")][: 4 * KEPT]:
            value = float(seconds[index])
            if all(abs(value - kept) > DISTINCT * kept for kept, *_ in self.plans):
                self.plans.append((value, float(fullness[index]), choices[:, index].copy()))
        self.plans = sorted(self.plans, key=lambda plan: plan[0])[:KEPT]

    def choices(self) -> Choices:
        """(calls, kept plans)"""
        if not self.plans:
            return np.zeros((len(self.table.columns), 0), dtype=np.int64)
        return np.stack([choice for *_, choice in self.plans], axis=1)

    def found(self) -> list[Found]:
        if not self.plans:
            cluster = self.table.cluster
            raise UserError(
                f"No plan fits into {cluster.nodes} x {cluster.devices_per_node} {cluster.device.name}; "
                f"take more or larger devices, smaller models or fewer samples."
            )
        return [Found(self.table.plan(choice), seconds, fullness) for seconds, fullness, choice in self.plans]
