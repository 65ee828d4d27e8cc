"""A model that gives every token a number: the reward model (read at the last token) and the critic (at each)."""

from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from training.data.batching import TokenBatch
from training.models.adapters import add_lora
from training.models.packing import call_on_tokens, use_packing
from training.pipelines.cut import StageCut
from training.pipelines.stage_model import keep_stage, sends_on
from training.role_settings import LoRASettings


class Scorer(nn.Module):
    """The model with optional adapters. Scores are (raw - shift) / scale, with both from the model's config.json.

    With a `cut` one stage is kept of a whole `model`.
    """

    def __init__(self, model: PreTrainedModel, lora: LoRASettings | None = None, cut: StageCut | None = None):
        super().__init__()
        self.model = model
        use_packing(model)
        self.shift = float(getattr(model.config, "score_shift", 0.0))
        self.scale = float(getattr(model.config, "score_scale", 1.0))
        if lora is not None and lora.rank:
            add_lora(model, lora)
        if cut is not None:
            keep_stage(model, cut)

    @property
    def score_head(self) -> nn.Module:
        return cast(nn.Module, self.model.score)

    def forward(self, batch: TokenBatch, received: Tensor | None = None) -> Tensor:
        """A score for every token, float32 (tokens).

        Of a pipeline stage but the last: the hidden states to send on; `received` as in `call_on_tokens`.
        """
        hidden = call_on_tokens(self.model, batch, received=received)
        if sends_on(self.model):
            return hidden
        raw = self.score_head(hidden).float().squeeze(-1)
        return (raw - self.shift) / self.scale


def at_last_token(scores: Tensor, batch: TokenBatch) -> Tensor:
    """Each row's score at its last token: (tokens) -> (rows)."""
    return scores[batch.last]
