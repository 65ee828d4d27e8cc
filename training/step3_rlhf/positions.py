"""This rank's positions in the calls of a plan."""

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
class CallPosition:
    """Says where this rank stands in a call that it takes part in, and with which ranks."""

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
        """Whether this rank says what came out, for those that compute the same samples: the first of the last stage
        does."""
        return self.tensor_parallel.rank == 0 and (self.cut is None or self.cut.is_last)

    def micro_batches(self, lengths: Sequence[int]) -> list[MicroBatch]:
        """Return this rank's share of rows of these lengths, in tokens; the ranks that share a model have the same."""
        data, limit = self.assignment.layout.data, self.assignment.micro_batch_limit
        if limit:
            return plan_micro_batches(lengths, limit, data)[self.data_rank]
        return deal_micro_batches(lengths, self.assignment.micro_batches, data)[self.data_rank]


def call_positions(
    plan: Plan, ranks: Ranks, layers: Mapping[str, int] = MappingProxyType({})
) -> dict[str, CallPosition]:
    """Return the positions of this rank by the names of the calls that it takes part in.

    `layers` are those of the models by role; only roles whose calls have stages need them. All ranks call it, since it
    makes process groups.
    """
    layouts = [assignment.layout for assignment in plan.assignments.values()]
    meshes: list[tuple[int, ...]] = []
    for layout in layouts:
        meshes.append(layout.mesh)
        if layout.pipeline > 1:
            meshes += layout.stage_meshes + layout.pipeline_groups
    parts = {mesh: ranks.part(mesh) for mesh in dict.fromkeys(tuple(sorted(mesh)) for mesh in meshes)}
    tensor_layouts = {(layout.mesh, layout.tensor): layout for layout in layouts if layout.tensor > 1}
    groups = {key: tensor_parallel_of(layout) for key, layout in tensor_layouts.items()}
    positions: dict[str, CallPosition] = {}
    for name, assignment in plan.assignments.items():
        layout, rank = assignment.layout, ranks.rank
        members = parts[tuple(sorted(layout.mesh))]
        tensor_parallel = groups.get((layout.mesh, layout.tensor), TensorParallel())
        if members is None or tensor_parallel is None:
            continue
        stage_ranks = parts[tuple(sorted(layout.stage_meshes[layout.pipeline_rank(rank)]))]
        assert stage_ranks is not None
        cut = pipeline = None
        if layout.pipeline > 1:
            cut = layout.stage_cut(rank, layers[role_of(name)])
            pipeline = parts[tuple(sorted(layout.pipeline_group(rank)))]
        positions[name] = CallPosition(
            assignment, members, tensor_parallel, layout.data_rank(rank), stage_ranks, cut, pipeline
        )
    return positions
