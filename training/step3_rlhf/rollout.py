"""Generation and scoring of one iteration: one after the other, or fused at sample level."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from inference.chat_format import ChatFormat
from inference.generation.decoding import Decoding
from inference.generation.engine import GenerationEngine
from inference.generation.sample import Sample, SamplingKey, SamplingSettings
from training.calls import rlhf_calls, with_recomputed_logprobs
from training.data.batching import TokenBatch, plan_micro_batches
from training.fusion.aside import Aside
from training.fusion.board import Board
from training.fusion.choice import NOMINAL, Choice, FusionChoice, Setting
from training.fusion.costs import Measured, measure_bandwidth
from training.fusion.lengths import LengthStatistics, deal
from training.fusion.rollout import FusedRollout, Place, Report
from training.fusion.simulator import Job
from training.fusion.timeline import Timeline
from training.stage import Stage
from training.step3_rlhf.experience import Experience, token_batch
from training.step3_rlhf.gathering import gather_experience, gather_scores
from training.step3_rlhf.roles import Roles

UNIT_TOKENS = {"cpu": 128, "cuda": 2048}
"""Tokens that keep a device busy when they are scored alone."""


class Rollout:
    """Prompts -> experience; its engine, length statistics and fusion policy live as long as the run."""

    def __init__(self, stage: Stage, roles: Roles, chat_format: ChatFormat):
        self.stage, self.settings, self.ranks, self.roles = stage, stage.config.rlhf, stage.ranks, roles
        self.chat_format = chat_format
        self.layout = roles.generation_layout
        self.place = Place(self.ranks.rank, self.layout)
        limit = stage.config.data.max_response_tokens
        self.sampling = SamplingSettings(limit, self.settings.temperature, min_tokens=self.settings.min_response_tokens)
        whole_distribution = self.settings.min_response_tokens == 0
        self.keeps_generation_logprobs = self.settings.old_logprobs == "generation" or (
            self.settings.old_logprobs == "auto" and stage.dtype == torch.float32 and whole_distribution
        )
        calls = rlhf_calls(self.settings.advantage, self.settings.has_reward_model)
        self.calls = calls if self.keeps_generation_logprobs else with_recomputed_logprobs(calls)
        """What an iteration runs, and what the planner plans."""
        scored = [call.outputs[0] for call in self.calls if call.kind == "score"]
        self.scored_numbers = [key for key in scored if key != "scores"]
        """What scoring finds for each token; scores are one a sample."""
        self.engine: GenerationEngine | None = None
        self.forced_lengths: Callable[[int], list[int]] | None = None
        """For measuring: iteration -> the length of each response."""
        self.seconds: dict[str, float] = {}
        """By phase, of the present iteration."""
        self.timeline = Timeline()
        fusion = self.settings.fusion
        self.fusion = FusionChoice(
            Setting(
                mode="none" if self._cannot_fuse() else fusion.mode,
                instances=self.layout.data,
                tensor=self.layout.tensor,
                slots=self.settings.generation_batch,
                samples=self.settings.prompts_per_iteration * self.settings.samples_per_prompt,
                micro_batch_tokens=self.settings.micro_batch_tokens,
                unit_tokens=UNIT_TOKENS.get(self.ranks.device.type, 2048),
                threshold=fusion.threshold,
                rows=fusion.rows,
                overlaps=self.ranks.device.type == "cuda",
                seed=stage.config.seed,
            ),
            LengthStatistics(limit),
        )
        self.bandwidth = 0.0
        """Bytes a second between instances, once it is measured."""
        self.report = Report()
        self.fusion_metrics: dict[str, float] = {}
        self.choice: Choice | None = None
        """For the present iteration."""

    def _cannot_fuse(self) -> str:
        """Why no rank can score alone; '' if each can."""
        divided = self.settings.divided_scorer
        if not divided and not self.keeps_generation_logprobs and self.settings.actor.zero_stage == 3:
            divided = "actor"  # old log-probabilities are computed anew
        return f"the {divided} is divided over ranks" if divided else ""

    def run(self, prompts: list[Tensor], seats: list[int], number: int) -> list[Experience]:
        """All samples of iteration `number` in order, scored, on all ranks.

        `seats` are the places of the prompts in their data set: what is known of their lengths is known by these.
        """
        self.seconds, self.timeline, self.report = {}, Timeline(), Report()
        choice = self._choose(number)
        if choice != self.choice:
            self.stage.display.say(f"PPO iteration {number}: {choice}")
            self.choice = choice
        shares = deal([self.fusion.lengths.expected(seat) for seat in seats], self.layout.data)
        begun = time.perf_counter()
        decoding = self._start(prompts, shares[self.place.instance], number, room=choice.policy is not None)
        if choice.policy is None:
            experience = self.score(self.generate(decoding, prompts))
        else:
            experience = self._fused(decoding, prompts, choice, number)
        if self._learns:
            self._learn(choice, shares, seats, experience, time.perf_counter() - begun, number)
        return experience

    def _choose(self, number: int) -> Choice:
        """One rank decides for all."""
        if self.ranks.is_first:
            self.fusion.next(number)
        told = self.ranks.tell(self.fusion.decided(), "the choice of fusion")
        if not self.ranks.is_first:
            self.fusion.take(told)
        assert self.fusion.current is not None
        return self.fusion.current

    @property
    def _learns(self) -> bool:
        setting = self.fusion.setting
        return setting.mode != "none" and (setting.instances > 1 or setting.overlaps)

    def _start(self, prompts: list[Tensor], share: list[int], number: int, room: bool) -> Decoding:
        """This instance's samples on their way; with room for those of others if wanted."""
        with self.timed("reallocate"):
            engine = self.generation_engine()
        limits = [self.sampling.max_tokens] * len(prompts)
        if self.forced_lengths is not None:
            limits = self.forced_lengths(number)
        samples = [Sample(index, prompts[index], limits[index]) for index in share]
        largest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
        key = SamplingKey(self.stage.config.seed, number)
        free = (len(prompts), largest) if room else (0, 0)
        return engine.start(samples, self.sampling, key, may_end=self.forced_lengths is None, room=free)

    def generate(self, decoding: Decoding, prompts: list[Tensor]) -> list[Experience]:
        """Without fusion: all samples, in order, on all ranks."""
        with self.timed("generate"):
            ended: list[Sample] = []
            while not decoding.is_over:
                start = time.perf_counter()
                ended += [sample for sample in decoding.step() if sample.is_over]
                end = time.perf_counter()
                self.timeline.add("generate", start, end)
                self.report.measured.append(Measured(end - start, work=decoding.work))
        with self.timed("gather"):
            ours = [Experience.of(sample) for sample in ended] if self.place.speaks else []  # its group has the same
            return gather_experience(self.ranks, ours, prompts, ["generation_logprobs"])

    def score(self, experience: list[Experience]) -> list[Experience]:
        """Without fusion: all samples scored, on all ranks; each rank computes a like part of them."""
        with self.timed("score"), self.roles.scoring(), self.timeline.span("score"):
            scored: list[Experience] = []
            lengths = [e.length for e in experience]
            plans = plan_micro_batches(lengths, self.settings.micro_batch_tokens, self.ranks.size)
            for micro_batch in plans[self.ranks.rank]:
                start = time.perf_counter()
                rows = self.begin_scoring([experience[row] for row in micro_batch.rows])()
                tokens = sum(e.length for e in rows)
                self.report.measured.append(Measured(time.perf_counter() - start, scored=tokens))
                scored += rows if micro_batch.weight else []
        with self.timed("gather"):
            return gather_scores(self.ranks, scored, experience, self.scored_numbers)

    def _fused(self, decoding: Decoding, prompts: list[Tensor], choice: Choice, number: int) -> list[Experience]:
        """Generation and scoring woven together; the same samples with the same numbers."""
        assert choice.policy is not None
        board = Board(f"rollout/{number}", self.ranks.roll_call)
        aside = Aside(lambda samples: self.begin_scoring([Experience.of(s) for s in samples]), self.ranks.device)
        costs = self.fusion.costs or NOMINAL
        rollout = FusedRollout(
            self.place,
            decoding,
            prompts,
            board,
            choice.policy,
            costs,
            self.fusion.lengths.remaining,
            {"auto": costs.moves_cache, "cache": lambda tokens: True, "tokens": lambda tokens: False}[
                self.settings.fusion.move
            ],
            aside,
            self.timeline,
        )
        with self.timed("generate_and_score"), self.roles.scoring():
            scored = rollout.run()
        self.report = rollout.report
        with self.timed("gather"):
            numbers = ["generation_logprobs", *self.scored_numbers]
            experience = gather_experience(self.ranks, scored, prompts, numbers)
        board.clear()  # all ranks have met in the gathering: nobody reads any more
        return experience

    def begin_scoring(self, rows: list[Experience]) -> Callable[[], list[Experience]]:
        """Start the forward passes of all roles on `rows`; what is returned waits for them and fills the rows in."""
        batch = token_batch(rows, self.ranks.device)
        sizes = [len(e.response) for e in rows]
        taught = self.as_taught(rows) if self.settings.has_reward_model else batch
        found = {
            call.outputs[0]: self.roles.score(call.role, taught if call.role == "reward" else batch)
            for call in self.calls
            if call.kind == "score"
        }

        def finish() -> list[Experience]:
            for key, values in found.items():
                if key == "scores":  # one a row
                    for e, score in zip(rows, values.tolist(), strict=True):
                        e.score = score
                else:
                    for e, of_row in zip(rows, values.cpu().split(sizes), strict=True):
                        setattr(e, key, of_row)
            return rows

        return finish

    def as_taught(self, rows: list[Experience]) -> TokenBatch:
        """The rows as the reward model was trained to read them: with one end, whatever token ended a response."""
        as_read = [(e.prompt, torch.tensor(self.chat_format.as_taught(e.response.tolist()))) for e in rows]
        return TokenBatch.of(as_read, self.ranks.device)

    def _learn(
        self,
        choice: Choice,
        shares: list[list[int]],
        seats: list[int],
        experience: list[Experience],
        achieved: float,
        number: int,
    ) -> None:
        """Lengths and costs of this rollout, for the choices to come."""
        if not self.bandwidth:
            self.bandwidth = measure_bandwidth(self.place, self.ranks.device)
        by_prompt: dict[int, list[int]] = {}
        for seat, e in zip(seats, experience, strict=True):
            by_prompt.setdefault(seat, []).append(len(e.response))
        jobs = [[Job(i, len(experience[i].prompt), len(experience[i].response)) for i in share] for share in shares]
        report = self.report
        found = achieved, self.bandwidth, report.measured, report.repackings, report.moved
        gathered = self.ranks.gather_on_first(found, "the costs of a rollout")
        if not gathered:
            self.fusion.note(jobs, by_prompt)
            return
        of_ranks, bandwidths, measured, repackings, moved = zip(*gathered, strict=True)
        assert self.engine is not None
        kept = self.engine.cache.empty(1)
        achieved = max(of_ranks)
        predicted = self.fusion.learn(
            jobs,
            by_prompt,
            achieved,
            [m for of_rank in measured for m in of_rank],
            min(bandwidths),
            kept.numel() * kept.element_size(),
        )
        self.fusion_metrics = {"time/fusion_achieved": achieved, "time/fusion_predicted": predicted}
        if choice.policy is not None:
            self.stage.display.say(
                f"PPO iteration {number}: fusion: {max(repackings)} repackings moved "
                f"{sum(moved) // self.layout.tensor} samples; generation and scoring took "
                f"{achieved:.2f} s" + (f", {predicted:.2f} s predicted for these lengths" if predicted else "")
            )

    def generation_engine(self) -> GenerationEngine:
        """Generates with the actor's present weights; its memory is kept from iteration to iteration."""
        model = self.roles.generator.refresh()
        if self.engine is None or self.engine.model is not model:
            chat_format, slots = self.chat_format, self.settings.generation_batch
            self.engine = GenerationEngine(model, chat_format.end_ids, chat_format.pad_id, slots)
        self.engine.weights_changed()
        return self.engine

    def work(self) -> dict[str, float]:
        """How full the slots were, and the rows decoded against the tokens kept; over all instances."""
        assert self.engine is not None
        stats = self.engine.stats if self.place.speaks else None  # an instance works on one batch
        shares = [share for share in self.ranks.gather(stats) if share is not None]
        row_steps, slot_steps = sum(s.row_steps for s in shares), sum(s.decode_steps * s.slots for s in shares)
        return {
            "work/occupancy": row_steps / max(1, slot_steps),
            "work/row_steps": row_steps,
            "work/response_tokens": sum(s.response_tokens for s in shares),
            "work/prefilled_tokens": sum(s.prefilled_tokens for s in shares),
        }

    def timed(self, name: str) -> "Timer":
        return Timer(self.seconds, name)


class Timer:
    """Adds the seconds spent inside to `seconds[name]`."""

    def __init__(self, seconds: dict[str, float], name: str):
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.begun = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.perf_counter() - self.begun
