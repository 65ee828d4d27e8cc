"""Continuous batching over token ids: samples start as slots fall free and are handed over one by one as they end.

A step admits waiting samples (their prompts are prefilled, their first tokens drawn) or decodes one token for every
running sample. Nothing here depends on when a sample runs or beside which others: its random numbers are a function of
(seed, iteration, sample, position).
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from inference.generation.cpu_weights import BlockedWeights
from inference.generation.kv_cache import KVCache
from inference.generation.passes import Passes, make_passes, preferred_cache_dtype
from inference.generation.sample import Sample, SamplingKey, SamplingSettings
from inference.generation.sampler import sample_tokens
from inference.generation.scheduler import GenerationStats, Scheduler, same_prompt

OnToken = Callable[[Sample], None]
PREFILL_TOKENS = 4096
"""Prompt tokens in one prefill pass, at most (one prompt always goes)."""


class GenerationEngine:
    """Generates with a causal language model of `transformers` that the caller keeps in evaluation mode.

    The memory for keys and values is kept from one call to the next, as long as it is large enough.
    """

    def __init__(
        self, model: nn.Module, end_id: int, pad_id: int, slots: int = 32, prefill_tokens: int = PREFILL_TOKENS
    ):
        """`slots` is how many samples are decoded at the same time."""
        self.model = model
        self.end_id, self.pad_id = end_id, pad_id
        self.slots, self.prefill_tokens = slots, prefill_tokens
        self.cache = KVCache(0, 0)
        self._blocked: BlockedWeights | None = None
        self.stats = GenerationStats(slots)

    def generate(
        self,
        prompts: Sequence[Tensor],  # each (length) int64, length >= 1
        settings: SamplingSettings,
        key: SamplingKey,
        indices: Sequence[int] | None = None,
        on_token: OnToken | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Iterator[Sample]:
        """Yield each sample when it ends. `indices` name the samples (0, 1, ... by default) and seed their draws.

        `lengths` forces the length of each response: no sample ends before it, and each ends there. For measuring.
        """
        indices = range(len(prompts)) if indices is None else indices
        limits = [settings.max_tokens] * len(prompts) if lengths is None else lengths
        samples = [Sample(index, prompt, limit) for index, prompt, limit in zip(indices, prompts, limits, strict=True)]
        for grown in self._steps(samples, settings, key, may_end=lengths is None):
            for sample in grown:
                if on_token is not None:
                    on_token(sample)
            yield from (sample for sample in grown if sample.is_over)

    def stream(self, prompt: Tensor, settings: SamplingSettings, key: SamplingKey, index: int = 0) -> Iterator[Sample]:
        """Yield the sample of one prompt, growing, after each of its tokens; they are those that `generate` draws."""
        for grown in self._steps([Sample(index, prompt, settings.max_tokens)], settings, key):
            yield grown[0]

    def weights_changed(self) -> None:
        """Must be called after the model's weights have changed: their blocked copy is made anew."""
        self._blocked = None

    def _steps(
        self, samples: list[Sample], settings: SamplingSettings, key: SamplingKey, may_end: bool = True
    ) -> Iterator[list[Sample]]:
        """Yield, after each step, the samples that got a token in it."""
        if not samples:
            return
        draw = Draw(settings, key, self.end_id, may_end)
        slots = min(self.slots, len(samples))
        self._reserve(slots, max(len(sample.prompt_ids) + sample.limit for sample in samples))
        scheduler = Scheduler(samples, slots, self.prefill_tokens)
        passes = make_passes(self.model, self.cache, self.pad_id)
        blocked = self._blocked = self._blocked or BlockedWeights(self.model)
        self.stats = stats = GenerationStats(slots)
        while True:
            with torch.inference_mode(), blocked.in_use():
                for source, target in scheduler.retire():
                    self.cache.copy(source, target, scheduler.running[target].length - 1)
                if admitted := scheduler.admit():
                    grown = admitted
                    logits = self._prefill(admitted, len(scheduler.running) - len(admitted), passes)
                elif not scheduler.running:
                    return
                else:
                    grown = list(scheduler.running)
                    # the newest token of each sample is not in the cache yet
                    newest = torch.tensor([sample.response_ids[-1] for sample in grown], device=logits.device)
                    logits = passes.decode(newest, [sample.length - 1 for sample in grown])
                    stats.decode_steps += 1
                    stats.row_steps += len(grown)
                draw(logits, grown)
            stats.response_tokens += len(grown)
            yield grown

    def _prefill(self, admitted: list[Sample], first_row: int, passes: Passes) -> Tensor:
        """Logits (samples, vocabulary) after their prompts; neighbours with the same prompt share one pass."""
        leaders = [
            place for place, sample in enumerate(admitted) if place == 0 or not same_prompt(sample, admitted[place - 1])
        ]
        prompts = [admitted[place].prompt_ids for place in leaders]
        logits = passes.prefill(prompts, [first_row + place for place in leaders])
        leader_of = [sum(leader <= place for leader in leaders) - 1 for place in range(len(admitted))]
        for place, leader in enumerate(leader_of):
            if leaders[leader] != place:
                self.cache.copy(first_row + leaders[leader], first_row + place, len(admitted[place].prompt_ids))
        self.stats.samples += len(admitted)
        self.stats.prompt_tokens += sum(len(sample.prompt_ids) for sample in admitted)
        self.stats.prefilled_tokens += sum(map(len, prompts))
        return logits[leader_of] if len(leaders) < len(admitted) else logits

    def _reserve(self, slots: int, capacity: int) -> None:
        """Make room for `slots` samples of `capacity` tokens, unless there is enough."""
        if not self.cache.fits(slots, capacity):
            self.cache = KVCache(slots, capacity, preferred_cache_dtype(self.model))


class Draw:
    """Draws the next token of samples and writes it into them."""

    def __init__(self, settings: SamplingSettings, key: SamplingKey, end_id: int, may_end: bool):
        self.settings, self.key, self.end_id, self.may_end = settings, key, end_id, may_end
        self.end_ids = {end_id, *settings.stop_ids} if may_end else set()

    def __call__(self, logits: Tensor, samples: list[Sample]) -> None:
        """From logits (samples, vocabulary)."""
        names = torch.tensor([[sample.index, len(sample.response_ids)] for sample in samples], device=logits.device)
        if not self.may_end:
            logits[:, self.end_id] = -torch.inf
        tokens, logprobs = sample_tokens(logits, self.settings, self.key, names[:, 0], names[:, 1], self.end_id)
        for sample, token, logprob in zip(samples, tokens.tolist(), logprobs.tolist(), strict=True):
            sample.response_ids.append(token)
            sample.logprobs.append(logprob)
            sample.ended = token in self.end_ids
