"""Which run of layers each stage of a pipeline has."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StageCut:
    """One stage's share of a model whose layers are cut into runs: `layers[i]` of them on stage i, in order."""

    stage: int
    layers: tuple[int, ...]

    @property
    def is_first(self) -> bool:
        """It reads tokens: it has the embeddings."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """It has the last norm and the head."""
        return self.stage == len(self.layers) - 1

    @property
    def run(self) -> range:
        """Numbers of its layers in the whole model."""
        first = sum(self.layers[: self.stage])
        return range(first, first + self.layers[self.stage])


def even_runs(layers: int, stages: int) -> tuple[int, ...]:
    """As many layers a stage as can be, the first ones one more: the last one has the head."""
    least, more = divmod(layers, stages)
    return tuple(least + (stage < more) for stage in range(stages))
