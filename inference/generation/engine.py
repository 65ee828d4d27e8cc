"""Generation with plain `transformers`: a batch is prefilled, decoded a token at a time, and shrinks as samples end.

The interface is the one that any faster engine keeps: samples are handed over one by one, when they end.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from inference.generation.sample import Sample, SamplingKey, SamplingSettings
from inference.generation.sampler import sample_tokens

OnToken = Callable[[Sample], None]


class GenerationEngine:
    """Generates with a causal language model of `transformers` that the caller keeps in evaluation mode."""

    def __init__(self, model: nn.Module, end_id: int, pad_id: int, batch: int = 32):
        """`batch` is how many samples are decoded at the same time."""
        self.model = model
        self.end_id = end_id
        self.pad_id = pad_id
        self.batch = batch
        self.accepted = forward_arguments(model)

    def generate(
        self,
        prompts: Sequence[Tensor],  # each (length) int64, length >= 1
        settings: SamplingSettings,
        key: SamplingKey,
        indices: Sequence[int] | None = None,
        on_token: OnToken | None = None,
    ) -> Iterator[Sample]:
        """Yield each sample when it ends. `indices` name the samples (0, 1, ... by default) and seed their draws."""
        indices = range(len(prompts)) if indices is None else indices
        waiting = [Sample(index, prompt) for index, prompt in zip(indices, prompts, strict=True)]
        for start in range(0, len(waiting), self.batch):
            for running in self._decode_steps(waiting[start : start + self.batch], settings, key, on_token):
                yield from (sample for sample in running if is_over(sample, settings))

    def stream(self, prompt: Tensor, settings: SamplingSettings, key: SamplingKey, index: int = 0) -> Iterator[Sample]:
        """Yield the sample of one prompt, growing, after each of its tokens; they are those that `generate` draws."""
        for running in self._decode_steps([Sample(index, prompt)], settings, key):
            yield running[0]

    def _decode_steps(
        self,
        running: list[Sample],
        settings: SamplingSettings,
        key: SamplingKey,
        on_token: OnToken | None = None,
    ) -> Iterator[list[Sample]]:
        """Yield, after each decode step, the samples that got a token in it."""
        device = next(self.model.parameters()).device
        ids, mask = left_pad([sample.prompt_ids for sample in running], self.pad_id)  # (rows, prompt)
        ids, mask = ids.to(device), mask.to(device)
        index = torch.tensor([sample.index for sample in running], device=device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = None
        for step in range(settings.max_tokens):
            optional = {"position_ids": positions, "logits_to_keep": 1}
            optional = {name: value for name, value in optional.items() if name in self.accepted}
            with torch.inference_mode():
                output = self.model(
                    input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **optional
                )
                cache = output.past_key_values
                position = torch.full_like(index, step)
                tokens, logprobs = sample_tokens(output.logits[:, -1], settings, key, index, position, self.end_id)
            for sample, token, logprob in zip(running, tokens.tolist(), logprobs.tolist(), strict=True):
                sample.response_ids.append(token)
                sample.logprobs.append(logprob)
                sample.ended = token == self.end_id
                if on_token is not None:
                    on_token(sample)
            yield running
            going = [row for row, sample in enumerate(running) if not is_over(sample, settings)]
            if not going:
                return
            if len(going) < len(running):
                running = [running[row] for row in going]
                keep = torch.tensor(going, device=device)
                cache.batch_select_indices(keep)
                tokens, mask, index, positions = tokens[keep], mask[keep], index[keep], positions[keep]
            ids = tokens[:, None]
            mask = torch.cat([mask, mask.new_ones(len(running), 1)], dim=1)
            positions = positions[:, -1:] + 1


def is_over(sample: Sample, settings: SamplingSettings) -> bool:
    return sample.ended or len(sample.response_ids) >= settings.max_tokens


def forward_arguments(model: nn.Module) -> set[str]:
    """Names that the forward pass takes (BLOOM has no `position_ids`), seen through wrappers, which pass all on."""
    while isinstance(wrapped := getattr(model, "module", None), nn.Module):  # DeepSpeed, DistributedDataParallel
        model = wrapped
    if (base_model := getattr(model, "get_base_model", None)) is not None:  # PEFT
        model = base_model()
    return set(inspect.signature(model.forward).parameters)


def left_pad(sequences: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Sequences (length) of any lengths -> ids and mask, both int64 (rows, longest), ending at the right."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = sequence
        mask[row, longest - len(sequence) :] = 1
    return ids, mask
