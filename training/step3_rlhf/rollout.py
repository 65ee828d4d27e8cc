"""Generation and scoring of one iteration: one after the other, or fused at sample level."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from inference.chat_format import ChatFormat
from inference.generation.decoding import Decoding
from inference.generation.engine import GenerationEngine
from inference.generation.sample import Sample, SamplingKey, SamplingSettings
from training.calls import ACTOR_SCORE
from training.data.batching import TokenBatch, plan_micro_batches
from training.fusion.choice import Choice
from training.fusion.costs import Measured
from training.fusion.fusion import Fusion
from training.fusion.rollout import Report
from training.fusion.simulator import Job
from training.stage import Stage
from training.step3_rlhf.clock import Clock
from training.step3_rlhf.experience import Experience, token_batch
from training.step3_rlhf.gathering import gather_experience, gather_scores
from training.step3_rlhf.old_logprobs import iteration_calls
from training.step3_rlhf.roles import Roles


class Rollouts:
    """Those of a run: the engine that generates, the roles that score, what is known of fusion."""

    def __init__(self, stage: Stage, roles: Roles, chat_format: ChatFormat):
        self.stage, self.roles, self.chat_format = stage, roles, chat_format
        settings = stage.config.rlhf
        limit = stage.config.data.max_response_tokens
        self.sampling = SamplingSettings(limit, settings.temperature, min_tokens=settings.min_response_tokens)
        self.calls = iteration_calls(settings, stage.dtype, roles.exact is not None)
        scores_alone = not settings.divided_scorer and (ACTOR_SCORE not in self.calls or settings.actor.zero_stage < 3)
        self.fusion = Fusion(stage, roles.generation_layout, scores_alone)
        self.engine: GenerationEngine | None = None
        self.forced_lengths: Callable[[int], list[int]] | None = None
        """For measuring: iteration -> the length of each response."""

    def start(self, prompts: list[Tensor], seats: list[int], number: int, clock: Clock) -> "Rollout":
        """That of iteration `number`, its samples on their way. `seats` are the places of the prompts in the data."""
        choice, shares = self.fusion.choose(number), self.fusion.deal(seats)
        begun = time.perf_counter()
        with clock.phase("time/reallocate"):
            engine = self.generation_engine()
        limits = [self.sampling.max_tokens] * len(prompts)
        if self.forced_lengths is not None:
            limits = self.forced_lengths(number)
        ours = [Sample(index, prompts[index], limits[index]) for index in shares[self.fusion.place.instance]]
        largest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
        room = (0, 0) if choice.policy is None else (len(prompts), largest)  # for samples of other instances
        key = SamplingKey(self.stage.config.seed, number)
        decoding = engine.start(ours, self.sampling, key, may_end=self.forced_lengths is None, room=room)
        return Rollout(self, number, prompts, seats, choice, shares, decoding, clock, begun)

    def generation_engine(self) -> GenerationEngine:
        """Generates with the actor's present weights; its memory is kept from iteration to iteration."""
        model = self.roles.generator.run()
        assert model is not None
        if self.engine is None or self.engine.model is not model:
            chat_format, slots = self.chat_format, self.stage.config.rlhf.generation_batch
            exact = self.roles.exact
            self.engine = GenerationEngine(model, chat_format.end_ids, chat_format.pad_id, slots, exact=exact)
        self.engine.weights_changed()
        return self.engine

    def begin_scoring(self, rows: list[Experience]) -> Callable[[], list[Experience]]:
        """Start the forward passes of all roles on `rows`; what is returned waits for them and gives scored rows."""
        batch = token_batch(rows, self.stage.ranks.device)
        sizes = [len(e.response) for e in rows]
        taught = self.as_taught(rows) if self.stage.config.rlhf.has_reward_model else batch
        found = {
            call.outputs[0]: self.roles.score(call.role, taught if call.role == "reward" else batch)
            for call in self.calls
            if call.kind == "score"
        }

        def finish() -> list[Experience]:
            of_tokens = {key: values.cpu().split(sizes) for key, values in found.items() if key != "scores"}
            scores = found["scores"].tolist() if "scores" in found else [e.score for e in rows]
            return [
                replace(e, score=scores[i], **{key: of_rows[i] for key, of_rows in of_tokens.items()})
                for i, e in enumerate(rows)
            ]

        return finish

    def as_taught(self, rows: list[Experience]) -> TokenBatch:
        """The rows as the reward model was trained to read them: with one end, whatever token ended a response."""
        as_read = [(e.prompt, torch.tensor(self.chat_format.as_taught(e.response.tolist()))) for e in rows]
        return TokenBatch.of(as_read, self.stage.ranks.device)

    @property
    def numbers(self) -> list[str]:
        """What scoring finds for each token, by the names of Experience; scores are one a sample."""
        return [call.outputs[0] for call in self.calls if call.kind == "score" and call.role != "reward"]

    def work(self) -> dict[str, float]:
        """How full the slots were, and the rows decoded against the tokens kept; over all instances."""
        assert self.engine is not None
        stats = self.engine.stats if self.fusion.place.speaks else None  # an instance works on one batch
        shares = [share for share in self.stage.ranks.gather(stats) if share is not None]
        row_steps, slot_steps = sum(s.row_steps for s in shares), sum(s.decode_steps * s.slots for s in shares)
        return {
            "work/occupancy": row_steps / max(1, slot_steps),
            "work/row_steps": row_steps,
            "work/response_tokens": sum(s.response_tokens for s in shares),
            "work/prefilled_tokens": sum(s.prefilled_tokens for s in shares),
        }


@dataclass
class Rollout:
    """That of one iteration: all samples in order, scored, on all ranks."""

    rollouts: Rollouts
    number: int
    prompts: list[Tensor]
    seats: list[int]
    choice: Choice
    shares: list[list[int]]
    """The samples that each instance begins."""
    decoding: Decoding
    clock: Clock
    begun: float
    report: Report = field(default_factory=Report)
    """What fusion learns of."""

    @property
    def is_fused(self) -> bool:
        return self.choice.policy is not None

    def generate(self) -> list[Experience]:
        """Without fusion: all samples, not scored."""
        with self.clock.phase("time/generate"):
            ended: list[Sample] = []
            while not self.decoding.is_over:
                start = time.perf_counter()
                ended += [sample for sample in self.decoding.step() if sample.is_over]
                end = time.perf_counter()
                self.clock.timeline.add("generate", start, end)
                self.report.measured.append(Measured(end - start, work=self.decoding.work))
        with self.clock.phase("time/gather"):
            speaks = self.rollouts.fusion.place.speaks
            ours = [Experience.of(sample) for sample in ended] if speaks else []  # its group has the same
            return gather_experience(self.rollouts.stage.ranks, ours, self.prompts, ["generation_logprobs"])

    def score(self, experience: list[Experience]) -> list[Experience]:
        """Without fusion: all samples scored; each rank computes a like part of them."""
        ranks, budget = self.rollouts.stage.ranks, self.rollouts.stage.config.rlhf.micro_batch_tokens
        with self.clock.phase("time/score"), self.rollouts.roles.scoring(), self.clock.timeline.span("score"):
            scored: list[Experience] = []
            plan = plan_micro_batches([e.length for e in experience], budget, ranks.size)[ranks.rank]
            for micro_batch in plan:
                start = time.perf_counter()
                rows = self.rollouts.begin_scoring([experience[row] for row in micro_batch.rows])()
                tokens = sum(e.length for e in rows)
                self.report.measured.append(Measured(time.perf_counter() - start, scored=tokens))
                scored += rows if micro_batch.weight else []
        with self.clock.phase("time/gather"):
            return gather_scores(ranks, scored, experience, self.rollouts.numbers)

    def generate_and_score(self) -> list[Experience]:
        """Fused: the same samples with the same numbers."""
        fusion = self.rollouts.fusion

        def begin(samples: list[Sample]) -> Callable[[], list[Experience]]:
            return self.rollouts.begin_scoring([Experience.of(sample) for sample in samples])

        with fusion.board(self.number) as board:
            with self.clock.phase("time/generate_and_score"), self.rollouts.roles.scoring():
                scored, self.report = fusion.roll_out(
                    self.decoding, self.prompts, self.choice, board, begin, self.clock.timeline
                )
            with self.clock.phase("time/gather"):
                numbers = ["generation_logprobs", *self.rollouts.numbers]
                return gather_experience(self.rollouts.stage.ranks, scored, self.prompts, numbers)

    def learn(self, experience: list[Experience]) -> dict[str, float]:
        """What this rollout says of those to come; returns metrics."""
        achieved = time.perf_counter() - self.begun
        jobs = [Job(i, len(e.prompt), len(e.response)) for i, e in enumerate(experience)]
        return self.rollouts.fusion.learn(
            self.number, self.choice, self.shares, self.seats, jobs, self.report, achieved, self.decoding.cache
        )
