"""Inter-stage fusion over the rollouts of a run: the choice before each, the fused ones, what is learned from them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor

from inference.generation.engine import Decoding
from training.fusion.board import BackgroundScoring, Begin, Board, RankPosition, SampleLengths, Timeline
from training.fusion.choice import NOMINAL, FusionChoice, FusionChooser, FusionSetup
from training.fusion.costs import LengthStatistics, deal, measure_bandwidth
from training.fusion.fused_rollout import FusedRollout, Report
from training.plan import Assignment
from training.stage import Stage

S = TypeVar("S")
UNIT_TOKENS = {"cpu": 128, "cuda": 2048}
"""Tokens that keep a device busy when they are scored alone."""


class Fusion:
    """Fuses the rollouts of a run. All ranks call it together; checkpoints save its `chooser`."""

    def __init__(self, stage: Stage, generation: Assignment, can_fuse: bool):
        """`generation` is what the plan says of it; `can_fuse` says whether each rank can score alone."""
        layout = generation.layout
        self.stage, self.ranks = stage, stage.ranks
        self.position = RankPosition(stage.ranks.rank, layout)
        settings, device = stage.config.rlhf, stage.ranks.device.type
        self.move = settings.fusion.move
        samples = settings.prompts_per_iteration * settings.samples_per_prompt
        self.chooser = FusionChooser(
            FusionSetup(
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

    def choose(self, number: int) -> FusionChoice:
        """Choose for the rollout of iteration `number`; the first rank decides for all."""
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

    def deal(self, prompt_rows: Sequence[int]) -> list[list[int]]:
        """Return the samples that each instance begins. `prompt_rows` are the rows of their prompts in the data, by
        which lengths are known."""
        return deal([self.chooser.lengths.expected(row) for row in prompt_rows], self.position.layout.data)

    @contextmanager
    def board(self, number: int) -> Iterator[Board]:
        """Give the board of iteration `number`. All ranks must meet before its end: then nobody reads any more."""
        board = Board(f"rollout/{number}", self.ranks.roll_call)
        yield board
        board.clear()

    def roll_out(
        self,
        decoding: Decoding,
        prompts: Sequence[Tensor],
        choice: FusionChoice,
        board: Board,
        begin_scoring: Begin[S],
        timeline: Timeline,
    ) -> tuple[list[S], Report]:
        """Generate and score together; returns what this rank has scored, and what it did for that."""
        assert choice.policy is not None
        costs = self.chooser.costs or NOMINAL
        moves_cache = {"auto": costs.moves_cache, "cache": lambda tokens: True, "tokens": lambda tokens: False}
        rollout = FusedRollout(
            self.position,
            decoding,
            prompts,
            board,
            choice.policy,
            costs,
            self.chooser.lengths.remaining,
            moves_cache[self.move],
            BackgroundScoring(begin_scoring, self.ranks.device),
            timeline,
        )
        return rollout.run(), rollout.report

    def learn(
        self,
        number: int,
        choice: FusionChoice,
        shares: list[list[int]],
        prompt_rows: Sequence[int],
        samples: Sequence[SampleLengths],
        report: Report,
        achieved: float,
        decoding: Decoding | None,
    ) -> dict[str, float]:
        """Learn lengths and costs from a rollout of `achieved` seconds, for the choices to come; returns metrics.

        `samples` are all samples in order, `prompt_rows` and `shares` as in `deal`, `decoding` what generated them.
        """
        setting = self.chooser.setting
        if setting.mode == "none" or not (setting.instances > 1 or setting.overlaps):
            return {}
        if not self.bandwidth:
            self.bandwidth = measure_bandwidth(self.position, self.ranks.device)
        by_prompt: dict[int, list[int]] = {}
        for row, sample in zip(prompt_rows, samples, strict=True):
            by_prompt.setdefault(row, []).append(sample.response)
        dealt = [[samples[i] for i in share] for share in shares]
        ours = achieved, self.bandwidth, report.measured, report.repackings, report.moved
        gathered = self.ranks.gather_on_first(ours, "the costs of a rollout")
        if not gathered:
            self.chooser.note(dealt, by_prompt)
            return {}
        seconds, bandwidths, measured, repackings, moved = zip(*gathered, strict=True)
        achieved = max(seconds)
        measurements = [measurement for of_rank in measured for measurement in of_rank]
        assert decoding is not None
        one_token = decoding.cache.empty(1)
        cache_bytes = one_token.numel() * one_token.element_size()
        predicted = self.chooser.learn(dealt, by_prompt, achieved, measurements, min(bandwidths), cache_bytes)
        if choice.policy is not None and self.tells:
            self.stage.display.say(
                f"PPO iteration {number}: fusion: {max(repackings)} repackings moved "
                f"{sum(moved) // setting.tensor} samples; generation and scoring took "
                f"{achieved:.2f} s" + (f", {predicted:.2f} s predicted for these lengths" if predicted else "")
            )
        return {"time/fusion_achieved": achieved, "time/fusion_predicted": predicted}
