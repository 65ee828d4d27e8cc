"""The search for the best plan: Metropolis chains side by side, restarts, and a last look at every single change.

Deterministic: a number of steps, not of seconds, so that the same seed gives the same plan on any machine.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from inference.errors import UserError
from training.calls import DataflowGraph
from training.hybrid_engine.layout import Layout
from training.memory import StepMemory
from training.plan import Assignment, Plan
from training.plan_checks import require_valid
from training.planner.footprint import Footprints
from training.planner.hardware import Cluster
from training.planner.reallocation_cost import AugmentedGraphs, Node
from training.planner.table import Array, Choices, IterationSchedule, PlanTable, list_schedule
from training.planner.workload import Workload

CHAINS = 512
ROUNDS = 12
STEPS = 300
"""Steps of every chain in a round."""
MOST_RESULTS = 10
HOT, COLD = 0.05, 0.001
"""Temperatures at the start and the end of a round: a plan slower by this share is accepted with probability 1/e."""
SECOND_MOVES = 0.3
"""Share of the proposals that change a second call."""
DISTINCT = 1e-6
"""Results differ in seconds by at least this share; others are the same plan on other ranks."""


@dataclass(frozen=True)
class PlanResult:
    """Gives a plan that fits, its seconds an iteration, and the share of its usable memory that the fullest rank
    needs."""

    plan: Plan
    seconds: float
    fullness: float


@dataclass(frozen=True)
class Progress:
    step: int
    steps: int
    best_seconds: float
    """Infinite while no plan fits."""


def search(
    table: PlanTable, seed: int = 0, effort: float = 1.0, progress: Callable[[Progress], bool] | None = None
) -> list[PlanResult]:
    """Return the best plans, best first, at most ten. `effort` multiplies the steps.

    `progress` is called after every step; where it returns False the search ends with what it has. Raises UserError
    if no plan fits into the devices.
    """
    return _PlanSearch(table, seed).run(max(1, round(ROUNDS * effort)), progress)


class _PlanSearch:
    """Runs the chains of one search."""

    def __init__(self, table: PlanTable, seed: int):
        self.table, self.draw = table, np.random.default_rng(seed)
        self.sizes = np.array([len(column.options) for column in table.columns])
        self.best = BestPlans(table)

    def run(self, rounds: int, progress: Callable[[Progress], bool] | None) -> list[PlanResult]:
        state = self.start()
        energy = self.energy(state)
        for step in range(rounds * STEPS):
            of_round = step % STEPS
            if of_round == 0 and step:
                state, energy = self.restart(state, energy)
            self.step(state, energy, HOT * (COLD / HOT) ** (of_round / (STEPS - 1)))
            if progress is not None and not progress(Progress(step + 1, rounds * STEPS, self.best.best_seconds)):
                return self.best.results()
        self.polish()
        return self.best.results()

    def start(self) -> Choices:
        """Start chains at the fastest option of each call, but for half of them, which start anywhere."""
        fastest = np.array([int(column.seconds.argmin()) for column in self.table.columns])
        state = np.repeat(fastest[:, None], CHAINS, axis=1)
        state[:, ::2] = self.anywhere(CHAINS // 2)
        return state

    def anywhere(self, count: int) -> Choices:
        return np.stack([self.draw.integers(size, size=count) for size in self.sizes])

    def energy(self, choices: Choices) -> Array:
        """Return what chains lower: seconds; far above these, the fullness of plans that do not fit. Notes the best."""
        seconds, fullness = self.table.evaluate(choices)
        self.best.add(choices, seconds, fullness)
        return np.where(fullness <= 1, seconds, 1e9 * fullness)

    def step(self, state: Choices, energy: Array, temperature: float) -> None:
        """Make one Metropolis step of every chain, in place."""
        proposed = self.propose(state)
        new = self.energy(proposed)
        accepted = np.log(new / energy) < -temperature * np.log(self.draw.random(CHAINS))
        state[:, accepted] = proposed[:, accepted]
        energy[accepted] = new[accepted]

    def propose(self, state: Choices) -> Choices:
        """Move one call of each chain to another option, in some chains a second one too."""
        result = self.moved(state, np.arange(CHAINS))
        return self.moved(result, np.flatnonzero(self.draw.random(CHAINS) < SECOND_MOVES))

    def moved(self, state: Choices, chains: NDArray[np.int64]) -> Choices:
        """Move a call of each of `chains` to any option, or to one on its own mesh or on that of another call."""
        result, count = state.copy(), len(chains)
        calls = self.draw.integers(len(self.sizes), size=count)
        anchors = np.where(self.draw.random(count) < 0.5, calls, self.draw.integers(len(self.sizes), size=count))
        is_free, fraction = self.draw.random(count) < 0.4, self.draw.random(count)
        meshes = np.stack([column.mesh[state[i, chains]] for i, column in enumerate(self.table.columns)])
        anchored = meshes[anchors, np.arange(count)]
        for call, column in enumerate(self.table.columns):
            mine = np.flatnonzero(calls == call)
            first, last = column.bounds[anchored[mine]], column.bounds[anchored[mine] + 1]
            anywhere = is_free[mine] | (first == last)
            first, last = np.where(anywhere, 0, first), np.where(anywhere, self.sizes[call], last)
            result[call, chains[mine]] = first + (fraction[mine] * (last - first)).astype(np.int64)
        return result

    def restart(self, state: Choices, energy: Array) -> tuple[Choices, Array]:
        """Let the better half of the chains go on; the others begin at the best plans, or anywhere."""
        order = np.argsort(energy, kind="stable")
        state, energy = state[:, order].copy(), energy[order].copy()
        half, quarter = CHAINS // 2, CHAINS // 4
        best = self.best.choices()
        if best.shape[1]:
            state[:, half : half + quarter] = best[:, np.arange(quarter) % best.shape[1]]
        state[:, half + quarter :] = self.anywhere(CHAINS - half - quarter)
        energy[half:] = self.energy(state)[half:]
        return state, energy

    def polish(self) -> None:
        """Try every single change to each of the best plans."""
        for choice in self.best.choices().T:
            self.descend(choice)

    def descend(self, choice: NDArray[np.int64]) -> None:
        """Make the best change of each call in turn, until none helps."""
        energy = float(self.energy(choice[:, None])[0])
        improved = True
        while improved:
            improved = False
            for call, size in enumerate(self.sizes):
                changed = np.repeat(choice[:, None], size, axis=1)
                changed[call] = np.arange(size)
                energies = self.energy(changed)
                best = int(energies.argmin())
                if energies[best] < energy:
                    choice, energy, improved = changed[:, best], float(energies[best]), True


class BestPlans:
    """Holds the best plans so far, which differ in seconds, best first."""

    def __init__(self, table: PlanTable):
        self.table = table
        self.plans: list[tuple[float, float, NDArray[np.int64]]] = []

    @property
    def best_seconds(self) -> float:
        return self.plans[0][0] if self.plans else float("inf")

    def add(self, choices: Choices, seconds: Array, fullness: Array) -> None:
        bound = self.plans[-1][0] if len(self.plans) == MOST_RESULTS else np.inf
        better = np.flatnonzero((fullness <= 1) & (seconds < bound * (1 - DISTINCT)))
        for index in better[np.argsort(seconds[better], kind="stable")][: 4 * MOST_RESULTS]:
            value = float(seconds[index])
            if all(abs(value - known) > DISTINCT * known for known, *_ in self.plans):
                self.plans.append((value, float(fullness[index]), choices[:, index].copy()))
        self.plans = sorted(self.plans, key=lambda plan: plan[0])[:MOST_RESULTS]

    def choices(self) -> Choices:
        if not self.plans:
            return np.zeros((len(self.table.columns), 0), dtype=np.int64)
        return np.stack([choice for *_, choice in self.plans], axis=1)

    def results(self) -> list[PlanResult]:
        if not self.plans:
            cluster = self.table.cluster
            raise UserError(
                f"No plan fits into {cluster.nodes} x {cluster.devices_per_node} {cluster.device.name}; "
                f"take more or larger devices, smaller models or fewer samples."
            )
        return [PlanResult(self.table.plan(choice), seconds, fullness) for seconds, fullness, choice in self.plans]


def megatron_plan(graph: DataflowGraph, cluster: Cluster) -> Plan:
    """Run every call on the whole cluster: tensor-parallel in a node, a pipeline over nodes, frozen roles offloaded.

    ReaLHF's baseline ("heuristic"): 2 x stages micro-batches in training, else one a stage.
    """
    tensor, stages = cluster.devices_per_node, cluster.nodes
    layout = Layout(tuple(range(cluster.size)), 1, tensor, stages)
    assignments = {}
    for call in graph.calls:
        micro_batches = 2 * stages if call.kind == "train" and stages > 1 else stages
        is_frozen = graph.training_call(call.role) is None
        assignments[call.name] = Assignment(layout, micro_batches, offload=is_frozen)
    return Plan(assignments)


def deepspeed_chat_plan(graph: DataflowGraph, workload: Workload, cluster: Cluster) -> Plan:
    """Run every call on all ranks, weights divided by ZeRO 3, generation tensor-parallel in the smallest groups that
    fit.

    Micro-batches are as large as memory allows. Raises UserError where no such plan fits.
    """
    if workload.mini_batch_samples < cluster.size:
        raise UserError(
            f"An optimiser step of {workload.mini_batch_samples} samples leaves some of {cluster.size} ranks idle; "
            f"take fewer mini-batches or more samples."
        )
    divided = Layout.over(cluster.size, zero_stage=3)
    for tensor in range(1, cluster.devices_per_node + 1):
        if cluster.devices_per_node % tensor == 0:
            generation = Layout.over(cluster.size, tensor)
            layouts = {call.name: generation if call.kind == "generate" else divided for call in graph.calls}
            smallest = Plan({name: Assignment(layout) for name, layout in layouts.items()})
            plan = _with_largest_micro_batches(smallest, graph, workload, cluster)
            if plan is not None:
                return plan
    raise UserError(
        f"No plan in which all {cluster.size} ranks run every call fits into {cluster.device.name}; "
        f"take more or larger devices, or plan with a search."
    )


def _with_largest_micro_batches(plan: Plan, graph: DataflowGraph, workload: Workload, cluster: Cluster) -> Plan | None:
    """Return None where a call does not fit even sample by sample, or leaves ranks without a sample."""
    footprints = Footprints(workload, graph)
    held = max(memory.held("device") for memory in footprints.by_rank(plan).values())
    chosen = {}
    for call in graph.calls:
        layout, has_own = plan[call.name].layout, footprints.has_own_weights(call, plan)
        for micro_batches in range(1, workload.rows(call.kind) // layout.data + 1):
            assignment = Assignment(layout, micro_batches)
            parts = footprints.parts(call, assignment, has_own)
            working = sum(part.bytes for part in parts if part.phase and part.location == "device")
            if held + working <= cluster.usable_memory:
                chosen[call.name] = assignment
                break
        else:
            return None
    return Plan(chosen)


@dataclass(frozen=True)
class Estimate:
    plan: Plan
    nodes: tuple[Node, ...]
    """Those of the augmented graph; calls have their cost part by part."""
    schedule: IterationSchedule
    controller_seconds: float
    """Seconds of an iteration in which no device works."""
    memory: dict[int, StepMemory]
    """The memory of each rank."""

    @property
    def iteration_seconds(self) -> float:
        return self.schedule.iteration_seconds + self.controller_seconds

    @property
    def peak_bytes(self) -> int:
        return max(memory.peak("device") for memory in self.memory.values())


def estimate(plan: Plan, graphs: AugmentedGraphs) -> Estimate:
    """Estimate a plan. Raises UserError where it cannot run; `Footprints.require_fit` says whether it fits."""
    workload = graphs.costs.workload
    require_valid(plan, graphs.graph, workload, graphs.costs.cluster.size)
    nodes = graphs.nodes(plan)
    memory = Footprints(workload, graphs.graph).by_rank(plan)
    return Estimate(plan, nodes, list_schedule(nodes), graphs.controller_seconds, memory)
