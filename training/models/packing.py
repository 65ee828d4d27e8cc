"""Calling a model of transformers on a TokenBatch: packed where its family allows it, padded where not."""

import inspect
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from inference.families import backbone_of, text_config
from inference.generation.attention import PACKED_ATTENTION, Sequences, can_pack
from inference.generation.cpu import Exactness, filled
from inference.generation.passes import Prefixes, at
from inference.private_surfaces import attention_of, set_attention
from training.data.batching import TokenBatch
from training.pipelines.stage_model import handing_over, sends_on

LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings of families that change the logits after the output head, which their own forward has to do then."""


def use_packing(model: PreTrainedModel) -> None:
    """From now on `model` is called on packed rows, if its family allows it.

    For good, not for the length of a call: gradient checkpointing runs the forward pass again in the backward pass.
    """
    if can_pack(model):
        set_attention(model.config, PACKED_ATTENTION)


def call_on_tokens(
    model: PreTrainedModel,
    batch: TokenBatch,
    logits_at: Tensor | None = None,
    exact: Exactness | None = None,
    received: Tensor | None = None,
) -> Tensor:
    """What the model says of a batch: the last hidden states (tokens, hidden), or, with `logits_at`, places int64
    (n), the logits there (n, vocabulary). `exact` is for packed rows.

    A pipeline stage but the first is given what it has `received` from the one before; one but the last gives what it
    sends on, of `hidden_shape`, and wants the same `logits_at` as the last.
    """
    if attention_of(model.config) == PACKED_ATTENTION:
        return _call_packed(model, batch, logits_at, exact, received)
    return _call_padded(model, batch, logits_at, received)


def hidden_shape(model: PreTrainedModel, batch: TokenBatch) -> torch.Size:
    """Of the hidden states that a stage of `model` sends on: (computed tokens, hidden), or padded (rows, longest,
    hidden)."""
    width = text_config(model.config).hidden_size
    if attention_of(model.config) != PACKED_ATTENTION:
        return torch.Size((len(batch.lengths), max(batch.lengths), width))
    apart = batch.predicting if model.can_generate() else None  # as Policy and Scorer call it
    prefixes = _prefixes(model, batch, Sequences(batch.lengths), apart)
    return torch.Size((len(prefixes.computed) if prefixes else len(batch.ids), width))


def _call_packed(
    model: PreTrainedModel,
    batch: TokenBatch,
    logits_at: Tensor | None,
    exact: Exactness | None,
    received: Tensor | None,
) -> Tensor:
    sequences, rows = Sequences(batch.lengths, exact=exact), 1 if exact is None else exact.rows
    prefixes = _prefixes(model, batch, sequences, logits_at)
    computed = prefixes.computed if prefixes else slice(None)
    ids, positions = batch.ids[computed][None], sequences.positions(batch.ids.device)[:, computed]
    count, more = ids.shape[1], -ids.shape[1] % rows
    if received is not None and more:
        received = torch.cat([received, received[-1:].expand(more, -1)])
    inputs = {"position_ids": filled(positions, rows), "tokens": prefixes or sequences}
    inputs["input_ids"] = filled(ids, rows)
    kept = None
    if logits_at is not None:
        kept = prefixes.stands_for[logits_at] if prefixes else logits_at
    handed = None if received is None else received[None]
    output, is_sent = _call(model, inputs, handed, None if kept is None else filled(kept, rows))
    output = output[0, : count if is_sent or kept is None else len(kept)]
    return at(output, prefixes.stands_for) if prefixes and kept is None and not is_sent else output


def _call_padded(
    model: PreTrainedModel, batch: TokenBatch, logits_at: Tensor | None, received: Tensor | None
) -> Tensor:
    ids, mask, positions = batch.padded()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(backbone_of(model).forward).parameters:  # BLOOM counts them from the mask
        inputs["position_ids"] = positions
    if logits_at is not None and any(getattr(model.config, name, None) for name in LOGIT_CHANGES):
        row, column = mask.nonzero()[logits_at].unbind(1)
        wanted, place = column.unique(return_inverse=True)
        output, is_sent = _call(model, inputs, received, wanted)
        return output if is_sent else output[row, place]
    output, is_sent = _call(model, inputs, received)
    if is_sent:
        return output
    hidden = output[mask.bool()]
    return hidden if logits_at is None else model.get_output_embeddings()(hidden[logits_at])


def _call(
    model: PreTrainedModel, inputs: dict[str, Any], received: Tensor | None, logits_at: Tensor | None = None
) -> tuple[Tensor, bool]:
    """The last hidden states, or logits at those places in each row, (rows, ..., ...); of a stage but the last what it
    sends, and True. `received` is (rows, tokens, hidden)."""
    whole: Any = model
    if received is not None:
        embeddings = torch.zeros_like(received)  # their place has to be taken: no layer sees them
        inputs = {name: value for name, value in inputs.items() if name != "input_ids"} | {"inputs_embeds": embeddings}
    with handing_over(model, received) as sent:
        if logits_at is None or sends_on(model):
            output = backbone_of(model)(**inputs, use_cache=False).last_hidden_state
        else:
            output = whole(**inputs, use_cache=False, logits_to_keep=logits_at).logits
    return (sent[0], True) if sent else (output, False)


_FOUND: WeakKeyDictionary[TokenBatch, dict[tuple[int, ...] | None, Prefixes | None]] = WeakKeyDictionary()


def _prefixes(model: PreTrainedModel, batch: TokenBatch, sequences: Sequences, apart: Tensor | None) -> Prefixes | None:
    """What the rows of a batch begin with together, looked for once; none in training mode, where there may be dropout,
    which every sequence draws for itself."""
    if model.training:
        return None
    places = batch.places if apart is batch.predicting else [] if apart is None else apart.tolist()
    found, key = _FOUND.setdefault(batch, {}), None if apart is None else tuple(places)
    if key not in found:
        found[key] = Prefixes.of(sequences, batch.tokens, batch.ids.device, places)
    prefixes = found[key]
    return replace(prefixes, sequences=sequences) if prefixes else None
