"""Layouts: how one role's weights lie on the ranks."""

import math
from dataclasses import dataclass

from inference.errors import UserError
from training.launchers import processes_option


@dataclass(frozen=True)
class StageCut:
    """Describes one stage's share of a model whose layers are cut into runs: `layers[i]` on stage i, in order."""

    stage: int
    layers: tuple[int, ...]

    @property
    def is_first(self) -> bool:
        """Whether it has the embeddings, and so reads tokens."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the last norm and the head."""
        return self.stage == len(self.layers) - 1

    @property
    def run(self) -> range:
        """Numbers of its layers in the whole model."""
        first = sum(self.layers[: self.stage])
        return range(first, first + self.layers[self.stage])


def even_runs(layers: int, stages: int) -> tuple[int, ...]:
    """Cut layers as evenly as possible; the first stages have one more, since the last one has the head."""
    least, more = divmod(layers, stages)
    return tuple(least + (stage < more) for stage in range(stages))


@dataclass(frozen=True)
class Layout:
    """Lays out `data` copies of a model, each cut into `pipeline` runs of layers and each layer into `tensor` parts.

    `mesh` holds global rank numbers. Tensor-parallel ranks are neighbours in it (they talk most), then come the data
    ranks, then the pipeline stages. By `zero_stage` data ranks divide optimiser states (1), gradients (2), weights (3).
    `layers` are the numbers of layers of the stages; none: as even as can be.
    """

    mesh: tuple[int, ...]
    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    zero_stage: int = 0
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        degrees = (self.data, self.tensor, self.pipeline)
        if min(degrees) < 1 or math.prod(degrees) != len(self.mesh):
            raise UserError(
                f"A layout of data {self.data} x tensor {self.tensor} x pipeline {self.pipeline} does not fill "
                f"{len(self.mesh)} ranks; choose degrees whose product is {len(self.mesh)}."
            )
        if len(set(self.mesh)) < len(self.mesh):
            raise UserError(f"The mesh {list(self.mesh)} names a rank twice; name each rank once.")
        if self.zero_stage not in range(4):
            raise UserError(f"There is no ZeRO stage {self.zero_stage}; choose 0, 1, 2 or 3.")
        if self.layers and (len(self.layers) != self.pipeline or min(self.layers) < 1):
            raise UserError(
                f"Stages of {list(self.layers)} layers are not {self.pipeline} stages; give each of them 1 or more."
            )

    @classmethod
    def over(
        cls, size: int, tensor: int = 1, zero_stage: int = 0, setting: str = "rlhf.generation_tensor_parallel"
    ) -> "Layout":
        """Return ranks 0 .. size - 1, tensor-parallel in groups of `tensor`, the value of `setting`. Raises UserError
        if `size` is no multiple of it."""
        if tensor < 1 or size % tensor:
            *most, last = [str(degree) for degree in range(1, size + 1) if size % degree == 0]
            fitting = f"{', '.join(most)} or {last}" if most else last
            more = -(-size // max(1, tensor)) * max(1, tensor)
            raise UserError(
                f"{setting}={tensor}: a tensor-parallel degree of {tensor} does not divide {size} "
                f"process{'es' * (size > 1)}: take a degree of {fitting}, or {processes_option(more)}."
            )
        return cls(tuple(range(size)), size // tensor, tensor, zero_stage=zero_stage)

    @property
    def is_whole(self) -> bool:
        return self.tensor == self.pipeline == 1 and self.zero_stage < 3

    def runs(self, layers: int) -> tuple[int, ...]:
        return self.layers or even_runs(layers, self.pipeline)

    @property
    def uneven_layers(self) -> tuple[int, ...]:
        """`layers`, or none where they are the even ones: equal for equal stages, however these were given."""
        return () if self.layers == even_runs(sum(self.layers), self.pipeline) else self.layers

    def stage_cut(self, rank: int, layers: int) -> StageCut:
        return StageCut(self.pipeline_rank(rank), self.runs(layers))

    def tensor_rank(self, rank: int) -> int:
        return self.mesh.index(rank) % self.tensor

    def data_rank(self, rank: int) -> int:
        return self.mesh.index(rank) // self.tensor % self.data

    def pipeline_rank(self, rank: int) -> int:
        return self.mesh.index(rank) // (self.tensor * self.data)

    def tensor_group(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that hold the parts of one model with `rank`, in the order of their parts."""
        return next(group for group in self.tensor_groups if rank in group)

    def data_group(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that hold the same part as `rank`, in the order of their data ranks."""
        return next(group for group in self.data_groups if rank in group)

    def pipeline_group(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that hold the stages of one model with `rank`, in the order of the stages."""
        return next(group for group in self.pipeline_groups if rank in group)

    @property
    def pipeline_groups(self) -> tuple[tuple[int, ...], ...]:
        """All of them, in an order that is the same on every rank."""
        stage = self.tensor * self.data
        return tuple(self.mesh[start::stage] for start in range(stage))

    @property
    def stage_meshes(self) -> tuple[tuple[int, ...], ...]:
        stage = self.tensor * self.data
        return tuple(self.mesh[start : start + stage] for start in range(0, len(self.mesh), stage))

    @property
    def tensor_groups(self) -> tuple[tuple[int, ...], ...]:
        """All of them, in an order that is the same on every rank."""
        return tuple(self.mesh[start : start + self.tensor] for start in range(0, len(self.mesh), self.tensor))

    @property
    def data_groups(self) -> tuple[tuple[int, ...], ...]:
        return tuple(stage[part :: self.tensor] for stage in self.stage_meshes for part in range(self.tensor))
