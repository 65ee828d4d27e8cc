"""A causal language model as a policy: log-probabilities of response tokens."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from inference.generation.exactness import Exactness
from inference.generation.sampler import log_sum
from training.data.batching import TokenBatch
from training.models.adapters import add_lora
from training.models.packing import call_on_tokens, use_packing
from training.pipelines.cut import StageCut
from training.pipelines.stage_model import keep_stage, sends_on
from training.role_settings import LoRASettings


class Policy(nn.Module):
    """The model with optional adapters; its forward takes logits at response positions only.

    `exact` makes a token's bits independent of the micro-batch, where the model runs packed on a CPU. With a `cut` one
    stage is kept of a whole `model`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        lora: LoRASettings | None = None,
        exact: Exactness | None = None,
        cut: StageCut | None = None,
    ):
        super().__init__()
        self.model, self.exact = model, exact
        use_packing(model)
        adapted = add_lora(model, lora) if lora is not None and lora.rank else None
        self._adapted = [adapted] if adapted is not None else []  # in a list: it holds `model`, no second submodule
        if cut is not None:
            keep_stage(model, cut)

    def forward(
        self, batch: TokenBatch, temperature: float = 1.0, received: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Log-probability and entropy of the response tokens, both float32 (response tokens of all rows, row by row).

        `temperature` divides the logits, as it does when sampling. Without gradients the entropy is left out (NaN).
        Of a pipeline stage but the last: the hidden states to send on; `received` as in `call_on_tokens`.
        """
        logits = call_on_tokens(self.model, batch, batch.predicting, self.exact, received)
        if sends_on(self.model):
            return logits
        if not torch.is_grad_enabled():
            scaled = logits.float() if temperature == 1 else logits.float() / temperature
            logprobs = scaled.gather(1, batch.targets[:, None])[:, 0] - log_sum(scaled, scaled.softmax(-1))
            return logprobs, torch.full_like(logprobs, torch.nan)
        return SelectedLogprobs.apply(logits, batch.targets, temperature)

    def without_adapter(self) -> AbstractContextManager[None]:
        """Inside, this policy is the reference: the model before its adapters were trained."""
        return self._adapted[0].disable_adapter() if self._adapted else nullcontext()


class SelectedLogprobs(torch.autograd.Function):
    """log p of chosen tokens and the entropy, with one array of the logits' size kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """(n, vocabulary), (n) -> (n), (n), float32. No gradient flows through the entropy."""
        scaled = logits.float() if temperature == 1 else logits.float() / temperature
        probabilities = scaled.softmax(-1)
        total = log_sum(scaled, probabilities)
        logprobs = scaled.gather(1, tokens[:, None])[:, 0] - total
        entropy = (
            total - (probabilities[:, None] @ scaled[:, :, None]).flatten()
        )  # vecdot makes an array of all products
        ctx.save_for_backward(probabilities, tokens)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of log p with respect to a logit is (1 if chosen) - p, over the temperature.

        It takes the place of the probabilities, so that a second backward pass is an error.
        """
        probabilities, tokens = ctx.saved_tensors
        gradient = (gradient / ctx.temperature)[:, None]
        logits = probabilities.mul_(-gradient).scatter_add_(1, tokens[:, None], gradient)
        return logits.to(ctx.dtype), None, None
