"""What the cost model says of an iteration beside what it took, by hand."""

from types import SimpleNamespace

import pytest
import torch

from tests.training.planner.conftest import LARGE, SMALL
from tests.training.planner.test_machine import PROFILE
from training.calls import CRITIC_TRAIN, REWARD_SCORE
from training.config import RunConfig
from training.fusion.board import Span
from training.hybrid_engine.layout import Layout
from training.plan import Assignment, Plan
from training.planner.hardware import profile_file
from training.planner.reallocation_cost import After, Node
from training.planner.search import estimate
from training.planner.table import list_schedule
from training.step3_rlhf.planned import graphs_of
from training.step3_rlhf.timing import Forecast, as_data, beside, hardware_of, metrics_of, predicted_seconds

CALL, MOVE = frozenset({0, 1}), frozenset({1})
NODES = (
    Node("reward_score", "call", REWARD_SCORE, 2.0, CALL, ()),
    Node("reallocate for critic_train", "reallocation", CRITIC_TRAIN, 1.0, MOVE, (After("reward_score"),)),
    Node("critic_train", "call", CRITIC_TRAIN, 4.0, MOVE, (After("reallocate for critic_train"),)),
)
SPANS = (
    [Span("reward_score", 0.5, 1.0), Span("reward_score", 2.0, 3.5)],
    [Span("reward_score", 0.5, 1.5), Span("critic_train", 4.0, 7.0), Span("ours", 7.0, 8.0)],
)


def test_the_slowest_rank_stands_beside_what_was_predicted():
    assert metrics_of(list_schedule(NODES, 1), SPANS, 9.0) == {
        "plan/reward_score/predicted": 2.0,
        "plan/reward_score/achieved": 2.0,  # rank 0: 0.5 + 1.5
        "plan/critic_train/predicted": 4.0,
        "plan/critic_train/achieved": 3.0,
        "plan/iteration/predicted": 7.0,
        "plan/iteration/achieved": 9.0,
    }


def test_the_line_of_progress_says_both():
    metrics = metrics_of(list_schedule(NODES, 1), SPANS, 12.345)
    assert beside(metrics) == " · 12.3 s, predicted 7" and beside({"reward/score_mean": 1.0}) == ""


def test_the_picture_has_what_each_rank_did_and_was_to_do():
    data = as_data(3, list_schedule(NODES, 1), SPANS)
    assert data["iteration"] == 3
    assert data["predicted"] == [
        [["reward_score", 0.0, 2.0]],
        [["reward_score", 0.0, 2.0], ["reallocation", 2.0, 3.0], ["critic_train", 3.0, 7.0]],
    ]
    assert data["achieved"][0] == [["reward_score", 0.5, 1.0], ["reward_score", 2.0, 3.5]]
    assert as_data(3, None, SPANS)["predicted"] == [[], []]


def test_it_is_made_for_the_lengths_that_there_were():
    config = RunConfig.model_validate({"model": "tiny", "data": {"max_prompt_tokens": 64, "max_response_tokens": 128}})
    graphs = graphs_of(config, config.rlhf.calls, LARGE, SMALL, torch.float32, PROFILE.cluster)
    plan = Plan.of(config.rlhf, 2, config.data.longest, graphs.graph.calls)
    forecast, samples = Forecast(graphs, plan), config.rlhf.prompts_per_iteration
    longest = forecast.schedule([64] * samples, [128] * samples)
    assert longest.makespan == pytest.approx(estimate(plan, graphs).iteration_seconds)
    half = forecast.schedule([64] * samples, [64] * samples)
    skewed = forecast.schedule([64] * samples, [128] + [63] * (samples - 1))  # a mean of 64 too
    assert half.makespan < skewed.makespan < longest.makespan
    few = forecast.schedule([64] * 2, [128] * 2)
    assert few.makespan < half.makespan
    assert forecast.schedule([16] * samples, [128] * samples).makespan < longest.makespan
    warming_up = forecast.schedule([64] * samples, [128] * samples, left_out=["actor_train"])
    trained = predicted_seconds(longest)["actor_train"]
    assert 0 < trained == pytest.approx(longest.makespan - warming_up.makespan)  # calls follow one another here
    lengths = [64] * samples, [128, 64] * (samples // 2)
    everything, masked = (predicted_seconds(forecast.schedule(*lengths, rows)) for rows in (None, [1, 3, 5, 7]))
    alone = predicted_seconds(forecast.schedule([64] * 4, [64] * 4))
    trains = {"actor_train", "critic_train"}
    assert masked == pytest.approx(everything | {name: alone[name] for name in trains})  # all are generated and scored
    nothing = predicted_seconds(forecast.schedule(*lengths, []))
    assert nothing == everything | dict.fromkeys(trains, 0.0)


def test_hardware_is_that_of_the_ranks_of_one_machine(monkeypatch):
    asked = []
    monkeypatch.setattr("training.step3_rlhf.timing.cluster_here", lambda *given: asked.append(given))
    stage = SimpleNamespace(ranks=SimpleNamespace(size=8, device=torch.device("cpu")))
    for variable in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):  # of torchrun, of deepspeed, of neither
        monkeypatch.delenv(variable, raising=False)
    for variable, count in (("WORLD_SIZE", "8"), ("LOCAL_SIZE", "2"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(variable, count)
        assert hardware_of(stage) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")  # and 3 on another machine: no cluster of like nodes
    assert hardware_of(stage) is None
    assert asked == [(8, 1, []), (2, 4, []), (4, 2, [])]


def test_a_profile_that_cannot_be_read_ends_no_training(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CHAT_CACHE", str(tmp_path))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    profile_file(2).parent.mkdir()
    profile_file(2).write_text("of another version")
    said: list[str] = []
    ranks = SimpleNamespace(size=2, device=torch.device("cpu"))
    stage = SimpleNamespace(ranks=ranks, display=SimpleNamespace(say=said.append))
    assert Forecast.of(stage, Plan({}), (), tmp_path, None) is None
    assert len(said) == 1 and "not predicted" in said[0] and "rlhf-chat profile" in said[0]


def test_a_plan_on_parts_of_the_ranks_overlaps():
    config = RunConfig.model_validate({"model": "tiny"})
    graphs = graphs_of(config, config.rlhf.calls, LARGE, SMALL, torch.float32, PROFILE.cluster)
    everywhere = Plan.of(config.rlhf, 2, config.data.longest, graphs.graph.calls)
    apart = Plan(
        {**everywhere.assignments, "critic_train": Assignment(Layout((1,))), "actor_train": Assignment(Layout((0,)))}
    )
    schedule = Forecast(graphs, apart).schedule([64] * 8, [32] * 8)
    spans = {i.node.name: (i.start, i.end) for i in schedule.intervals}
    assert spans["actor_train"][0] < spans["critic_train"][1] and spans["critic_train"][0] < spans["actor_train"][1]
