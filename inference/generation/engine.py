"""Continuous batching over token ids: samples start as slots fall free and are handed over one by one as they end.

Nothing here depends on when a sample runs or beside which others: its random numbers are a function of (seed,
iteration, sample, position).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from inference.generation.cpu import BlockedWeights, Exactness
from inference.generation.decoding import Decoding, GenerationStats, Scheduler
from inference.generation.graphs import MOST_STEPS, Replay
from inference.generation.kv_cache import KVCache
from inference.generation.passes import PackedPasses, Passes, make_passes, preferred_cache_dtype
from inference.generation.sampler import Draw, Sample, SamplingKey, SamplingSettings

OnToken = Callable[[Sample], None]
PREFILL_TOKENS = 4096
"""Prompt tokens in one prefill pass, at most (one prompt always goes)."""


class GenerationEngine:
    """Generates with a causal language model of `transformers` that the caller keeps in evaluation mode.

    The memory for keys and values is kept from one call to the next, as long as it is large enough.
    """

    def __init__(
        self,
        model: nn.Module,
        end_ids: int | Sequence[int],
        pad_id: int,
        slots: int = 32,
        prefill_tokens: int = PREFILL_TOKENS,
        graphs: bool | None = None,
        exact: Exactness | None = None,
        room: tuple[int, int] = (0, 0),
    ):
        """Any of `end_ids` ends a sample. `slots` is how many samples are decoded at the same time.

        `graphs` lets decode steps follow each other without the host, on CUDA as graphs (`Replay`). None: on CUDA.
        It is for packed models; others decode as without it. `exact` makes the bits of a token's log-probabilities
        those of any other pass, on a CPU. `room` is (samples, tokens of a sample) of the largest call to come: cache
        and graphs are made for it, and so are kept from call to call.
        """
        self.model = model
        self.end_ids = (end_ids,) if isinstance(end_ids, int) else tuple(end_ids)
        self.pad_id = pad_id
        self.slots, self.prefill_tokens, self.graphs, self.exact = slots, prefill_tokens, graphs, exact
        self.room = min(slots, room[0]), room[1]
        self.cache = KVCache(0, 0)
        self._blocked: Future[BlockedWeights] | None = None
        self._replay: Replay | None = None
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
        decoding = self.start(samples, settings, key, may_end=lengths is None)
        while not decoding.is_over:
            grown = decoding.step(MOST_STEPS if on_token is None else 1)
            for sample in grown:
                if on_token is not None:
                    on_token(sample)
            yield from (sample for sample in grown if sample.is_over)

    def stream(self, prompt: Tensor, settings: SamplingSettings, key: SamplingKey, index: int = 0) -> Iterator[Sample]:
        """Yield the sample of one prompt, growing, after each of its tokens; they are those that `generate` draws."""
        decoding = self.start([Sample(index, prompt, settings.max_tokens)], settings, key)
        while not decoding.is_over:
            yield from decoding.step(1)

    def start(
        self,
        samples: list[Sample],
        settings: SamplingSettings,
        key: SamplingKey,
        may_end: bool = True,
        room: tuple[int, int] = (0, 0),
    ) -> Decoding:
        """The samples on their way, for callers that want each step in their hands; one at a time.

        `may_end=False` forbids the end tokens: each sample goes to its limit. `room` is (samples, tokens of a sample)
        to keep free at least, for samples that come from elsewhere.
        """
        return self.start_with(Draw(settings, key, self.end_ids, may_end), samples, room)

    def start_with(self, draw: Draw, samples: list[Sample], room: tuple[int, int] = (0, 0)) -> Decoding:
        """`start` with a draw of the caller's; one that is not the same for all samples needs an engine without
        graphs."""
        slots = min(self.slots, max(len(samples), room[0]))
        capacity = max([room[1], *(len(sample.prompt_ids) + sample.limit for sample in samples)])
        capacity = capacity if self.exact is None else self.exact.seen(capacity)
        if not self.cache.fits(slots, capacity):
            most, longest = max(slots, self.room[0]), max(capacity, self.room[1])
            self.cache = KVCache(most, longest, preferred_cache_dtype(self.model, self.exact), self.exact)
        self.stats = GenerationStats(slots)
        if self.exact is None or self.exact.blocked:
            self.prepare()
        passes = make_passes(self.model, self.cache, self.pad_id, self.exact)
        self._replay = self._replay_of(passes)
        return Decoding(
            Scheduler(samples, slots, self.prefill_tokens),
            self.cache,
            passes,
            draw,
            self.stats,
            self._weights_in_use,
            self._replay,
        )

    def prepare(self) -> Future[BlockedWeights]:
        """Have the blocked copy of the weights made, in a thread, unless there is one: the first token waits for it."""
        if self._blocked is None:
            beside = ThreadPoolExecutor(1)
            self._blocked = beside.submit(BlockedWeights, self.model)
            beside.shutdown(wait=False)
        return self._blocked

    def weights_changed(self) -> None:
        """Must be called after the model's weights have changed: their blocked copy is made anew."""
        self._blocked = None

    def release(self) -> None:
        """Give back the memory for keys and values, the blocked weights and the graphs; the next call makes them anew.

        No samples may be on their way.
        """
        self.cache.release()
        self._blocked = self._replay = None

    def _weights_in_use(self) -> AbstractContextManager[None]:
        """Inside, the model computes with its blocked weights."""
        if self.exact is not None and not self.exact.blocked:
            return nullcontext()
        return self.prepare().result().in_use()

    def _replay_of(self, passes: Passes) -> Replay | None:
        """The one there is, as long as its graphs hold."""
        wanted = passes.device.type == "cuda" if self.graphs is None else self.graphs
        if not wanted or not isinstance(passes, PackedPasses):
            return None
        if self._replay is not None and self._replay.holds_for(passes):
            return self._replay
        return Replay(passes)
