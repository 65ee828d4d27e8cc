"""Samples, and drawing their tokens: the random number of a token depends on (seed, iteration, sample, position) and
nothing else. So batch order, the number of ranks and where a sample runs cannot change what is drawn.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from inference.generation.cpu import with_more


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn. temperature 0 is greedy; top_p 1 and top_k 0 are off."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_tokens: int = 0
    """No token that ends a sample is drawn before this many."""


@dataclass(frozen=True)
class SamplingKey:
    """What, with a sample's index and a token's position, decides every random number."""

    seed: int
    iteration: int = 0


@dataclass
class Sample:
    """One prompt with one response."""

    index: int
    prompt_ids: Tensor  # (prompt) int64
    limit: int
    """Most tokens of the response."""
    response_ids: list[int] = field(default_factory=list)
    """Tokens drawn so far; the one that ended it is the last."""
    logprobs: list[float] = field(default_factory=list)
    """log p of each response token under the distribution that it was drawn from, temperature included."""
    ended: bool = False
    """Whether a token was drawn that ends it."""

    @property
    def is_over(self) -> bool:
        return self.ended or len(self.response_ids) >= self.limit

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def cached_ids(self) -> Tensor:
        """The tokens whose keys and values decoding needs: all but the newest of the response; int64."""
        return torch.cat([self.prompt_ids, torch.tensor(self.response_ids[:-1], dtype=torch.int64)])


BLOCK = 256
"""Tokens in a block of the vocabulary, see `invert_cumulative`."""


class Key(Protocol):
    """A `SamplingKey`, or its numbers on the device: int64 (rows) each."""

    @property
    def seed(self) -> int | Tensor: ...

    @property
    def iteration(self) -> int | Tensor: ...


class RowKeys(NamedTuple):
    """The sampling key of each row, int64 (rows) each."""

    seed: Tensor
    iteration: Tensor


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014), on int64 with wrap-around and logical shifts."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687  # 0xbf58476d1ce4e5b9
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685  # 0x94d049bb133111eb
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniform(key: Key, sample: Tensor, position: Tensor) -> Tensor:
    """One number in [0, 1) for each (sample, position); int64 (rows) each -> float64 (rows)."""
    state = torch.zeros_like(sample)
    for word in (key.seed, key.iteration, sample, position):
        state = _mix(state + word + -7046029254386353131)  # 0x9e3779b97f4a7c15, the golden gamma
    return ((state >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def sample_tokens(
    logits: Tensor,  # (rows, vocabulary)
    settings: SamplingSettings,
    key: Key,
    sample: Tensor,  # (rows) int64
    position: Tensor,  # (rows) int64: tokens of the response so far
    end_ids: Collection[int],
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution.

    Returns tokens int64 (rows) and their log-probabilities float32 (rows) under the distribution drawn from:
    after temperature, and after top-k, top-p and the minimum length have removed tokens. Greedy rows report the
    log-probability at temperature 1. Nothing is read back from the device.
    """
    numbers = uniform(key, sample, position) if settings.temperature else torch.zeros_like(position)
    some = zip(*(rows.split(rows_at_once(logits)) for rows in (logits, numbers, position)), strict=True)
    parts = [_sample_some(part, own, at, settings, end_ids) for part, own, at in some]
    tokens, logprobs = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def rows_at_once(logits: Tensor) -> int:
    """So many rows of logits, (rows, vocabulary), that what is made of them in fp32 stays in the caches of a CPU; on a
    GPU, that it takes at most 256 MiB."""
    at_once = 2**19 if logits.device.type == "cpu" else 2**26
    return max(1, at_once // logits.shape[1])


def _sample_some(
    logits: Tensor, drawn: Tensor, position: Tensor, settings: SamplingSettings, end_ids: Collection[int]
) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    if settings.min_tokens:
        too_early = position < settings.min_tokens
        logits = logits.clone()
        for end_id in end_ids:  # not all at once: a captured step takes no list from the host
            logits[:, end_id] = logits[:, end_id].masked_fill(too_early, -torch.inf)
    logits = drawn_from(logits, settings)
    probabilities = logits.softmax(-1)
    tokens = logits.argmax(-1) if settings.temperature == 0 else invert_cumulative(probabilities, drawn)
    return tokens, logits.gather(1, tokens[:, None])[:, 0] - log_sum(logits, probabilities)


def drawn_from(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """What tokens are drawn from, (rows, vocabulary): -inf for those that cannot be; at temperature 0 all as they
    are."""
    if settings.temperature == 0:
        return logits
    if settings.temperature != 1:
        logits = logits / settings.temperature
    return restrict(logits, settings.top_k, settings.top_p)


def log_sum(logits: Tensor, probabilities: Tensor) -> Tensor:
    """log sum exp of each row, (rows), by way of its softmax. A log-probability is the logit less this, in drawing, in
    scoring and in training: one formula, for all to agree to the bit."""
    return logits.amax(-1) - probabilities.amax(-1).log()


def likeliest(logits: Tensor, settings: SamplingSettings, count: int) -> list[list[tuple[int, float]]]:
    """The tokens of each row that could be drawn, the likeliest first, at most `count`, and their log-probabilities.

    Those that `sample_tokens` returns are among them, to the bit.
    """
    logits = drawn_from(logits.float(), settings)
    logprobs = logits - log_sum(logits, logits.softmax(-1))[:, None]
    top = logprobs.topk(min(count, logprobs.shape[-1]))
    rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [[pair for pair in zip(*row, strict=True) if pair[1] > -torch.inf] for row in rows]


def invert_cumulative(probabilities: Tensor, drawn: Tensor) -> Tensor:
    """The token in which the cumulative distribution passes `drawn` in [0, 1): (rows, vocabulary), (rows) -> (rows).

    First among blocks of tokens, then inside one: a sum over the vocabulary is many times faster than a running one.
    Sums are in double precision, so that the order of the terms does not matter to the draw.
    """
    rows, vocabulary = probabilities.shape
    blocks = with_more(probabilities, 1, -vocabulary % BLOCK).view(rows, -1, BLOCK)
    cumulative = blocks.sum(-1, dtype=torch.double).cumsum(-1)  # (rows, blocks)
    threshold = (drawn.to(cumulative) * cumulative[:, -1])[:, None]
    block = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=cumulative.shape[1] - 1)  # (rows, 1)
    chosen = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0]  # (rows, BLOCK)
    inside = chosen.double().cumsum(-1)
    threshold = threshold - (cumulative.gather(1, block) - inside[:, -1:])
    # a threshold that rounding has put on the end of the block stays on a token that can be drawn
    last = BLOCK - 1 - (chosen > 0).flip(-1).to(torch.uint8).argmax(-1)
    return block[:, 0] * BLOCK + torch.minimum(torch.searchsorted(inside, threshold, right=True)[:, 0], last)


def restrict(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set the logits outside the `top_k` likeliest and outside the smallest set with mass `top_p` to -inf."""
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        beyond = mass_before >= top_p
        beyond[:, 0].fill_(False)  # the likeliest token stays, at top_p 0 too
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, beyond)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


class Draw:
    """Draws the next token of samples and writes it into them."""

    def __init__(self, settings: SamplingSettings, key: SamplingKey, end_ids: tuple[int, ...], may_end: bool):
        self.settings, self.key, self.end_ids, self.may_end = settings, key, end_ids, may_end

    def __call__(self, logits: Tensor, samples: list[Sample]) -> None:
        """Draw from logits (samples, vocabulary)."""
        names = torch.tensor([[sample.index, len(sample.response_ids)] for sample in samples], device=logits.device)
        tokens, logprobs = self.tokens(logits, self.key, names[:, 0], names[:, 1])
        for sample, token, logprob in zip(samples, tokens.tolist(), logprobs.tolist(), strict=True):
            self.write(sample, token, logprob)

    def tokens(self, logits: Tensor, key: Key, sample: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """What `sample_tokens` gives, without the end tokens if nothing may end; changes the logits."""
        if not self.may_end:
            for end_id in self.end_ids:
                logits[:, end_id].fill_(-torch.inf)
        return sample_tokens(logits, self.settings, key, sample, position, self.end_ids)

    def write(self, sample: Sample, token: int, logprob: float) -> None:
        sample.response_ids.append(token)
        sample.logprobs.append(logprob)
        sample.ended = self.may_end and token in self.end_ids


@dataclass(kw_only=True)
class OwnSample(Sample):
    """A sample that says how it is drawn. Its `limit` counts, not the settings' `max_tokens`."""

    settings: SamplingSettings
    key: SamplingKey
    alternatives: int = 0
    """Tokens beside which each drawn one is to be seen."""
    likeliest: list[list[tuple[int, float]]] = field(default_factory=list)
    """For each response token the likeliest tokens at its position with their log-probabilities, where `alternatives`
    are wanted."""


class OwnDraw(Draw):
    """Each `OwnSample` gets the tokens that a decoding of its own, with its settings and key, would give it."""

    def __init__(self, end_ids: tuple[int, ...]):
        super().__init__(SamplingSettings(max_tokens=0), SamplingKey(0), end_ids, may_end=True)

    def __call__(self, logits: Tensor, samples: Sequence[Sample]) -> None:
        rows_of: dict[SamplingSettings, list[int]] = {}
        own = [sample for sample in samples if isinstance(sample, OwnSample)]
        if len(own) != len(samples):
            raise TypeError("each sample must be an OwnSample")
        for row, sample in enumerate(own):
            rows_of.setdefault(sample.settings, []).append(row)
        for settings, rows in rows_of.items():
            drawn = [own[row] for row in rows]
            numbers = [(s.key.seed, s.key.iteration, s.index, len(s.response_ids)) for s in drawn]
            seed, iteration, index, position = torch.tensor(numbers, device=logits.device).T
            wanted = logits if len(rows) == len(own) else logits[rows]
            key = RowKeys(seed, iteration)
            tokens, logprobs = sample_tokens(wanted, settings, key, index, position, self.end_ids)
            for sample, token, logprob in zip(drawn, tokens.tolist(), logprobs.tolist(), strict=True):
                self.write(sample, token, logprob)
            if count := max(sample.alternatives for sample in drawn):
                for sample, tops in zip(drawn, likeliest(wanted, settings, count), strict=True):
                    sample.likeliest.append(tops[: sample.alternatives])
