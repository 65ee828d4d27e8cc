"""One rollout with inter-stage fusion: samples are scored as they end, the long tail is gathered on few instances.

Every instance decodes at its own pace. At each tick of its clock (predicted seconds, so that the same work ticks alike
in every run) it reads what all others had left at their last tick, and all decide the same repacking. Nobody waits:
a decision on the statuses of tick n is carried out by those who give samples away at tick n + 1, and by those who take
them at tick n + 2. Ranks that have nothing left to decode claim units of ended samples, the longest first, and score
them. Tokens do not depend on any of this: see `inference.generation.sampler`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Generic, TypeVar

import torch.distributed as dist
from torch import Tensor

from inference.generation.decoding import Decoding
from inference.generation.sample import Sample
from training.data.batching import fill_micro_batches
from training.fusion.aside import Aside
from training.fusion.board import Board
from training.fusion.costs import Costs, Measured
from training.fusion.place import Place
from training.fusion.repacking import Move, Policy, Remaining, Repacking, Unfinished, decide
from training.fusion.timeline import Timeline

S = TypeVar("S")
MovesCache = Callable[[int], bool]


@dataclass
class Report:
    """What one rank did."""

    measured: list[Measured] = field(default_factory=list)
    repackings: int = 0
    moved: int = 0
    """Samples that came here from other instances."""
    moved_with_cache: int = 0


class FusedRollout(Generic[S]):
    """Decodes this rank's share and scores what there is to score; `run` once. All ranks do so together."""

    def __init__(
        self,
        place: Place,
        decoding: Decoding,
        prompts: Sequence[Tensor],  # of all samples, by index
        board: Board,
        policy: Policy,
        costs: Costs,
        remaining: Remaining,
        moves_cache: MovesCache,
        aside: Aside[S],
        timeline: Timeline,
    ):
        self.place, self.decoding, self.prompts, self.board = place, decoding, prompts, board
        self.policy, self.costs, self.remaining, self.moves_cache = policy, costs, remaining, moves_cache
        self.aside, self.timeline = aside, timeline
        self.report = Report()
        self.active = tuple(range(place.layout.data))
        self.clock, self.tick = 0.0, 0
        self.is_open = policy.interleaves
        """Whether there are ranks that score: only then are ended samples handed out."""
        self.ended: list[Sample] = []
        self.arriving: list[Move] = []
        self.sends: list[tuple[dist.Work, Tensor]] = []
        self.units: dict[int, list[Sample]] = {}
        """Handed out by any instance and, as far as this rank knows, not claimed yet."""
        self.units_seen = 0
        self.scored: list[S] = []

    def run(self) -> list[S]:
        """What this rank has scored."""
        self._decode()
        self.is_open = True
        self._hand_out(all_of_it=True)
        if self.place.speaks:
            self.board.count("over")
        with self.timeline.span("migrate"):
            for work, _ in self.sends:
                work.wait()
        while self._score() or not self._nothing_comes():
            pass
        self.scored += self.aside.collect()
        return self.scored

    def _decode(self) -> None:
        """Until nothing is left here, or what is left has gone elsewhere."""
        while True:
            self.tick += 1
            while not self.decoding.is_over and self.clock < self.tick * self.policy.tick:
                self._step()
            if len(self.active) > 1 or self.arriving:
                self._take()
                self._carry_out(self._decision())
                if self.place.instance not in self.active:
                    return
                self._post_status()
            if self.decoding.is_over and not self.arriving:
                return
            self._hand_out()
            if self.policy.interleaves and not self.aside.is_busy():
                self._score(waits=False)

    def _step(self) -> None:
        start = time.perf_counter()
        grown = self.decoding.step()
        end = time.perf_counter()
        self.timeline.add("generate", start, end)
        self.report.measured.append(Measured(end - start, work=self.decoding.work))
        self.clock += self.costs.work_seconds(self.decoding.work)
        self.ended += [sample for sample in grown if sample.is_over]

    def _post_status(self) -> None:
        if self.place.speaks:
            left = [Unfinished(s.index, len(s.prompt_ids), len(s.response_ids)) for s in self.decoding.unfinished]
            arriving = [
                Unfinished(move.index, len(self.prompts[move.index]), move.length - len(self.prompts[move.index]))
                for move in self.arriving
            ]
            notice = [astuple(each) for each in left + arriving]
            self.board.post(f"left/{self.tick}/{self.place.instance}", notice)

    def _decision(self) -> Repacking | None:
        if self.tick == 1 or len(self.active) == 1:
            return None
        start = time.perf_counter()
        left = {
            instance: [Unfinished(*each) for each in self.board.read(f"left/{self.tick - 1}/{instance}")]
            for instance in self.active
        }
        self.timeline.add("idle", start, time.perf_counter())
        return decide(left, self.policy, self.remaining)

    def _carry_out(self, repacking: Repacking | None) -> None:
        if repacking is None:
            return
        self.active = repacking.keepers
        self.is_open = True
        self.report.repackings += bool(repacking.moves)
        self._give([move for move in repacking.moves if move.source == self.place.instance])
        self.arriving = [move for move in repacking.moves if move.target == self.place.instance]

    def _give(self, moves: list[Move]) -> None:
        """Send samples away: tokens and log-probabilities over the board, keys and values from rank to rank."""
        with self.timeline.span("migrate"):
            unfinished = {sample.index: sample for sample in self.decoding.unfinished}
            for move in moves:
                sample = unfinished.get(move.index)  # it may have ended since
                kept = None
                if sample is not None:
                    (kept,) = self.decoding.take([sample], with_cache=self.moves_cache(move.length))
                    if kept is not None:
                        peer = self.place.peer(move.target)
                        self.sends.append((sent(dist.isend(kept, peer)), kept))
                if self.place.speaks:
                    notice = (
                        None
                        if sample is None
                        else (sample.response_ids, sample.logprobs, sample.limit, kept is not None)
                    )
                    self.board.post(f"move/{move.index}/{move.target}", notice)

    def _take(self) -> None:
        """Receive what was promised at the last tick."""
        if not self.arriving:
            return
        with self.timeline.span("migrate"):
            for move in self.arriving:
                notice = self.board.read(f"move/{move.index}/{move.target}")
                if notice is None:
                    continue
                response_ids, logprobs, limit, with_cache = notice
                sample = Sample(move.index, self.prompts[move.index], limit, response_ids, logprobs)
                kept = None
                if with_cache:
                    kept = self.decoding.cache.empty(sample.length - 1)
                    dist.recv(kept, self.place.peer(move.source))
                self.decoding.add(sample, kept)
                self.report.moved += 1
                self.report.moved_with_cache += with_cache
        self.arriving = []

    def _hand_out(self, all_of_it: bool = False) -> None:
        """Make units of ended samples and post them; what makes no whole unit waits, unless `all_of_it` goes."""
        if not self.is_open:
            return
        rows = sorted(range(len(self.ended)), key=lambda row: (-self.ended[row].length, self.ended[row].index))
        lengths = [sample.length for sample in self.ended]
        units = [batch.rows for batch in fill_micro_batches(rows, lengths, self.policy.unit_tokens)]
        if not all_of_it and units and sum(lengths[row] for row in units[-1]) < self.policy.unit_tokens / 2:
            units.pop()
        if self.place.speaks:
            for unit in units:
                samples = [self.ended[row] for row in unit]
                number = self.board.count("units") - 1
                notice = [(s.index, s.response_ids, s.logprobs, s.limit, s.ended) for s in samples]
                self.board.post(f"unit/{number}", notice)
        gone = {row for unit in units for row in unit}
        self.ended = [sample for row, sample in enumerate(self.ended) if row not in gone]

    def _score(self, waits: bool = True) -> bool:
        """Score the longest unit that is to be had, if there is one: short ones last let all ranks end together."""
        self._look_for_units()
        while self.units:
            number = max(self.units, key=lambda number: (tokens_of(self.units[number]), -number))
            samples = self.units.pop(number)
            if self.board.count(f"claims/{number}") == 1:
                break
        else:
            return False
        with self.timeline.span("score"):
            begun = time.perf_counter()
            self.scored += self.aside.collect()
            self.aside.start(samples)
            if waits:
                self.scored += self.aside.collect()
                self.report.measured.append(Measured(time.perf_counter() - begun, scored=tokens_of(samples)))
        return True

    def _look_for_units(self) -> None:
        """Read the units that have been handed out since the last look."""
        while self.board.has(f"unit/{self.units_seen}"):
            self.units[self.units_seen] = [
                Sample(index, self.prompts[index], limit, response_ids, logprobs, ended)
                for index, response_ids, logprobs, limit, ended in self.board.read(f"unit/{self.units_seen}")
            ]
            self.units_seen += 1

    def _nothing_comes(self) -> bool:
        """Whether all instances are done and all units are claimed; rests a moment if not."""
        with self.timeline.span("idle"):
            over = self.board.count("over", 0) == self.place.layout.data
            if over and not self.units and self.board.count("units", 0) == self.units_seen:
                return True
            self.board.pause()
            return False


def tokens_of(samples: list[Sample]) -> int:
    return sum(sample.length for sample in samples)


def sent(work: dist.Work | None) -> dist.Work:
    if work is None:
        raise RuntimeError("this rank is not in the process group")
    return work
