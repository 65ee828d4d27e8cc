"""Calling a model of transformers on a TokenBatch: packed where its family allows it, padded where not."""

import inspect
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from inference.families import backbone_of
from inference.generation.attention import PACKED_ATTENTION, Sequences, can_pack
from inference.generation.exactness import Exactness
from inference.generation.passes import packed_logits
from inference.generation.prefixes import Prefixes, at
from inference.private_surfaces import attention_of, set_attention
from training.data.batching import TokenBatch

LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings of families that change the logits after the output head, which their own forward has to do then."""


def use_packing(model: PreTrainedModel) -> None:
    """From now on `model` is called on packed rows, if its family allows it.

    For good, not for the length of a call: gradient checkpointing runs the forward pass again in the backward pass.
    """
    if can_pack(model):
        set_attention(model.config, PACKED_ATTENTION)


def call_on_tokens(
    model: PreTrainedModel, batch: TokenBatch, logits_at: Tensor | None = None, exact: Exactness | None = None
) -> Tensor:
    """What the model says of a batch: the last hidden states (tokens, hidden), or, with `logits_at`, places int64
    (n), the logits there (n, vocabulary). `exact` is for logits of packed rows."""
    backbone = backbone_of(model)
    if attention_of(model.config) == PACKED_ATTENTION:
        sequences = Sequences(batch.lengths, exact=exact)
        # in training mode there may be dropout, which every sequence draws for itself
        prefixes = None if model.training else Prefixes.of(sequences, batch.ids, apart=logits_at)
        computed = prefixes.computed if prefixes else slice(None)
        ids, positions = batch.ids[computed][None], sequences.positions(batch.ids.device)[:, computed]
        if logits_at is not None:
            kept = prefixes.stands_for[logits_at] if prefixes else logits_at
            return packed_logits(model, ids, positions, prefixes or sequences, kept, exact)
        inputs = {"input_ids": ids, "position_ids": positions, "tokens": prefixes or sequences}
        hidden = backbone(**inputs, use_cache=False).last_hidden_state[0]
        return at(hidden, prefixes.stands_for) if prefixes else hidden
    ids, mask, positions = batch.padded()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(backbone.forward).parameters:  # BLOOM counts them from the mask
        inputs["position_ids"] = positions
    if logits_at is not None and any(getattr(model.config, name, None) for name in LOGIT_CHANGES):
        row, column = mask.nonzero()[logits_at].unbind(1)
        wanted, place = column.unique(return_inverse=True)
        whole: Any = model
        return whole(**inputs, use_cache=False, logits_to_keep=wanted).logits[row, place]
    hidden = backbone(**inputs, use_cache=False).last_hidden_state[mask.bool()]
    return hidden if logits_at is None else model.get_output_embeddings()(hidden[logits_at])
