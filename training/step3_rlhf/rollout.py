"""Generation and scoring of one iteration: one after the other, or fused at sample level."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from inference.chat_format import ChatFormat
from inference.chat_model import pieces_of, whole_text
from inference.generation.engine import Decoding, GenerationEngine
from inference.generation.sampler import Sample, SamplingKey, SamplingSettings
from training.calls import ACTOR_GENERATE, Call
from training.data.batching import TokenBatch
from training.fusion.board import SampleLengths
from training.fusion.choice import FusionChoice
from training.fusion.costs import Measured, deal
from training.fusion.fused_rollout import Report
from training.fusion.inter_stage import Fusion
from training.plan import Assignment, Plan, most_generated
from training.rewards import Rewarded
from training.rlhf_settings import RLHFSettings
from training.stage import Stage
from training.step3_rlhf import ppo_math
from training.step3_rlhf.experience import Experience, gather_experience, gather_scores, token_batch
from training.step3_rlhf.roles import Roles
from training.step3_rlhf.timing import Clock
from training.step3_rlhf.update import Batch


def scores_alone(plan: Plan, ranks: int) -> bool:
    """Whether every rank generates, and scores in all roles alone and at any time: then stages can be fused."""
    layouts = [assignment.layout for name, assignment in plan.assignments.items() if not name.endswith("_train")]
    scoring = [assignment for name, assignment in plan.assignments.items() if name.endswith("_score")]
    everywhere = all(layout.mesh == tuple(range(ranks)) for layout in layouts)
    return everywhere and all(assignment.layout.is_whole and not assignment.offload for assignment in scoring)


class Rollouts:
    """Makes the rollouts of a run, with the engine that generates, the roles that score and what fusion knows."""

    def __init__(self, stage: Stage, roles: Roles, chat_format: ChatFormat):
        self.stage, self.roles, self.chat_format = stage, roles, chat_format
        settings = stage.config.rlhf
        limit = stage.config.data.max_response_tokens
        self.sampling = SamplingSettings(limit, settings.temperature, min_tokens=settings.min_response_tokens)
        self.generation = roles.positions.get(ACTOR_GENERATE.name)
        """None where this rank does not generate."""
        self.scoring = [call for call in roles.calls if call.kind == "score"]
        self.fusion = Fusion(stage, roles.plan[ACTOR_GENERATE.name], scores_alone(roles.plan, stage.ranks.size))
        self.engine: GenerationEngine | None = None
        self.forced_lengths: Callable[[int], list[int]] | None = None
        """Iteration -> the length of each response, for measurements."""

    def start(self, prompts: list[Tensor], prompt_rows: list[int], number: int, clock: Clock) -> "Rollout":
        """Start that of iteration `number`. `prompt_rows` are the rows of the prompts in the data."""
        choice, shares = self.fusion.choose(number), self.fusion.deal(prompt_rows)
        key = SamplingKey(self.stage.seed, number)
        limits = None if self.forced_lengths is None else self.forced_lengths(number)
        return self._begin(prompts, prompt_rows, key, choice, shares, clock, limits)

    def _begin(
        self,
        prompts: list[Tensor],
        prompt_rows: list[int],
        key: SamplingKey,
        choice: FusionChoice,
        shares: list[list[int]],
        clock: Clock,
        lengths: list[int] | None = None,
    ) -> "Rollout":
        begun = time.perf_counter()
        with clock.phase("time/reallocate"), clock.calls.span("reallocation"):
            engine = self.generation_engine()
        limits = lengths or [self.sampling.max_tokens] * len(prompts)
        decoding = None
        if engine is not None:
            ours = [Sample(index, prompts[index], limits[index]) for index in shares[self.fusion.position.instance]]
            largest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
            room = (0, 0) if choice.policy is None else (len(prompts), largest)  # for samples of other instances
            decoding = engine.start(ours, self.sampling, key, may_end=lengths is None, room=room)
        return Rollout(self, key.iteration, prompts, prompt_rows, choice, shares, decoding, clock, begun)

    def generation_engine(self) -> GenerationEngine | None:
        """Return an engine with the actor's present weights, the same one each time; None where this rank does not
        generate. All ranks call it."""
        model = self.roles.generator()
        if model is None or self.generation is None:
            return None
        if self.engine is None or self.engine.model is not model:
            settings, chat_format = self.stage.config.rlhf, self.chat_format
            samples = settings.prompts_per_iteration * settings.samples_per_prompt
            slots = self.generation.assignment.together(samples)
            most = -(-most_generated(settings) // self.generation.assignment.layout.data)
            room = most, self.stage.config.data.longest
            self.engine = GenerationEngine(
                model, chat_format.end_ids, chat_format.pad_id, slots, exact=self.roles.exact, room=room
            )
        self.engine.weights_changed()
        return self.engine

    def end(self) -> None:
        """Free the memory of generation, if the settings say so. All ranks call it."""
        if self.stage.config.rlhf.release_generation:
            self.roles.release(ACTOR_GENERATE)
            if self.engine is not None:
                self.engine.release()

    def answers(self, prompts: list[Tensor], key: SamplingKey, scored: bool = True) -> list[Experience]:
        """Return the present policy's answers, in the order of the prompts. Nothing is learned from them, neither by
        the policy nor by fusion. All ranks call it and get the same."""
        choice = FusionChoice(None, "nothing is learned from it")
        shares = deal([1.0] * len(prompts), self.fusion.position.layout.data)
        rollout = self._begin(prompts, [], key, choice, shares, Clock())
        experience = rollout.generate()
        experience = rollout.score(experience) if scored else experience
        self.end()
        return experience

    @property
    def scored_together(self) -> list[list[Call]]:
        """The calls that score, in groups of one assignment, which share micro-batches. A call whose weights wait in
        host memory is alone, so that they are loaded once, and no others with them."""
        groups: dict[tuple[Assignment, str], list[Call]] = {}
        for call in self.scoring:
            assignment = self.roles.plan[call.name]
            groups.setdefault((assignment, call.name if assignment.offload else ""), []).append(call)
        return list(groups.values())

    def begin_scoring(self, rows: list[Experience], calls: Sequence[Call] = ()) -> Callable[[], list[Experience]]:
        """Start the forward passes of `calls` (default: all that score) on `rows`; what is returned waits for them and
        gives scored rows."""
        calls = calls or self.scoring
        batches = {is_taught: self.read(rows, is_taught) for is_taught in {call.role == "reward" for call in calls}}
        outputs = {call.outputs[0]: self.roles.score(call.role, [batches[call.role == "reward"]])[0] for call in calls}
        return lambda: with_outputs(rows, outputs)

    def score_in_stages(self, shares: list[list[Experience]], call: Call) -> list[list[Experience]]:
        """Return micro-batches scored by a call that runs in stages; unscored on all stages but the last."""
        outputs = self.roles.score(call.role, [self.read(rows, call.role == "reward") for rows in shares])
        if not outputs:
            return shares
        return [with_outputs(rows, {call.outputs[0]: values}) for rows, values in zip(shares, outputs, strict=True)]

    def read(self, rows: list[Experience], is_taught: bool) -> TokenBatch:
        """Return the rows as they were generated, or as the reward model was taught to read them."""
        return self.as_taught(rows) if is_taught else token_batch(rows, self.stage.ranks.device)

    def as_taught(self, rows: list[Experience]) -> TokenBatch:
        """Return the rows as the reward model was taught to read them: with one end, whatever token ended a
        response."""
        as_read = [(e.prompt, torch.tensor(self.chat_format.as_taught(e.response.tolist()))) for e in rows]
        return TokenBatch.of(as_read, self.stage.ranks.device)

    def work(self) -> dict[str, float]:
        """Measure how full the slots were, and the rows decoded against the tokens generated; over all instances."""
        speaks = self.engine is not None and self.fusion.position.speaks
        stats = self.engine.stats if self.engine is not None and speaks else None  # an instance works on one batch
        shares = [share for share in self.stage.ranks.gather(stats) if share is not None]
        row_steps, slot_steps = sum(s.row_steps for s in shares), sum(s.decode_steps * s.slots for s in shares)
        return {
            "work/occupancy": row_steps / max(1, slot_steps),
            "work/row_steps": row_steps,
            "work/response_tokens": sum(s.response_tokens for s in shares),
            "work/prefilled_tokens": sum(s.prefilled_tokens for s in shares),
        }


def with_outputs(rows: list[Experience], outputs: dict[str, Tensor]) -> list[Experience]:
    """Return the rows with the outputs of calls: scores (rows), all else (response tokens of all rows)."""
    sizes = [len(e.response) for e in rows]
    of_tokens = {key: values.cpu().split(sizes) for key, values in outputs.items() if key != "scores"}
    scores = outputs["scores"].tolist() if "scores" in outputs else [e.score for e in rows]
    return [
        replace(e, score=scores[i], **{key: of_rows[i] for key, of_rows in of_tokens.items()})
        for i, e in enumerate(rows)
    ]


@dataclass
class Rollout:
    """Generates and scores the samples of one iteration; all ranks get all of them, in order."""

    rollouts: Rollouts
    number: int
    prompts: list[Tensor]
    prompt_rows: list[int]
    choice: FusionChoice
    shares: list[list[int]]
    """The samples that each instance begins."""
    decoding: Decoding | None
    """None where this rank does not generate."""
    clock: Clock
    begun: float
    report: Report = field(default_factory=Report)
    """What fusion learns from."""

    @property
    def is_fused(self) -> bool:
        return self.choice.policy is not None

    def generate(self) -> list[Experience]:
        """Return all samples, not scored; without fusion."""
        with self.clock.phase("time/generate"):
            ended: list[Sample] = []
            while self.decoding is not None and not self.decoding.is_over:
                start = time.perf_counter()
                ended += [sample for sample in self.decoding.step() if sample.is_over]
                end = time.perf_counter()
                self.clock.timeline.add("generate", start, end)
                self.clock.calls.add(ACTOR_GENERATE.name, start, end)
                self.report.measured.append(Measured(end - start, work=self.decoding.work))
        with self.clock.phase("time/gather"):
            speaks = self.rollouts.fusion.position.speaks
            ours = [Experience.of(sample) for sample in ended] if speaks else []  # its group has the same
            return gather_experience(self.rollouts.stage.ranks, ours, self.prompts, ["generation_logprobs"])

    def score(self, experience: list[Experience]) -> list[Experience]:
        """Return all samples scored, without fusion; the ranks of a call compute equal parts of them."""
        groups, ranks = self.rollouts.scored_together, self.rollouts.stage.ranks
        with self.clock.phase("time/score"), ExitStack() as stack, self.clock.timeline.span("score"):
            with self.clock.calls.span("reallocation"):
                stack.enter_context(self.rollouts.roles.scoring())
            scored = [self._scored(experience, calls) for calls in groups]
        with self.clock.phase("time/gather"):
            for calls, ours in zip(groups, scored, strict=True):
                experience = gather_scores(ranks, ours, experience, [call.outputs[0] for call in calls])
        return experience

    def _scored(self, experience: list[Experience], calls: Sequence[Call]) -> list[Experience]:
        """Score this rank's part of the samples, in calls that share micro-batches."""
        position = self.rollouts.roles.positions.get(calls[0].name)
        if position is None:
            return []
        scored: list[Experience] = []
        with ExitStack() as stack:
            with self.clock.calls.span("offload"):
                stack.enter_context(self.rollouts.roles.present(calls))
            micro_batches = position.micro_batches([e.length for e in experience])
            shares = [[experience[row] for row in micro_batch.rows] for micro_batch in micro_batches]
            if position.cut is not None:
                for call in calls:
                    with self.clock.calls.span(call.name):
                        shares = self.rollouts.score_in_stages(shares, call)
            for micro_batch, rows in zip(micro_batches, shares, strict=True):
                if position.cut is None:
                    rows = self._scored_rows(rows, calls)
                scored += rows if micro_batch.weight else []
        return scored if position.speaks else []

    def _scored_rows(self, rows: list[Experience], calls: Sequence[Call]) -> list[Experience]:
        """Score a micro-batch, and measure it."""
        start = time.perf_counter()
        for call in calls:
            with self.clock.calls.span(call.name):
                rows = self.rollouts.begin_scoring(rows, [call])()
        tokens = sum(e.length for e in rows)
        self.report.measured.append(Measured(time.perf_counter() - start, scored=tokens))
        return rows

    def generate_and_score(self) -> list[Experience]:
        """Return the same samples with the same numbers, fused."""
        fusion = self.rollouts.fusion
        assert self.decoding is not None  # every rank generates and scores

        def begin(samples: list[Sample]) -> Callable[[], list[Experience]]:
            return self.rollouts.begin_scoring([Experience.of(sample) for sample in samples])

        with fusion.board(self.number) as board:
            with self.clock.phase("time/generate_and_score"), self.rollouts.roles.scoring():
                scored, self.report = fusion.roll_out(
                    self.decoding, self.prompts, self.choice, board, begin, self.clock.timeline
                )
            with self.clock.phase("time/gather"):
                outputs = [call.outputs[0] for call in self.rollouts.scoring if call.role != "reward"]
                numbers = ["generation_logprobs", *outputs]
                return gather_experience(self.rollouts.stage.ranks, scored, self.prompts, numbers)

    def learn(self, experience: list[Experience]) -> dict[str, float]:
        """Let fusion learn from this rollout for those to come; returns metrics."""
        achieved = time.perf_counter() - self.begun
        samples = [SampleLengths(i, len(e.prompt), len(e.response)) for i, e in enumerate(experience)]
        return self.rollouts.fusion.learn(
            self.number, self.choice, self.shares, self.prompt_rows, samples, self.report, achieved, self.decoding
        )


DECIMALS = 5


def rollout_lines(
    batch: Batch, rewarded: Rewarded, chat_format: ChatFormat, settings: RLHFSettings
) -> Iterator[dict[str, Any]]:
    """Return a line for each sample, in their order. Rewards are those whose means are metrics; lists of numbers have
    one for each token of the response."""
    targets, tokenizer = batch.targets, chat_format.tokenizer
    by_token = {"logprobs": targets.logprobs, "advantages": targets.advantages}
    if settings.has_reference:
        by_token["kl"] = ppo_math.kl_k1(targets.logprobs, targets.reference_logprobs)
    if settings.has_critic:
        by_token["values"] = targets.values
    numbers = {name: rounded(values) for name, values in by_token.items()}
    penalty, total = rounded(targets.kl_penalty), rounded(targets.total_score - targets.kl_penalty)
    for i, sample in enumerate(batch.experience):
        tokens = pieces_of(sample.response.tolist(), tokenizer)
        yield {
            "sample": i,
            "row": batch.prompt_rows[i],
            "prompt": whole_text(sample.prompt.tolist(), tokenizer),
            "response": "".join(tokens),
            "truncated": not sample.ended,
            **{f"reward/{source}": scores[i] for source, (scores, _) in rewarded.parts.items()},
            "reward/score": sample.score,
            "reward/missing_end": 0.0 if sample.ended else -settings.missing_end_penalty,
            "reward/kl": -penalty[i],
            "reward/total": total[i],
            "tokens": tokens,
            **{name: values[i][: len(tokens)] for name, values in numbers.items()},
            "prompt_ids": sample.prompt.tolist(),
            "response_ids": sample.response.tolist(),
        }


def rounded(values: Tensor) -> list[Any]:
    """Return the values as floats that are short to write."""
    return ((values.double() * 10**DECIMALS).round() / 10**DECIMALS).tolist()
