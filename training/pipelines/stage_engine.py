"""A role whose layers are cut into pipeline stages: the engine of this rank's stage, and its work in an executor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from inference.errors import UserError
from training.data.batching import TokenBatch
from training.deepspeed_config import effective_zero_stage
from training.distributed import Ranks
from training.hybrid_engine.layout import StageCut
from training.hybrid_engine.zero_engine import ZeroEngine, norm_of
from training.merging import merge
from training.models.policy import Policy, Scorer, hidden_shape
from training.pipelines.stage_model import tied_table
from training.private_surfaces import reduced_gradients, summed_gradient
from training.role_settings import OptimizerSettings


@dataclass(frozen=True)
class Pass:
    """Says what a micro-batch is, and what its loss is, on its way through a role's model and back."""

    batch: Callable[[], TokenBatch]
    loss: Callable[[Any, TokenBatch], Tensor]
    """Outputs of the model, or of its last stage, and the batch -> the micro-batch's share of the total loss."""
    weight: float = 1.0
    """0 for a micro-batch that only keeps a rank in step."""
    more: tuple[Any, ...] = ()
    """Arguments of the model after the batch."""

    def of_whole(self, model: Callable[..., Any]) -> Tensor:
        batch = self.batch()
        return self.loss(model(batch, *self.more), batch)


class StageEngine(ZeroEngine):
    """Trains one stage of a role in step with those of the other stages, whose gradients have one norm together.

    `ranks` are those that have this stage; `pipeline` are those that have a micro-batch of this rank one after the
    other, each its own data rank's. The passes of an optimiser step go through `work`, then all stages call `step`.

    A table that embeddings and head share is trained on the first stage. The last one sends it the gradient of its
    copy before a step, and gets the new table after it.
    """

    def __init__(
        self,
        model: Policy | Scorer,
        settings: OptimizerSettings,
        dtype: torch.dtype,
        total_steps: int,
        ranks: Ranks,
        pipeline: Ranks,
        cut: StageCut,
    ):
        assert len(cut.layers) > 1
        self.pipeline, self.cut = pipeline, cut
        positions = pipeline.gather((cut.stage, ranks.rank), "loading the models")
        self.stages = [stage for stage, _ in positions]
        """The stages of the pipeline's ranks."""
        if len({data_rank for _, data_rank in positions}) > 1:
            raise UserError(
                f"A pipeline goes through ranks {list(pipeline.mesh)}, which come in other places among those of their "
                f"stages: list the ranks of each stage of the mesh in ascending order."
            )
        self.limit = settings.gradient_clipping
        assert effective_zero_stage(settings, dtype) < 2, "gradients are summed on each rank before a step"
        whole = {"zero_optimization": {"overlap_comm": False}}  # all are reduced at once
        changes = {"gradient_clipping": 0.0, "deepspeed": merge(settings.deepspeed, whole)}  # clipped over all stages
        settings = settings.model_copy(update=changes)
        table = tied_table(model.model)
        trained = table if table is not None and table.requires_grad else None
        self.table = trained if cut.is_first else None
        self.copy = trained if cut.is_last else None
        """The copy of the first stage's table; it has gradients during the passes of a step alone."""
        self.copy_gradient: Tensor | None = None
        """The gradient of the copy, summed over micro-batches in fp32."""
        if self.copy is not None:
            self.copy.requires_grad_(False)
        super().__init__(model, settings, dtype, total_steps, ranks)

    def work(self, passes: Sequence[Pass]) -> "TrainingWork":
        """Return this stage's forward and backward passes before the next step."""
        if self.in_training_mode:
            self.engine.train()
        self.engine.set_gradient_accumulation_boundary(False)
        if self.copy is not None:
            self.copy.requires_grad_()
            self.copy_gradient = torch.zeros_like(self.copy, dtype=torch.float32)
        return TrainingWork(self, passes)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to those of this stage."""
        with self.ranks.as_world():
            self.engine.backward(loss)
        if self.copy is not None:
            assert self.copy_gradient is not None and self.copy.grad is not None
            self.copy_gradient += self.copy.grad
            self.copy.grad = None

    def step(self) -> dict[str, float]:
        self._send_gradient_of_copy()
        with self.ranks.as_world():
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.allreduce_gradients()
        metrics = super().step()
        self._send_table()
        return metrics

    def _gradient_norm(self) -> Tensor:
        """Return the gradient norm of all stages together, and clip the gradients of this one by it."""
        gradients, divided = reduced_gradients(self.engine)
        squared = norm_of(gradients).double() ** 2
        if divided:
            squared = self.ranks.sum(squared, "the norm of a gradient")
        norm = self.pipeline.sum(squared, "the norm of a gradient").sqrt()
        if 0 < self.limit < norm:
            for gradient in gradients:
                gradient.mul_(self.limit / float(norm + 1e-6))
        return norm

    def _send_gradient_of_copy(self) -> None:
        """Send it from the last stage to the first, which adds it to its own."""
        if self.copy is not None:
            assert self.copy_gradient is not None
            self.copy.requires_grad_(False)
            dist.send(self.copy_gradient, group=self.pipeline.members, group_dst=self.stages.index(0))
            self.copy_gradient = None
        if self.table is not None:
            received = torch.empty_like(self.table, dtype=torch.float32)
            dist.recv(received, group=self.pipeline.members, group_src=self._last)
            own = summed_gradient(self.engine, self.table)
            own += received.view_as(own)

    def _send_table(self) -> None:
        """Send it from the first stage to the last, whose copy it is."""
        if self.table is not None:
            dist.send(self.table.data, group=self.pipeline.members, group_dst=self._last)
        if self.copy is not None:
            dist.recv(self.copy.data, group=self.pipeline.members, group_src=self.stages.index(0))

    @property
    def _last(self) -> int:
        return self.stages.index(len(self.cut.layers) - 1)

    def folder(self, directory: Path) -> Path:
        return directory / f"stage{self.cut.stage}"

    def refresh(self) -> None:
        super().refresh()
        self._send_table()

    @property
    def savers(self) -> Ranks | None:
        return self.pipeline if self.ranks.is_first else None

    def trained_weights(self) -> dict[str, Tensor]:
        """Return the weights of all stages, whole, in fp32 on the CPU, named as in the language model.

        All ranks of all stages call it; only the first of a pipeline gets them (the others an empty dict).
        """
        weights = super().trained_weights()
        return self.pipeline.pool(weights, "a look at the weights") if self.ranks.is_first else {}


class StageWork:
    """Holds a stage's batches of one optimiser step or one scoring pass, by micro-batch."""

    def __init__(self, model: nn.Module, batches: Sequence[TokenBatch]):
        self.model, self.batches, self.count = cast(PreTrainedModel, model), batches, len(batches)

    def room(self, micro_batch: int) -> Tensor:
        """Return an empty tensor for the hidden states between two stages, or their gradient."""
        weight = next(self.model.parameters())
        return torch.empty(
            hidden_shape(self.model, self.batches[micro_batch]), dtype=weight.dtype, device=weight.device
        )


class ScoringWork(StageWork):
    """Calls `ask` as the model is called, with a batch and `more`, without gradients. On the last stage `store` gets a
    batch's number and the outputs for it."""

    def __init__(
        self,
        ask: Callable[..., Any],
        model: nn.Module,
        cut: StageCut,
        batches: Sequence[TokenBatch],
        store: Callable[[int, Any], None],
        *more: Any,
    ):
        super().__init__(model, batches)
        self.ask, self.cut, self.store, self.more = ask, cut, store, more

    @torch.no_grad()
    def forward(self, micro_batch: int, received: Tensor | None) -> Tensor | None:
        outputs = self.ask(self.batches[micro_batch], *self.more, received=received)
        if not self.cut.is_last:
            return outputs
        self.store(micro_batch, outputs)
        return None

    def backward(self, micro_batch: int, gradient: Tensor | None) -> Tensor | None:
        raise TypeError("what is scored has no gradient")


class TrainingWork(StageWork):
    """Adds gradients to those of an engine. It stores what lies between a forward pass and its backward pass."""

    def __init__(self, engine: StageEngine, passes: Sequence[Pass]):
        super().__init__(engine.language_model, [one.batch() for one in passes])
        self.engine, self.passes = engine, passes
        self.between: dict[int, tuple[Tensor | None, Tensor]] = {}
        """Hidden states received; hidden states sent, or the loss."""

    def forward(self, micro_batch: int, received: Tensor | None) -> Tensor | None:
        if received is not None:
            received.requires_grad_()
        outputs = self.engine(self.batches[micro_batch], *self.passes[micro_batch].more, received=received)
        if self.engine.cut.is_last:
            share = self.passes[micro_batch].loss(outputs, self.batches[micro_batch]) * self.passes[micro_batch].weight
            outputs = share * self.engine.ranks.size  # DeepSpeed takes the mean over ranks
        self.between[micro_batch] = received, outputs
        return None if self.engine.cut.is_last else outputs.detach()

    def backward(self, micro_batch: int, gradient: Tensor | None) -> Tensor | None:
        received, outputs = self.between.pop(micro_batch)
        loss = outputs
        if gradient is not None:
            loss = torch.dot(outputs.flatten(), gradient.flatten())  # its gradient is `gradient` itself
        self.engine.backward(loss)
        return None if received is None else received.grad
