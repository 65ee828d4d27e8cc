"""A causal language model as a policy: log-probabilities of response tokens."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from training.config import LoRASettings
from training.data.batching import TokenBatch
from training.models.loading import add_lora


class Policy(nn.Module):
    """The model with optional adapters; its forward takes logits at response positions only."""

    def __init__(self, model: PreTrainedModel, lora: LoRASettings | None = None):
        super().__init__()
        self.model = model
        adapted = add_lora(model, lora) if lora is not None and lora.rank else None
        self._adapted = [adapted] if adapted is not None else []  # in a list: it holds `model`, no second submodule

    def forward(self, batch: TokenBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of the response tokens, both float32 (response tokens of all rows, row by row).

        `temperature` divides the logits, as it does when sampling.
        """
        backbone = getattr(self.model, self.model.base_model_prefix)
        hidden = backbone(**model_inputs(self.model, batch), use_cache=False).last_hidden_state
        predicting = hidden[:, :-1][batch.response[:, 1:]]  # (tokens, hidden)
        targets = batch.ids[:, 1:][batch.response[:, 1:]]
        logits = self.model.get_output_embeddings()(predicting).float()
        logprobs = (logits / temperature).log_softmax(-1)  # (tokens, vocabulary)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, targets[:, None])[:, 0], entropy

    def without_adapter(self) -> AbstractContextManager[None]:
        """Inside, this policy is the reference: the model before its adapters were trained."""
        return self._adapted[0].disable_adapter() if self._adapted else nullcontext()


def model_inputs(model: PreTrainedModel, batch: TokenBatch) -> dict[str, Tensor]:
    """Arguments of the backbone. BLOOM takes no positions: it counts them from the mask."""
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
    if model.config.model_type != "bloom":
        inputs["position_ids"] = batch.positions
    return inputs
