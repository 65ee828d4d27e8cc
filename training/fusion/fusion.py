"""Inter-stage fusion over the rollouts of a run: the choice before each one, the fused ones, what is learnt of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor

from inference.generation.engine import Decoding
from training.fusion.board import Aside, Begin, Board, Place, Timeline
from training.fusion.choice import NOMINAL, Choice, FusionChoice, Setting
from training.fusion.costs import LengthStatistics, deal, measure_bandwidth
from training.fusion.rollout import FusedRollout, Report
from training.fusion.simulator import Job
from training.plan import Assignment
from training.stage import Stage

S = TypeVar("S")
UNIT_TOKENS = {"cpu": 128, "cuda": 2048}
"""Tokens that keep a device busy when they are scored alone."""


class Fusion:
    """All ranks call it together. `chooser` is what a checkpoint keeps."""

    def __init__(self, stage: Stage, generation: Assignment, can_fuse: bool):
        """`generation` is what the plan says of it; `can_fuse` says whether each rank can score alone."""
        layout = generation.layout
        self.stage, self.ranks, self.place = stage, stage.ranks, Place(stage.ranks.rank, layout)
        settings, device = stage.config.rlhf, stage.ranks.device.type
        self.move = settings.fusion.move
        samples = settings.prompts_per_iteration * settings.samples_per_prompt
        self.chooser = FusionChoice(
            Setting(
                mode=settings.fusion.mode if can_fuse else "none",
                instances=layout.data,
                tensor=layout.tensor,
                slots=generation.together(samples),
                samples=samples,
                micro_batch_tokens=settings.micro_batch_tokens,
                unit_tokens=UNIT_TOKENS.get(device, 2048),
                threshold=settings.fusion.threshold,
                rows=settings.fusion.rows,
                overlaps=device == "cuda",
                seed=stage.seed,
                off="switched off" if can_fuse else "not all ranks generate and score in all roles alone",
            ),
            LengthStatistics(stage.config.data.max_response_tokens),
        )
        self.said: bool | None = None
        """Whether rollouts are fused, as the user knows."""
        self.tells = False
        """Whether this rollout is the first one of a kind; the figures of others are metrics."""
        self.bandwidth = 0.0
        """Bytes a second between instances, once it is measured."""

    def choose(self, number: int) -> Choice:
        """For the rollout of iteration `number`; the first rank decides for all."""
        if self.ranks.is_first:
            self.chooser.next(number)
        told = self.ranks.tell(self.chooser.decided(), "the choice of fusion")
        if not self.ranks.is_first:
            self.chooser.take(told)
        choice = self.chooser.current
        assert choice is not None
        is_fused = choice.policy is not None
        self.tells, self.said = is_fused != self.said, is_fused
        if self.tells:
            self.stage.display.say(f"PPO iteration {number}: {choice}")
        return choice

    def deal(self, seats: Sequence[int]) -> list[list[int]]:
        """The samples that each instance begins. `seats` are the places of their prompts in the data: what is known of
        lengths is known by these."""
        return deal([self.chooser.lengths.expected(seat) for seat in seats], self.place.layout.data)

    @contextmanager
    def board(self, number: int) -> Iterator[Board]:
        """Of iteration `number`. All ranks must meet before its end, then nobody reads any more."""
        board = Board(f"rollout/{number}", self.ranks.roll_call)
        yield board
        board.clear()

    def roll_out(
        self,
        decoding: Decoding,
        prompts: Sequence[Tensor],
        choice: Choice,
        board: Board,
        begin_scoring: Begin[S],
        timeline: Timeline,
    ) -> tuple[list[S], Report]:
        """Generation and scoring woven together: what this rank has scored, and what it did for that."""
        assert choice.policy is not None
        costs = self.chooser.costs or NOMINAL
        moves_cache = {"auto": costs.moves_cache, "cache": lambda tokens: True, "tokens": lambda tokens: False}
        rollout = FusedRollout(
            self.place,
            decoding,
            prompts,
            board,
            choice.policy,
            costs,
            self.chooser.lengths.remaining,
            moves_cache[self.move],
            Aside(begin_scoring, self.ranks.device),
            timeline,
        )
        return rollout.run(), rollout.report

    def learn(
        self,
        number: int,
        choice: Choice,
        shares: list[list[int]],
        seats: Sequence[int],
        jobs: Sequence[Job],
        report: Report,
        achieved: float,
        decoding: Decoding | None,
    ) -> dict[str, float]:
        """Lengths and costs of a rollout of `achieved` seconds, for the choices to come; returns metrics.

        `jobs` are all samples in order, `seats` the places of their prompts, `shares` those of `deal`,
        `decoding` what generated them.
        """
        setting = self.chooser.setting
        if setting.mode == "none" or not (setting.instances > 1 or setting.overlaps):
            return {}
        if not self.bandwidth:
            self.bandwidth = measure_bandwidth(self.place, self.ranks.device)
        by_prompt: dict[int, list[int]] = {}
        for seat, job in zip(seats, jobs, strict=True):
            by_prompt.setdefault(seat, []).append(job.response)
        dealt = [[jobs[i] for i in share] for share in shares]
        found = achieved, self.bandwidth, report.measured, report.repackings, report.moved
        gathered = self.ranks.gather_on_first(found, "the costs of a rollout")
        if not gathered:
            self.chooser.note(dealt, by_prompt)
            return {}
        of_ranks, bandwidths, measured, repackings, moved = zip(*gathered, strict=True)
        achieved = max(of_ranks)
        every = [m for of_rank in measured for m in of_rank]
        assert decoding is not None
        kept = decoding.cache.empty(1)
        cache_bytes = kept.numel() * kept.element_size()
        predicted = self.chooser.learn(dealt, by_prompt, achieved, every, min(bandwidths), cache_bytes)
        if choice.policy is not None and self.tells:
            self.stage.display.say(
                f"PPO iteration {number}: fusion: {max(repackings)} repackings moved "
                f"{sum(moved) // setting.tensor} samples; generation and scoring took "
                f"{achieved:.2f} s" + (f", {predicted:.2f} s predicted for these lengths" if predicted else "")
            )
        return {"time/fusion_achieved": achieved, "time/fusion_predicted": predicted}
