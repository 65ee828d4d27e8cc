"""The weights of a training engine as a plain module that can generate."""

from torch import nn

from inference.tensor_parallel.group import TensorParallel
from training.hybrid_engine.reallocation import Moved, Reallocation
from training.hybrid_engine.zero_engine import ZeroEngine


class GenerationView:
    """Under ZeRO 0-2 with tensor-parallel degree 1 the training module itself; otherwise a copy of this rank's part."""

    def __init__(self, engine: ZeroEngine, tensor_parallel: TensorParallel | None = None):
        """`tensor_parallel` is this rank's part (`reallocation.tensor_parallel_of`); by default the whole model."""
        whole = TensorParallel()
        self.reallocation = Reallocation(engine.language_model, tensor_parallel or whole, engine.ranks.device)

    @property
    def moved(self) -> Moved:
        """What the last refresh cost."""
        return self.reallocation.moved

    def refresh(self) -> nn.Module:
        """The language model with the engine's present weights. All ranks call it."""
        return self.reallocation.run()
