"""Where this rank stands in the calls of a plan."""

from collections.abc import Sequence
from dataclasses import dataclass

from inference.tensor_parallel.group import TensorParallel
from training.data.batching import MicroBatch, deal_micro_batches, plan_micro_batches
from training.distributed import Ranks
from training.hybrid_engine.reallocation import tensor_parallel_of
from training.plan import Assignment, Plan


@dataclass(frozen=True)
class CallPlace:
    """This rank's in a call that it takes part in."""

    assignment: Assignment
    ranks: Ranks
    """Those of the call."""
    tensor_parallel: TensorParallel
    data_rank: int

    @property
    def speaks(self) -> bool:
        """One rank of a tensor-parallel group says what all of it have found."""
        return self.tensor_parallel.rank == 0

    def micro_batches(self, lengths: Sequence[int]) -> list[MicroBatch]:
        """This rank's share of rows of these lengths, in tokens; ranks of a tensor-parallel group have the same."""
        data, limit = self.assignment.layout.data, self.assignment.micro_batch_limit
        if limit:
            return plan_micro_batches(lengths, limit, data)[self.data_rank]
        return deal_micro_batches(lengths, self.assignment.micro_batches, data)[self.data_rank]


class CallPlaces:
    """All of them, by the names of the calls. All ranks make it, since it makes process groups."""

    def __init__(self, plan: Plan, ranks: Ranks):
        self.plan = plan
        layouts = [assignment.layout for assignment in plan.assignments.values()]
        meshes = {mesh: ranks.part(mesh) for mesh in dict.fromkeys(layout.mesh for layout in layouts)}
        cut = {(layout.mesh, layout.tensor): layout for layout in layouts if layout.tensor > 1}
        groups = {place: tensor_parallel_of(layout) for place, layout in cut.items()}
        self._places: dict[str, CallPlace] = {}
        for name, assignment in plan.assignments.items():
            layout = assignment.layout
            members, part = meshes[layout.mesh], groups.get((layout.mesh, layout.tensor), TensorParallel())
            if members is not None and part is not None:
                self._places[name] = CallPlace(assignment, members, part, layout.data_rank(ranks.rank))

    def __getitem__(self, call: str) -> CallPlace:
        """For a call that this rank takes part in."""
        return self._places[call]

    def __contains__(self, call: str) -> bool:
        return call in self._places

    def get(self, call: str) -> CallPlace | None:
        return self._places.get(call)
