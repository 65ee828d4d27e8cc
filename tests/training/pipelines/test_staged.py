"""What a run in stages learns of its passes: on two ranks that are made up, with times by hand."""

from types import SimpleNamespace

import pytest
import torch

from training.fusion.board import Timeline
from training.hybrid_engine.layout import Layout
from training.pipelines import staged
from training.pipelines.orders import BACKWARD, FORWARD, Event, Operation
from training.pipelines.staged import StagedRoles
from training.plan import Assignment, Plan
from training.step3_rlhf.timing import update_data

LAYOUTS = {"actor": Layout((0, 1), pipeline=2), "critic": Layout((1, 0), pipeline=2)}
ALONE = ("actor_train",)
BOTH = ("actor_train", "critic_train")
TOKENS = [3, 5]
"""Of the micro-batches of either role."""


class Run:
    """Ranks that train step by step: every operation takes `seconds` a token on all of them, one after the other."""

    def __init__(self, monkeypatch, calls=BOTH, order="auto", size=2, free=1e9):
        self.now, self.seconds, self.said, self.connected = 100.0, 1.0, {}, []
        monkeypatch.setattr(staged, "connect", lambda ranks, pipelines: self.connected.append(pipelines))
        monkeypatch.setattr(staged, "execute", self.execute)
        monkeypatch.setattr(staged, "free_memory", lambda ranks: free)
        plan = Plan({name: Assignment(LAYOUTS[name.partition("_")[0]]) for name in calls})
        self.of_ranks = []
        for rank in range(size):
            ranks = SimpleNamespace(rank=rank, size=size, device=torch.device("cpu"), gather=lambda value, _: self.all)
            say = self.said.setdefault(rank, []).append
            layers, activations = dict.fromkeys(LAYOUTS, 2), dict.fromkeys(LAYOUTS, 1.0)
            self.of_ranks.append(StagedRoles(plan, ranks, layers, order, activations, say))

    def execute(self, orders, rank, works, links, events):
        for operation in orders.by_rank[rank]:
            begun = self.now
            self.now += self.seconds * (1 + operation.kind) * TOKENS[operation.micro_batch]
            events.append(Event(rank, operation, begun, self.now))

    def train(self, roles=("actor", "critic"), micro_batches=2):
        """On the first two ranks."""
        work = SimpleNamespace(
            count=micro_batches, batches=[SimpleNamespace(lengths=[each]) for each in TOKENS[:micro_batches]]
        )
        for each in self.of_ranks[:2]:
            each.train(dict.fromkeys(roles, work), Timeline())

    def learn(self):
        """What all ranks return, which is the same."""
        self.all = None
        told = []

        class Told(Exception):
            pass

        def tell(value, _):
            told.append(value)
            raise Told

        gathers = [each.ranks.gather for each in self.of_ranks]
        for each in self.of_ranks:
            each.ranks.gather = tell
            with pytest.raises(Told):
                each.learn()
        self.all = told
        for each, gather in zip(self.of_ranks, gathers, strict=True):
            each.ranks.gather = gather
        found = [each.learn() for each in self.of_ranks]
        assert all(each == found[0] for each in found)
        return found[0]


STEP = 2 * (3 + 5) * (1 + 2)
"""Seconds of an optimiser step on a rank, which does all passes of both roles with nothing between."""


def test_an_iteration_counts_its_own_steps_and_expects_what_was_measured_before(monkeypatch):
    run = Run(monkeypatch, order="1f1b")
    run.train()
    run.train()
    assert run.learn() == {"pipeline/seconds": 2 * STEP}
    run.train()
    second = run.learn()
    # Stages overlap where ranks run beside each other, as they are expected to; each rank's steps are 48 s here.
    assert second["pipeline/seconds"] == STEP and STEP <= second["pipeline/seconds_expected"] < 2 * STEP
    run.train()
    assert run.learn() == second
    assert run.learn() == {"pipeline/seconds": 0.0}  # nothing was trained


def test_rates_that_change_by_more_than_a_tenth_bring_a_new_search(monkeypatch):
    run = Run(monkeypatch)
    (first, _) = run.of_ranks
    run.train()
    run.learn()
    forward = first.measured["actor", 0, FORWARD].seconds_per_token
    assert forward == first.measured["critic", 1, BACKWARD].seconds_per_token / 2 == 1.0
    for seconds, known in ((1.09, 1.0), (1.2, 1.2), (1.1, 1.2), (1.0, 1.0)):
        run.train()
        run.learn()
        orders = dict(first._orders)
        run.seconds = seconds
        run.train()
        run.learn()
        assert first.measured["actor", 0, FORWARD].seconds_per_token == pytest.approx(known), seconds
        assert (first._orders == orders) == (known != seconds), seconds


def test_a_role_that_learns_later_and_a_rank_that_trains_nothing(monkeypatch):
    run = Run(monkeypatch, size=3)
    run.train(("critic",))
    assert run.learn() == {"pipeline/seconds": STEP / 2}
    assert {role for role, *_ in run.of_ranks[2].measured} == {"critic"}
    run.train()
    assert run.learn() == {"pipeline/seconds": STEP}
    run.train()
    assert run.learn().keys() == {"pipeline/seconds", "pipeline/seconds_expected"}
    assert run.of_ranks[2].picture(0.0) is None


def test_what_only_ranks_in_stages_know_is_said_once_by_all(monkeypatch):
    run = Run(monkeypatch, calls=ALONE, order="fused", size=3)
    for micro_batches in (2, 1, 2):
        run.train(("actor",), micro_batches)
        run.learn()
    line = "PPO: training is not fused: it takes two roles, and here train actor"
    assert list(run.said.values()) == [[line]] * 3


def test_fused_is_fused_before_anything_is_measured(monkeypatch):
    run = Run(monkeypatch, order="fused", free=0.0)
    run.train(micro_batches=1)
    assert [each.newest.order for each in run.of_ranks] == ["fused"] * 2
    run.learn()
    assert not any(run.said.values())


def test_layouts_that_only_score_send_one_way(monkeypatch):
    run = Run(monkeypatch, calls=("critic_score", "actor_score", "actor_train"), size=1)
    assert [each.kinds for each in run.connected] == [(FORWARD,), (FORWARD, BACKWARD)]
    assert run.of_ranks[0].links.keys() == {(role, LAYOUTS[role]) for role in LAYOUTS}


def test_a_picture_has_ranks_whose_clocks_begin_anywhere(monkeypatch):
    run = Run(monkeypatch, calls=ALONE)
    for _ in range(2):
        run.train(("actor",))
        run.learn()
    for each, start in zip(run.of_ranks, (1_000.0, 2_000.0), strict=True):  # the second starts 3 s later
        events = [Event(0, Operation("actor", FORWARD, 0), start + 3 * each.ranks.rank, start + 5)]
        each.newest = staged.TrainedStep("1f1b", events, each.newest.expected)
    told = [each.picture(begun) for each, begun in zip(run.of_ranks, (990.0, 1_995.0), strict=True)]
    assert update_data(told)["achieved"] == [[["actor forward", 2.0, 7.0]], [["actor forward", 0.0, 2.0]]]
    assert [each.picture(1_500.0) is None for each in run.of_ranks] == [True, False]  # of an earlier iteration
