"""Fused rollouts of several instances as threads, with decoding that takes no model: who says and sends what, and when.

What it computes: test_exactness.py.
"""

import threading
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from inference.generation.engine import StepWork
from inference.generation.sampler import Sample
from training.fusion import fused_rollout as module
from training.fusion.board import Board, FusionPolicy, Timeline
from training.fusion.choice import NOMINAL, NOMINAL_TICK
from training.fusion.fused_rollout import FusedRollout, RankPosition
from training.hybrid_engine.layout import Layout

PATIENCE = 60.0


class Decoding:
    """Each step gives every sample a token; the n-th token of sample i is 1000 i + n."""

    def __init__(self, samples: list[Sample]):
        self.samples = samples
        self.work = StepWork(rows=1, context=1)
        self.cache = SimpleNamespace(empty=lambda tokens: torch.zeros(tokens, dtype=torch.long))

    @property
    def unfinished(self) -> list[Sample]:
        return [sample for sample in self.samples if not sample.is_over]

    @property
    def is_over(self) -> bool:
        return not self.unfinished

    def step(self) -> list[Sample]:
        grown = self.unfinished
        for sample in grown:
            sample.response_ids.append(1000 * sample.index + len(sample.response_ids))
            sample.logprobs.append(-0.5)
        return grown

    def take(self, samples: list[Sample], with_cache: bool) -> list[torch.Tensor | None]:
        self.samples = [sample for sample in self.samples if sample not in samples]
        return [sample.cached_ids if with_cache else None for sample in samples]

    def add(self, sample: Sample, kept: torch.Tensor | None) -> None:
        assert kept is None or torch.equal(kept, sample.cached_ids), "another sample's keys and values"
        self.samples.append(sample)


class Wires:
    """Between threads: a sending waits until its receiver asks for it, as the first one between two GPUs does."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.asked: Counter[tuple[int, int]] = Counter()
        self.sent: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.me = threading.local()

    def isend(self, tensor: torch.Tensor, peer: int) -> Any:
        wire = self.me.rank, peer
        with self.changed:
            self.sent.setdefault(wire, []).append(tensor)
            self.changed.notify_all()
            number = len(self.sent[wire])
            if not self.changed.wait_for(lambda: self.asked[wire] >= number, PATIENCE):
                raise TimeoutError(f"nobody receives on {wire}")
        return SimpleNamespace(wait=lambda: None)

    def recv(self, tensor: torch.Tensor, peer: int) -> None:
        wire = peer, self.me.rank
        with self.changed:
            self.asked[wire] += 1
            self.changed.notify_all()
            number = self.asked[wire]
            if not self.changed.wait_for(lambda: len(self.sent.get(wire, [])) >= number, PATIENCE):
                raise TimeoutError(f"nobody sends on {wire}")
            tensor.copy_(self.sent[wire][number - 1])


class CountingBoard(Board):
    """Counts what was asked of the store, by the kind of key."""

    def __init__(self, store: dist.Store, asked: Counter):
        self.store, self.roll_call, self.mine, self.counters, self.asked = store, None, [], set(), asked

    def read(self, key: str, *others: Any) -> Any:
        self.asked[key.split("/")[0]] += 1
        return super().read(key, *others)

    def read_all(self, keys: Any) -> list[Any]:
        self.asked["left"] += len(keys)
        return super().read_all(keys)


def run_all(monkeypatch, lengths: list[list[int]], policy: FusionPolicy, tensor: int = 1) -> tuple[list[Any], Counter]:
    """Rollouts of all ranks, whose instances begin with samples of these lengths; and what they asked of the board."""
    wires, asked = Wires(), Counter()
    monkeypatch.setattr(module, "dist", SimpleNamespace(isend=wires.isend, recv=wires.recv, Work=object))
    store = dist.HashStore()
    layout = Layout.over(len(lengths) * tensor, tensor)
    count = sum(map(len, lengths))
    prompts = [torch.tensor([index, index]) for index in range(count)]
    indices = iter(range(count))
    shares = [[(next(indices), length) for length in share] for share in lengths]
    rollouts: list[Any] = []
    for rank in range(len(lengths) * tensor):
        position = RankPosition(rank, layout)
        decoding: Any = Decoding([Sample(i, prompts[i], limit) for i, limit in shares[position.instance]])
        background: Any = SimpleNamespace(found=[], is_busy=lambda: False)
        background.start = lambda samples, background=background: background.found.extend(samples)
        background.collect = lambda background=background: [background.found.pop() for _ in list(background.found)]
        rollouts.append(
            FusedRollout(
                position, decoding, prompts, CountingBoard(store, asked), policy, NOMINAL, lambda tokens: 1.0,
                lambda tokens: True, background, Timeline(),
            )
        )  # fmt: skip
    failed: list[BaseException] = []

    def run(rank: int) -> None:
        wires.me.rank = rank
        try:
            rollouts[rank].run()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(rollouts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    assert not failed and not [thread for thread in threads if thread.is_alive()], failed
    return rollouts, asked


def policy(threshold: int, rows: int, unit_tokens: int = 30) -> FusionPolicy:
    return FusionPolicy(threshold, rows, NOMINAL_TICK, unit_tokens)


CASES = {
    "one gives, one takes": ([[40, 5], [60, 5]], policy(2, 2), 1),
    "several give to several": ([[40, 41, 42], [50, 51, 52], [90, 91], [80, 81]], policy(10, 5), 1),
    "who took gives later": ([[30, 31], [40, 41], [70, 20], [90, 91]], policy(8, 2), 1),
    "tensor-parallel instances": ([[40, 41], [50, 51], [90, 91]], policy(6, 3), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_no_order_of_moves_waits_for_ever_where_a_sending_waits_for_its_receiver(monkeypatch, case):
    lengths, rule, tensor = CASES[case]
    rollouts, _ = run_all(monkeypatch, lengths, rule, tensor)
    scored = sorted((sample for rollout in rollouts for sample in rollout.scored), key=lambda sample: sample.index)
    limits = [limit for share in lengths for limit in share]
    assert [(s.index, s.response_ids) for s in scored] == [
        (index, [1000 * index + n for n in range(limit)]) for index, limit in enumerate(limits)
    ]
    assert sum(rollout.report.moved_with_cache for rollout in rollouts) >= 2 * tensor - 1


def test_what_others_have_left_is_read_by_one_rank_and_only_where_samples_can_move(monkeypatch):
    """Eight instances that make 50 ticks. Reading all statuses at each one was 8 * 8 * 50; one decision a tick and rank
    is 8 * 50, and statuses are read where an instance is empty: eight times at most, of eight at most."""
    lengths = [[200 - place] for place in range(8)]
    rollouts, asked = run_all(monkeypatch, lengths, policy(0, 1))
    assert 40 <= max(rollout.tick for rollout in rollouts) <= 60
    assert asked["decision"] <= 8 * 60
    assert 0 < asked["left"] <= 8 * 8


def test_each_unit_is_read_once_and_each_rank_is_told_the_end_once(monkeypatch):
    rollouts, asked = run_all(monkeypatch, [[10] * 8, [12] * 8, [14] * 8], policy(0, 8))
    units = rollouts[0].board.count("units", 0)
    assert units >= 6 and asked["unit"] == units + 3
    for rollout in rollouts:
        rollout.board.clear()
    assert rollouts[0].board.store.num_keys() == 0  # a board of the same name begins anew
