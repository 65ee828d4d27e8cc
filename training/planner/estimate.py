"""All that is known about a plan before it runs: its schedule, seconds by call, and memory by rank."""

from dataclasses import dataclass

from training.memory import StepMemory
from training.plan import Plan
from training.plan_checks import require_valid
from training.planner.augmented import AugmentedGraphs, Node
from training.planner.footprint import Footprints
from training.planner.simulate import Schedule, list_schedule


@dataclass(frozen=True)
class Estimate:
    """Of one plan."""

    plan: Plan
    nodes: tuple[Node, ...]
    """Of the augmented graph; a call's carry their cost part by part."""
    schedule: Schedule
    controller_seconds: float
    """Of an iteration, in which no device works."""
    memory: dict[int, StepMemory]
    """By rank."""

    @property
    def iteration_seconds(self) -> float:
        return self.schedule.iteration_seconds + self.controller_seconds

    @property
    def peak_bytes(self) -> int:
        """On the fullest device."""
        return max(memory.peak("device") for memory in self.memory.values())


def estimate(plan: Plan, graphs: AugmentedGraphs) -> Estimate:
    """Raises UserError where the plan cannot run. Whether it fits is for `Footprints.require_fit` to say."""
    workload = graphs.costs.workload
    require_valid(plan, graphs.graph, workload, graphs.costs.cluster.size)
    nodes = graphs.nodes(plan)
    memory = Footprints(workload, graphs.graph).by_rank(plan)
    return Estimate(plan, nodes, list_schedule(nodes), graphs.controller_seconds, memory)
