"""One rollout with inter-stage fusion: samples are scored as they end, the long tail is gathered on few instances.

Every instance decodes at its own pace. At each tick of its clock (predicted seconds, so that the same work ticks alike
in every run) it posts what it has left. Whoever is the last one to come to a tick decides for all, and reads what the
others have left only where there can be a repacking. Nobody waits: a decision on the statuses of tick n is carried out
by those who give samples away at tick n + 1, and by those who take them at tick n + 2. Ranks that have nothing left to
decode draw tickets for units of ended samples and score them. Tokens do not depend on any of this: see
`inference.generation.sampler`.

Who gives posts the notices before sending, and all ranks send and receive in the order of the moves of a decision, so
that a sending may wait for its receiver (as NCCL's first one to a peer does).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Generic, TypeVar

import torch.distributed as dist
from torch import Tensor

from inference.generation.engine import Decoding
from inference.generation.sampler import Sample
from training.data.batching import fill_micro_batches
from training.fusion.board import (
    BackgroundScoring,
    Board,
    FusionPolicy,
    RankPosition,
    Remaining,
    Repacking,
    SampleLengths,
    SampleMove,
    Timeline,
    decide,
)
from training.fusion.costs import Costs, Measured

S = TypeVar("S")
MovesCache = Callable[[int], bool]


@dataclass
class Report:
    """Says what a rank did in a rollout."""

    measured: list[Measured] = field(default_factory=list)
    repackings: int = 0
    moved: int = 0
    """Samples that came here from other instances."""
    moved_with_cache: int = 0


class FusedRollout(Generic[S]):
    """Decodes this rank's share and scores what is handed out. All ranks `run` it together, once."""

    def __init__(
        self,
        position: RankPosition,
        decoding: Decoding,
        prompts: Sequence[Tensor],  # of all samples, by index
        board: Board,
        policy: FusionPolicy,
        costs: Costs,
        remaining: Remaining,
        moves_cache: MovesCache,
        background: BackgroundScoring[S],
        timeline: Timeline,
    ):
        self.position, self.decoding, self.prompts, self.board = position, decoding, prompts, board
        self.policy, self.costs, self.remaining, self.moves_cache = policy, costs, remaining, moves_cache
        self.background, self.timeline = background, timeline
        self.report = Report()
        self.active = tuple(range(position.layout.data))
        self.clock, self.tick = 0.0, 0
        self.is_open = policy.interleaves
        """Whether there are ranks that score: only then are ended samples handed out."""
        self.ended: list[Sample] = []
        self.arriving: list[SampleMove] = []
        self.sends: list[tuple[dist.Work, Tensor]] = []
        self.ticket: int | None = None
        """Number of the unit that this rank will score next."""
        self.scored: list[S] = []

    def run(self) -> list[S]:
        """Return what this rank has scored."""
        self._decode()
        self.is_open = True
        self._hand_out(all_of_it=True)
        if self.position.speaks:
            self.board.post(f"over/{self.position.instance}", True)
            if self.board.count("over") == self.position.layout.data:
                self._end_units()
        with self.timeline.span("migrate"):
            for work, _ in self.sends:
                work.wait()
        while self._score():
            pass
        self.scored += self.background.collect()
        return self.scored

    def _decode(self) -> None:
        """Decode until nothing is left here, or what is left has gone elsewhere."""
        while True:
            self.tick += 1
            while not self.decoding.is_over and self.clock < self.tick * self.policy.tick:
                self._step()
            if len(self.active) > 1 or self.arriving:
                self._take()
                self._carry_out(self._decision())
                if self.position.instance not in self.active:
                    return
                self._post_status()
            if self.decoding.is_over and not self.arriving:
                return
            self._hand_out()
            if self.policy.interleaves and not self.background.is_busy():
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
        """Post what is left here; the last one that comes to a tick decides for all."""
        if not self.position.speaks or len(self.active) == 1:
            return
        left = [SampleLengths(s.index, len(s.prompt_ids), len(s.response_ids)) for s in self.decoding.unfinished]
        for move in self.arriving:
            prompt = len(self.prompts[move.index])
            left.append(SampleLengths(move.index, prompt, move.length - prompt))
        self.board.post(f"left/{self.tick}/{self.position.instance}", [astuple(sample) for sample in left])
        came, samples, busy = self.board.tally(f"came/{self.tick}", len(left))
        if came == len(self.active):
            self._decide(samples, busy)

    def _decide(self, samples: int, busy: int) -> None:
        """Decide on `samples` unfinished ones of all active instances, of which `busy` have some."""
        repacking = None
        if self.policy.instances_for(samples, busy) < len(self.active):
            keys = [f"left/{self.tick}/{instance}" for instance in self.active]
            notices = self.board.read_all(keys)
            left = {
                instance: [SampleLengths(*lengths) for lengths in notice]
                for instance, notice in zip(self.active, notices, strict=True)
            }
            repacking = decide(left, self.policy, self.remaining)
        self.board.post(f"decision/{self.tick}", repacking and astuple(repacking))

    def _decision(self) -> Repacking | None:
        if self.tick == 1 or len(self.active) == 1:
            return None
        with self.timeline.span("idle"):
            came = {self.position.speaker(instance): f"left/{self.tick - 1}/{instance}" for instance in self.active}
            told = self.board.read(f"decision/{self.tick - 1}", came, "generation")
        if told is None:
            return None
        keepers, moves = told
        return Repacking(tuple(keepers), tuple(SampleMove(*move) for move in moves))

    def _carry_out(self, repacking: Repacking | None) -> None:
        if repacking is None:
            return
        self.active = repacking.keepers
        self.is_open = True
        self.report.repackings += bool(repacking.moves)
        self._give([move for move in repacking.moves if move.source == self.position.instance])
        self.arriving = [move for move in repacking.moves if move.target == self.position.instance]

    def _give(self, moves: list[SampleMove]) -> None:
        """Send samples away: tokens and log-probabilities over the board, keys and values from rank to rank."""
        with self.timeline.span("migrate"):
            unfinished = {sample.index: sample for sample in self.decoding.unfinished}
            sending: list[tuple[Tensor, int]] = []
            for move in moves:
                sample = unfinished.get(move.index)  # it may have ended since
                notice = cache = None
                if sample is not None:
                    (cache,) = self.decoding.take([sample], with_cache=self.moves_cache(move.length))
                    notice = sample.response_ids, sample.logprobs, sample.limit, cache is not None
                if cache is not None:
                    sending.append((cache, self.position.peer(move.target)))
                if self.position.speaks:
                    self.board.post(f"move/{move.index}/{move.target}", notice)
            for cache, peer in sending:  # receivers know of all of them by now
                work = dist.isend(cache, peer)
                if work is None:
                    raise RuntimeError("this rank is not in the process group")
                self.sends.append((work, cache))

    def _take(self) -> None:
        """Receive what was promised at the last tick."""
        if not self.arriving:
            return
        with self.timeline.span("migrate"):
            for move in self.arriving:
                key = f"move/{move.index}/{move.target}"
                notice = self.board.read(key, {self.position.speaker(move.source): key}, "generation")
                if notice is None:
                    continue
                response_ids, logprobs, limit, with_cache = notice
                sample = Sample(move.index, self.prompts[move.index], limit, response_ids, logprobs)
                cache = None
                if with_cache:
                    cache = self.decoding.cache.empty(sample.length - 1)
                    dist.recv(cache, self.position.peer(move.source))
                self.decoding.add(sample, cache)
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
        if self.position.speaks and units:
            first = self.board.count("units", len(units)) - len(units)
            for number, unit in enumerate(units, first):
                samples = [self.ended[row] for row in unit]
                notice = [(s.index, s.response_ids, s.logprobs, s.limit, s.ended) for s in samples]
                self.board.post(f"unit/{number}", notice)
        gone = {row for unit in units for row in unit}
        self.ended = [sample for row, sample in enumerate(self.ended) if row not in gone]

    def _end_units(self) -> None:
        """Tell the tickets that are still out, at most one of each rank, that no unit will come."""
        units = self.board.count("units", 0)
        for number in range(units, units + len(self.position.layout.mesh)):
            self.board.post(f"unit/{number}", None)

    def _score(self, waits: bool = True) -> bool:
        """Score the unit of this rank's ticket; False if none will come or, without `waits`, if none is there yet."""
        if self.ticket is None:
            self.ticket = self.board.count("tickets") - 1
        unit = f"unit/{self.ticket}"
        if not waits and not self.board.has(unit):
            return False
        with self.timeline.span("idle"):
            instances = range(self.position.layout.data)
            over = {self.position.speaker(instance): f"over/{instance}" for instance in instances}
            notice = self.board.read(unit, over, "generation")
        if notice is None:
            return False
        self.ticket = None
        samples = [
            Sample(index, self.prompts[index], limit, response_ids, logprobs, ended)
            for index, response_ids, logprobs, limit, ended in notice
        ]
        with self.timeline.span("score"):
            begun = time.perf_counter()
            self.scored += self.background.collect()
            self.background.start(samples)
            if waits:
                self.scored += self.background.collect()
                tokens = sum(sample.length for sample in samples)
                self.report.measured.append(Measured(time.perf_counter() - begun, scored=tokens))
        return True
