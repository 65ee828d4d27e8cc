"""A model of transformers on packed rows, and a causal one as a policy: log-probabilities of response tokens."""

import inspect
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from inference.errors import UserError
from inference.families import backbone_of, is_router, takes_adapter, text_config
from inference.generation.attention import PACKED_ATTENTION, Sequences, can_pack
from inference.generation.cpu import Exactness, filled
from inference.generation.passes import Prefixes, at
from inference.generation.sampler import log_sum, rows_at_once
from inference.private_surfaces import attention_of, set_attention
from training.data.batching import TokenBatch
from training.hybrid_engine.layout import StageCut
from training.pipelines.stage_model import handing_over, keep_stage, sends_on
from training.role_settings import LoRASettings

LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings of families that change the logits after the output head, which their own forward has to do then."""


def use_packing(model: PreTrainedModel) -> None:
    """Call `model` on packed rows from now on, if its family allows it.

    For good, not for the length of a call: gradient checkpointing runs the forward pass again in the backward pass.
    """
    if can_pack(model):
        set_attention(model.config, PACKED_ATTENTION)


def runs_packed(model: PreTrainedModel) -> bool:
    """Tell whether the model takes rows one behind the other, without padding."""
    return attention_of(model.config) == PACKED_ATTENTION


def call_on_tokens(
    model: PreTrainedModel,
    batch: TokenBatch,
    logits_at: Tensor | None = None,
    exact: Exactness | None = None,
    received: Tensor | None = None,
) -> Tensor:
    """Run the model on a batch: returns the last hidden states (tokens, hidden), or, with `logits_at`, positions int64
    (n), the logits there (n, vocabulary). `exact` is for packed rows.

    A pipeline stage but the first is given what it has `received` from the one before; one but the last gives what it
    sends on, of `hidden_shape`, and wants the same `logits_at` as the last.
    """
    if runs_packed(model):
        return _call_packed(model, batch, logits_at, exact, received)
    return _call_padded(model, batch, logits_at, received)


def hidden_shape(model: PreTrainedModel, batch: TokenBatch) -> torch.Size:
    """Return the shape of what a stage of `model` sends on: (computed tokens, hidden), or padded (rows, longest,
    hidden)."""
    width = text_config(model.config).hidden_size
    if not runs_packed(model):
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
    wanted = None
    if logits_at is not None:
        wanted = prefixes.stands_for[logits_at] if prefixes else logits_at
    handed = None if received is None else received[None]
    output, is_sent = _call(model, inputs, handed, None if wanted is None else filled(wanted, rows))
    output = output[0, : count if is_sent or wanted is None else len(wanted)]
    return at(output, prefixes.stands_for) if prefixes and wanted is None and not is_sent else output


def _call_padded(
    model: PreTrainedModel, batch: TokenBatch, logits_at: Tensor | None, received: Tensor | None
) -> Tensor:
    ids, mask, positions = batch.padded()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(backbone_of(model).forward).parameters:  # BLOOM counts them from the mask
        inputs["position_ids"] = positions
    if logits_at is not None and any(getattr(model.config, name, None) for name in LOGIT_CHANGES):
        row, column = mask.nonzero()[logits_at].unbind(1)
        wanted, index = column.unique(return_inverse=True)
        output, is_sent = _call(model, inputs, received, wanted)
        return output if is_sent else output[row, index]
    output, is_sent = _call(model, inputs, received)
    if is_sent:
        return output
    hidden = output[mask.bool()]
    return hidden if logits_at is None else model.get_output_embeddings()(hidden[logits_at])


def _call(
    model: PreTrainedModel, inputs: dict[str, Any], received: Tensor | None, logits_at: Tensor | None = None
) -> tuple[Tensor, bool]:
    """Return the last hidden states, or logits at those positions in each row, (rows, ..., ...); of a stage but the
    last what it sends, and True. `received` is (rows, tokens, hidden)."""
    whole: Any = model
    if received is not None:
        embeddings = torch.zeros_like(received)  # the model asks for some, and no layer sees them
        inputs = {name: value for name, value in inputs.items() if name != "input_ids"} | {"inputs_embeds": embeddings}
    with handing_over(model, received) as sent:
        if logits_at is None or sends_on(model):
            output = backbone_of(model)(**inputs, use_cache=False).last_hidden_state
        else:
            output = whole(**inputs, use_cache=False, logits_to_keep=logits_at).logits
    return (sent[0], True) if sent else (output, False)


_PREFIXES: WeakKeyDictionary[TokenBatch, dict[tuple[int, ...] | None, Prefixes | None]] = WeakKeyDictionary()
"""The prefixes of a batch, by the positions that stay apart."""


def _prefixes(model: PreTrainedModel, batch: TokenBatch, sequences: Sequences, apart: Tensor | None) -> Prefixes | None:
    """Find what the rows of a batch begin with together, once a batch; none in training mode, where there may be
    dropout, which every sequence draws for itself."""
    if model.training:
        return None
    positions = batch.positions if apart is batch.predicting else [] if apart is None else apart.tolist()
    cached, key = _PREFIXES.setdefault(batch, {}), None if apart is None else tuple(positions)
    if key not in cached:
        cached[key] = Prefixes.of(sequences, batch.tokens, batch.ids.device, positions)
    prefixes = cached[key]
    return replace(prefixes, sequences=sequences) if prefixes else None


NO_LAYERS = ("_token_id", "_token_ids", "architectures")
"""Ends of the names of lists that hold no value a layer, whatever their length."""


def keep_layers(config: PreTrainedConfig, layers: int) -> None:
    """Keep the first so many layers, and of every list with a value for each layer as many. Raises UserError."""
    text = text_config(config)
    has = text.num_hidden_layers
    if layers > has:
        raise UserError(f"reward.layers={layers}: the model has {has} layers; keep that many, or 0 for all.")
    text.num_hidden_layers = layers
    for name, value in vars(text).items():
        if isinstance(value, list | tuple) and len(value) == has and not name.endswith(NO_LAYERS):
            setattr(text, name, value[:layers])
    if hasattr(text, "attention_types"):  # GPT-Neo's own way to write what its attention_layers hold
        text.attention_types = [[[kind], 1] for kind in text.attention_layers]


def add_lora(model: PreTrainedModel, settings: LoRASettings) -> Any:
    """Put adapters into `model` (in place) and freeze the rest; a score head stays trainable. Returns the PeftModel."""
    from peft import LoraConfig, TaskType, get_peft_model

    from training.models.adapters import use_products

    require_lora_layers(model, settings)
    scorer = hasattr(model, "score")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=settings.targets,
        task_type=TaskType.SEQ_CLS if scorer else TaskType.CAUSAL_LM,
        modules_to_save=["score"] if scorer else None,
        exclude_modules=[name for name, layer in model.named_modules() if is_router(layer)] or None,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"lora.targets={settings.targets} does not fit this model ({reason}).") from error
    use_products(model)
    return adapted


def require_lora_layers(model: torch.nn.Module, settings: LoRASettings, key: str = "lora.targets") -> None:
    """Raise UserError where a target names no layer of `model`, or one whose adapter would not be what is saved.

    PEFT ignores a target if another one fits. A list holds ends of names, a text is a regular expression over whole
    names, as in PEFT.
    """
    targets = settings.targets
    if targets == "all-linear":
        return
    listed = [targets] if isinstance(targets, str) else targets
    layers = {name: layer for name, layer in model.named_modules() if not is_router(layer)}
    try:
        names_of = {target: [name for name in layers if is_target(name, target, targets)] for target in listed}
    except re.error as error:
        raise UserError(f"{key}={targets} is no regular expression ({error}); give a list of module names.") from None
    missing = [target for target, names in names_of.items() if not names]
    if missing or not targets:
        linear = {name.rpartition(".")[2] for name, layer in layers.items() if takes_adapter(layer)}
        fitting = ", ".join(sorted(linear - {"lm_head", "embed_out", "score"}))
        raise UserError(
            f"{key}={targets} does not fit this model, which has no layer {' or '.join(missing) or 'without a name'}: "
            f"choose from {fitting}, or all-linear."
        )
    for name in sorted({name for names in names_of.values() for name in names}):
        if reason := no_adapter(layers[name], name, model):
            raise UserError(f"{key}={targets} names {name}, {reason}: leave it out, or take all-linear.")


def is_target(name: str, target: str, targets: str | list[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(target, name) is not None
    return f".{name}".endswith(f".{target}")


def no_adapter(layer: nn.Module, name: str, model: nn.Module) -> str:
    """Say why no adapter fits a layer so that merging it gives what was trained; empty where one does."""
    if name == "score":
        return "the head of scores, all of whose weights are trained anyway"
    if isinstance(layer, nn.Embedding) and type(layer) is not nn.Embedding:
        return "an embedding that its family computes in a way of its own"
    weight = getattr(layer, "weight", None)
    others = [
        (other, getattr(module, "weight", None)) for other, module in model.named_modules() if module is not layer
    ]
    shared = next((other for other, its in others if its is not None and its is weight), "")
    return f"whose weights are those of {shared} too, so that merging would change both" if shared else ""


class Policy(nn.Module):
    """The model with optional adapters; its forward takes logits at response positions only.

    `exact` makes a token's bits independent of the micro-batch, where the model runs packed on a CPU. With a `cut` only
    one stage of a whole `model` stays.
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
        """Return log-probability and entropy of the response tokens, both float32 (response tokens, row by row).

        `temperature` divides the logits, as it does when sampling. Without gradients the entropy is left out (NaN).
        Of a pipeline stage but the last: the hidden states to send on; `received` as in `call_on_tokens`.
        """
        logits = call_on_tokens(self.model, batch, batch.predicting, self.exact, received)
        if sends_on(self.model):
            return logits
        return SelectedLogprobs.apply(logits, batch.targets, temperature)

    def without_adapter(self) -> AbstractContextManager[None]:
        """Make this policy the reference inside: the model before its adapters were trained."""
        return self._adapted[0].disable_adapter() if self._adapted else nullcontext()


class SelectedLogprobs(torch.autograd.Function):
    """log p of chosen tokens and the entropy, some rows of logits at a time: what is made of them stays in the caches,
    and nothing of their size is saved but themselves."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Map (n, vocabulary), (n) -> (n), (n), float32. No gradient flows through the entropy, which is NaN without
        gradients."""
        has_gradient = ctx.needs_input_grad[0]
        parts = []
        for scaled, own in in_fp32(logits, temperature, tokens[:, None]):
            probabilities = scaled.softmax(-1)
            total = log_sum(scaled, probabilities)
            mean = probabilities.mul_(scaled).sum(-1) if has_gradient else torch.nan
            parts.append(torch.stack([scaled.gather(1, own)[:, 0] - total, total - mean, total]))
        logprobs, entropy, totals = torch.cat(parts, dim=1) if parts else logits.new_empty(3, 0, dtype=torch.float32)
        ctx.save_for_backward(logits, tokens, totals)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of log p with respect to a logit is (1 if chosen) - p, over the temperature."""
        logits, tokens, totals = ctx.saved_tensors
        rows = torch.stack([totals, gradient / ctx.temperature], dim=1)
        parts = in_fp32(logits, ctx.temperature, tokens[:, None], rows)
        of_logits = torch.empty_like(logits)
        for (scaled, own, numbers), target in zip(parts, of_logits.split(rows_at_once(logits)), strict=False):
            total, weight = numbers[:, :1], numbers[:, 1:]
            terms = (scaled - total).exp_().mul_(-weight).scatter_add_(1, own, weight)
            target.copy_(terms)
        return of_logits, None, None


def in_fp32(logits: Tensor, temperature: float, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of logits at a time, divided by the temperature, with those of `others`."""
    count = rows_at_once(logits)
    for start in range(0, len(logits), count):
        part = slice(start, start + count)
        scaled = logits[part].float()
        yield scaled if temperature == 1 else scaled / temperature, *(rows[part] for rows in others)


class Scorer(nn.Module):
    """The model with optional adapters. Scores are (raw - shift) / scale, with both from the model's config.json.

    With a `cut` only one stage of a whole `model` stays.
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
        """Score every token, float32 (tokens).

        Of a pipeline stage but the last: the hidden states to send on; `received` as in `call_on_tokens`.
        """
        hidden = call_on_tokens(self.model, batch, received=received)
        if sends_on(self.model):
            return hidden
        raw = self.score_head(hidden).float().squeeze(-1)
        return (raw - self.shift) / self.scale


def at_last_token(scores: Tensor, batch: TokenBatch) -> Tensor:
    """Pick each row's score at its last token: (tokens) -> (rows)."""
    return scores[batch.last]
