"""Where a rank stands among the instances that generate."""

from dataclasses import dataclass

from training.hybrid_engine.layout import Layout


@dataclass(frozen=True)
class Place:
    """Where this rank stands: the `tensor_rank`-th of the ranks of `instance`."""

    rank: int
    layout: Layout

    @property
    def takes_part(self) -> bool:
        """Whether this rank generates; what follows is for those that do."""
        return self.rank in self.layout.mesh

    @property
    def instance(self) -> int:
        return self.layout.data_rank(self.rank)

    @property
    def tensor_rank(self) -> int:
        return self.layout.tensor_rank(self.rank)

    @property
    def speaks(self) -> bool:
        """One rank of an instance writes what all of its ranks know."""
        return self.takes_part and self.tensor_rank == 0

    def peer(self, instance: int) -> int:
        """The rank that holds the same part of the model in another instance."""
        return self.layout.tensor_groups[instance][self.tensor_rank]

    def speaker(self, instance: int) -> int:
        """The rank that speaks for an instance."""
        return self.layout.tensor_groups[instance][0]
