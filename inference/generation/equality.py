"""Does the engine generate what plain `transformers` gives? One check for every model, whole or cut over ranks.

Generation and comparison are apart, because all ranks of a tensor-parallel model generate and one of them compares.
"""

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from inference.generation.attention import can_pack
from inference.generation.cpu import Exactness
from inference.generation.engine import GenerationEngine
from inference.generation.passes import unwrapped
from inference.generation.sampler import Sample, SamplingKey, SamplingSettings

PROMPTS = 16
LONGEST_PROMPT = 48
NEW_TOKENS = 24
FEW_SLOTS = 3
STOPPING_SHARE = 20
"""One token in so many ends a response that is drawn again, so that responses end at different times."""
SEED = 20231107

TrainingLogprobs = Callable[[Sequence[tuple[Tensor, Tensor]]], Tensor]
"""Rows of (prompt ids, response ids) -> log p of the response tokens at temperature 1, float32, row by row."""


@dataclass(frozen=True)
class Work:
    """What the check generates."""

    prompts: list[Tensor]
    """Each int64 (length)."""
    new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int

    @classmethod
    def of(cls, vocabulary: int, pad_id: int, context_length: int = 0) -> "Work":
        """Random prompts of mixed lengths from token ids below `vocabulary`; shorter where the context is (0: none)."""
        longest, new_tokens = LONGEST_PROMPT, NEW_TOKENS
        if context_length:
            new_tokens = max(1, min(new_tokens, context_length // 3))
            longest = max(1, min(longest, context_length - new_tokens))
        generator = torch.Generator().manual_seed(SEED)
        lengths = [1, longest, *torch.randint(1, longest + 1, (PROMPTS - 3,), generator=generator).tolist()]
        usable = torch.arange(vocabulary)
        usable = usable[usable != pad_id]
        prompts = [usable[torch.randint(len(usable), (length,), generator=generator)] for length in lengths]
        stops = torch.randperm(vocabulary, generator=generator)[: vocabulary // STOPPING_SHARE]
        return cls([*prompts, prompts[-1]], new_tokens, tuple(stops.tolist()), pad_id)  # the last two share a prefill


@dataclass(frozen=True)
class Generated:
    """What the engine made of the work; samples in the order of their prompts."""

    greedy: list[Sample]
    sampled: list[Sample]
    sampled_again: dict[str, list[Sample]]
    """The same draws under other circumstances, which it names, and each up to its first stop token."""
    is_packed: bool
    """Packed attention, or the family's own on padded rows."""
    seconds: float


@dataclass(frozen=True)
class Tolerance:
    """Most deviation of a log-probability, in nats: of each token, or (`of_mean`) of all tokens on average."""

    limit: float
    of_mean: bool

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Tolerance":
        """fp32 differs by the order of sums alone; in 16 bit, logits near 16 are 1/16 (fp16: 1/64) apart."""
        return cls(1e-4, of_mean=False) if dtype == torch.float32 else cls(0.1, of_mean=True)

    def beside(self, own: "Deviation") -> "Tolerance":
        """Wider for a model that rounds more: three times what plain deviates from itself, up to ten times as wide."""
        return replace(self, limit=min(max(self.limit, 3 * own.judged(self)), 10 * self.limit))


@dataclass(frozen=True)
class Deviation:
    """How far a quantity of the engine's tokens is from what it should be, in nats."""

    name: str
    tokens: int
    mean: float
    largest: float
    where: str
    """The token with the largest."""

    def judged(self, tolerance: Tolerance) -> float:
        return self.mean if tolerance.of_mean else self.largest

    def is_within(self, tolerance: Tolerance) -> bool:
        return self.judged(tolerance) <= tolerance.limit  # false for NaN


@dataclass(frozen=True)
class Redraw:
    """Samples that were drawn again under other circumstances."""

    name: str
    same: int
    samples: int


@dataclass(frozen=True)
class Findings:
    deviations: tuple[Deviation, ...]
    redraws: tuple[Redraw, ...]
    own: Deviation
    """How far plain is from itself, each sample alone against all in one batch: what rounding does to this model."""
    tolerance: Tolerance
    """What holds for this model."""

    @property
    def is_equal(self) -> bool:
        return all(deviation.is_within(self.tolerance) for deviation in self.deviations) and not self.wrong_redraws

    @property
    def wrong_redraws(self) -> list[Redraw]:
        """Draws that are not the same; in 16 bit none counts, as rounding differs between batch sizes."""
        return [] if self.tolerance.of_mean else [redraw for redraw in self.redraws if redraw.same < redraw.samples]

    @property
    def worst(self) -> Deviation:
        """The largest of what the tolerance judges; NaN counts as infinite."""

        def size(deviation: Deviation) -> float:
            value = deviation.judged(self.tolerance)
            return math.inf if math.isnan(value) else value

        return max(self.deviations, key=size)

    @property
    def verdict(self) -> str:
        """A sentence with the largest deviation and where it is."""
        worst, limit = self.worst, f"{self.tolerance.limit:.2g} is allowed"
        if self.tolerance.of_mean:
            size = f"the largest mean deviation is {worst.mean:.2g} ({worst.name}; at most {worst.largest:.2g}, "
        else:
            size = f"the largest deviation is {worst.largest:.2g} ({worst.name}, "
        text = f"{size}{worst.where}); {limit}"
        if not worst.is_within(self.tolerance):
            return f"NOT equal: {text}."
        if self.wrong_redraws:
            wrong = self.wrong_redraws[0]
            return f"NOT equal: {wrong.samples - wrong.same} of {wrong.samples} {wrong.name} differ; {text}."
        return f"equal: {text}."


def generate(model: nn.Module, work: Work) -> Generated:
    """Let `model`, perhaps this rank's part of one, do the work."""
    start = time.perf_counter()
    greedy = SamplingSettings(work.new_tokens, temperature=0)
    drawn = SamplingSettings(work.new_tokens, temperature=1)
    forward = list(range(len(work.prompts)))

    many, few = (GenerationEngine(model, (), work.pad_id, slots) for slots in (len(forward), FEW_SLOTS))

    def run(engine: GenerationEngine, settings: SamplingSettings, order: list[int]) -> list[Sample]:
        samples = engine.generate([work.prompts[i] for i in order], settings, SamplingKey(SEED), indices=order)
        return sorted(samples, key=lambda sample: sample.index)

    whole = run(many, greedy, forward), run(many, drawn, forward)  # nothing ends a response before its limit
    many.end_ids = few.end_ids = work.stop_ids
    return Generated(
        *whole,
        {
            "samples drawn again in another order": run(many, drawn, forward[::-1]),
            f"samples drawn again on {FEW_SLOTS} slots": run(few, drawn, forward),
        },
        can_pack(unwrapped(model)),
        time.perf_counter() - start,
    )


def compare(
    generated: Generated,
    plain: nn.Module,
    work: Work,
    tolerance: Tolerance,
    training: TrainingLogprobs | None = None,
) -> Findings:
    """Put what was generated beside a forward pass of `plain`, and beside the forward pass of `training`.

    `plain` is in evaluation mode and may be the module that generated. `tolerance` is that of a model whose rounding is
    unknown.
    """
    greedy, sampled = generated.greedy, generated.sampled
    forced = [list(plain_logprobs(plain, samples, work.pad_id)) for samples in (greedy, sampled)]
    behind = [likeliest - chosen for chosen, likeliest in forced[0]]
    deviations = [
        deviation("greedy tokens, behind plain's likeliest", greedy, behind),
        deviation("greedy log-probabilities", greedy, differences(greedy, [chosen for chosen, _ in forced[0]])),
        deviation("sampled log-probabilities", sampled, differences(sampled, [chosen for chosen, _ in forced[1]])),
    ]
    if training is not None:
        rows = [(sample.prompt_ids, torch.tensor(sample.response_ids)) for sample in sampled]
        theirs = training(rows).float().cpu().split([len(sample.response_ids) for sample in sampled])
        deviations.append(deviation("training's log-probabilities", sampled, differences(sampled, theirs)))
    expected = [up_to_stop(sample.response_ids, work.stop_ids) for sample in sampled]
    redraws = [
        Redraw(name, sum(ids == sample.response_ids for ids, sample in zip(expected, again, strict=True)), len(again))
        for name, again in generated.sampled_again.items()
    ]
    alone = [next(plain_logprobs(plain, [sample], work.pad_id))[0] for sample in sampled]
    selves = [(a - b).abs() for a, (b, _) in zip(alone, forced[1], strict=True)]
    own = deviation("(plain with itself, alone or in a batch)", sampled, selves)
    return Findings(tuple(deviations), tuple(redraws), own, tolerance.beside(own))


def training_gap(model: nn.Module, work: Work, training: TrainingLogprobs, exact: Exactness) -> float:
    """The largest difference, in nats a token, of samples drawn with an engine that computes like `training`."""
    engine = GenerationEngine(model, (), work.pad_id, FEW_SLOTS, exact=exact)
    settings = SamplingSettings(work.new_tokens, temperature=1)
    samples = list(engine.generate(work.prompts, settings, SamplingKey(SEED)))
    theirs = training([(sample.prompt_ids, torch.tensor(sample.response_ids)) for sample in samples])
    ours = torch.cat([torch.tensor(sample.logprobs) for sample in samples])
    return float((ours - theirs.float().cpu()).abs().max())


def up_to_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """The tokens up to the first stop token and with it; all where there is none."""
    stops = set(stop_ids)
    first = next((index for index, token in enumerate(ids) if token in stops), len(ids))
    return ids[: first + 1]


@torch.inference_mode()
def plain_logprobs(plain: nn.Module, samples: Sequence[Sample], pad_id: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One forward pass over all samples, left-padded as for transformers' own `generate`.

    Yields for each sample log p of its response tokens and of the likeliest tokens there, float32 (response) each.
    """
    called: Any = plain
    accepted = inspect.signature(called.forward).parameters
    ids, mask = left_pad([torch.cat([s.prompt_ids, torch.tensor(s.response_ids)]) for s in samples], pad_id)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in accepted:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    device = next(plain.parameters()).device
    inputs = {name: values.to(device) for name, values in inputs.items()}
    fewer = {"logits_to_keep": max(len(s.response_ids) for s in samples) + 1} if "logits_to_keep" in accepted else {}
    logits = called(**inputs, **fewer, use_cache=False).logits  # rows end at the right
    for row, sample in zip(logits, samples, strict=True):
        count = len(sample.response_ids)
        logprobs = row[-count - 1 : -1].float().log_softmax(-1).cpu()
        yield logprobs.gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0], logprobs.max(-1).values


def left_pad(sequences: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Sequences (length) of any lengths -> ids and mask, both int64 (rows, longest), ending at the right."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = sequence
        mask[row, longest - len(sequence) :] = 1
    return ids, mask


def differences(samples: Sequence[Sample], logprobs: Sequence[Tensor]) -> list[Tensor]:
    """How far the engine's log-probabilities are from others, (response) for each sample."""
    return [(torch.tensor(s.logprobs) - other).abs() for s, other in zip(samples, logprobs, strict=True)]


def deviation(name: str, samples: Sequence[Sample], values: Sequence[Tensor]) -> Deviation:
    """Summarise values (response) of each sample, all at least 0."""
    flat = torch.cat(list(values)).double()
    index = int(flat.argmax())  # NaN counts as the largest
    sample, number = [(sample, n) for sample, own in zip(samples, values, strict=True) for n in range(len(own))][index]
    where = f"token {number + 1} after prompt {sample.index + 1} of {len(sample.prompt_ids)} tokens"
    return Deviation(name, len(flat), float(flat.mean()), float(flat[index]), where)
