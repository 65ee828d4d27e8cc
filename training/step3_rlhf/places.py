"""Where this rank stands in the calls of a plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from inference.tensor_parallel.shard import TensorParallel
from training.calls import role_of
from training.data.batching import MicroBatch, deal_micro_batches, plan_micro_batches
from training.distributed import Ranks
from training.hybrid_engine.layout import StageCut
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
    stage_ranks: Ranks
    """Those that hold the same layers: all of the call where it has no stages."""
    cut: StageCut | None = None
    """This rank's layers; None for all."""
    pipeline: Ranks | None = None
    """Those that have the stages of this one's model; None without stages."""

    @property
    def speaks(self) -> bool:
        """One rank of those that compute the same samples says what came out: the first one of the last stage."""
        return self.tensor_parallel.rank == 0 and (self.cut is None or self.cut.is_last)

    def micro_batches(self, lengths: Sequence[int]) -> list[MicroBatch]:
        """This rank's share of rows of these lengths, in tokens; the ranks that share a model have the same."""
        data, limit = self.assignment.layout.data, self.assignment.micro_batch_limit
        if limit:
            return plan_micro_batches(lengths, limit, data)[self.data_rank]
        return deal_micro_batches(lengths, self.assignment.micro_batches, data)[self.data_rank]


class CallPlaces:
    """All of them, by the names of the calls. All ranks make it, since it makes process groups.

    `layers` are those of the models by role; of roles whose calls have no stages they are not asked.
    """

    def __init__(self, plan: Plan, ranks: Ranks, layers: Mapping[str, int] = MappingProxyType({})):
        self.plan = plan
        layouts = [assignment.layout for assignment in plan.assignments.values()]
        groups_of = [(each.mesh, *(each.stage_meshes + each.pipeline_groups) * (each.pipeline > 1)) for each in layouts]
        meshes = dict.fromkeys(tuple(sorted(mesh)) for groups in groups_of for mesh in groups)
        parts = {mesh: ranks.part(mesh) for mesh in meshes}
        cut = {(layout.mesh, layout.tensor): layout for layout in layouts if layout.tensor > 1}
        groups = {place: tensor_parallel_of(layout) for place, layout in cut.items()}
        self._places: dict[str, CallPlace] = {}
        for name, assignment in plan.assignments.items():
            layout, rank = assignment.layout, ranks.rank
            members, part = (
                parts[tuple(sorted(layout.mesh))],
                groups.get((layout.mesh, layout.tensor), TensorParallel()),
            )
            if members is None or part is None:
                continue
            stage = parts[tuple(sorted(layout.stage_meshes[layout.pipeline_rank(rank)]))]
            assert stage is not None
            share = pipeline = None
            if layout.pipeline > 1:
                share = layout.stage_cut(rank, layers[role_of(name)])
                pipeline = parts[tuple(sorted(layout.pipeline_group(rank)))]
            data_rank = layout.data_rank(rank)
            self._places[name] = CallPlace(assignment, members, part, data_rank, stage, share, pipeline)

    def __getitem__(self, call: str) -> CallPlace:
        """For a call that this rank takes part in."""
        return self._places[call]

    def __contains__(self, call: str) -> bool:
        return call in self._places

    def get(self, call: str) -> CallPlace | None:
        return self._places.get(call)
