"""The sum of all that rewards: weights, one scale, clipping, the trial before training."""

import json

import pytest
import torch

from inference.errors import UserError
from tests.training.test_reward_sources import PROMPTS, RESPONSES, ROWS, endpoint, write  # noqa: F401
from training.data.rows import write_rows
from training.distributed import Ranks
from training.formulas.estimators import SHAPINGS, RunningStatistics, running
from training.reward_sources import RewardEndpoint, RewardFailed
from training.rewards import Rewards, means_by_name, require_rows_for, try_sources
from training.rlhf_settings import RLHFSettings

ONE = Ranks(0, 1, torch.device("cpu"))


def test_the_sum_is_weighted_and_each_source_has_a_mean(tmp_path, endpoint):  # noqa: F811
    endpoint.answers = [(200, {"scores": [10, 20]})]
    settings = RLHFSettings(
        reward_function=write(tmp_path, "def score(p, r):\n return [len(text) for text in r]"),  # 3, 5
        reward_url=endpoint.url,
        reward_timeout=3,
        reward_retries=7,
        reward_weights={"model": 2.0, "function": 0.5, "url": 0.1},
    )
    sources = Rewards(settings, ONE)
    totals, means = sources.total([1.0, -1.0], PROMPTS, RESPONSES, ROWS, group=1)
    assert sources.sources[1][0] == RewardEndpoint(endpoint.url, timeout=3.0, retries=7)
    assert totals == pytest.approx([2 + 1.5 + 1, -2 + 2.5 + 2])
    assert means == {"model": 0.0, "function": 4.0, "url": 15.0}


def test_several_functions_have_a_weight_a_metric_and_a_scale_each(tmp_path):
    mine = write(tmp_path, "def score(p, r):\n return [10.0 * len(t) for t in r]\ndef even(p, r):\n return [7, 5]")
    specs = [f"{mine}=0.5", "length:1=3", f"{tmp_path / 'mine.py'}:even"]
    settings = RLHFSettings(reward_function=specs, reward_weights={"model": 1.0, "function": 2.0}, score_clip=0)
    rewards = Rewards(settings, ONE)
    found = rewards.reward([0.5, -0.5], PROMPTS, RESPONSES, ROWS, group=1)  # "yes", "no no"
    assert found.parts == {
        "model": ([0.5, -0.5], 1.0),
        "mine.score": ([30.0, 50.0], 1.0),
        "length": ([0.0, -1.0], 6.0),
        "mine.even": ([7.0, 5.0], 2.0),
    }
    assert found.raw == [0.5 + 30 + 14, -0.5 + 50 - 6 + 10]
    assert found.scores == pytest.approx([0.5 - 1 + 6 + 2, -0.5 + 1 - 6 - 2])
    means = {name: value for name, value in found.metrics.items() if name.endswith("_mean")}
    assert means == {
        "reward/model_mean": 0.0,
        "reward/mine.score_mean": 40.0,
        "reward/length_mean": -0.5,
        "reward/mine.even_mean": 6.0,
    }
    assert {name: (each["count"], each["mean"]) for name, each in rewards.state().items()} == {
        "mine.score": (2, 40.0),
        "length": (2, -0.5),
        "mine.even": (2, 6.0),
    }


def test_rows_that_have_not_what_a_reward_reads_are_refused(tmp_path):
    rewards = Rewards(RLHFSettings(reward_function=["length:3", "math"]), ONE)
    rows = [{"prompt": PROMPTS[0], "extra": {"answer": "42"}}, {"prompt": PROMPTS[1]}]
    for part, kept in (("train", rows[:1]), ("eval", rows[:1])):
        write_rows(tmp_path / f"prompts_{part}.jsonl", kept)
    require_rows_for(rewards, tmp_path)
    for part in ("eval", "train"):
        write_rows(tmp_path / f"prompts_{part}.jsonl", rows)
        expected = r"math needs a number under 'answer' .*, and 1 of 2 prompts have none, the first 'three short words'"
        with pytest.raises(UserError, match=expected):
            require_rows_for(rewards, tmp_path)


def test_an_evaluation_asks_rewards_by_name_alone_and_where_the_rows_suit(tmp_path):
    mine = write(tmp_path, "raise RuntimeError")
    settings = RLHFSettings(reward_function=[mine, "length:1=3", "math", "reasoning"])
    assert means_by_name(settings, PROMPTS, RESPONSES, ROWS) == {"length": -0.5}
    rows = [{"answer": number, "metadata": {"source_dataset": "no task"}} for number in (3, 4)]
    assert means_by_name(settings, PROMPTS, ["so 3", "so 3"], rows) == {"length": -1.0, "math": 0.5}


def test_without_a_reward_model_the_others_count_alone(tmp_path):
    spec = write(tmp_path, "def score(p, r):\n return [len(text) for text in r]")
    settings = RLHFSettings(reward_function=spec, reward_weights={"model": 0}, advantage="reinforce++")
    totals, means = Rewards(settings, ONE).total([7.0, 7.0], PROMPTS, RESPONSES, ROWS, group=1)
    assert totals == [3.0, 5.0] and means == {"function": 4.0}


class OtherRanks:
    """Rank `rank` of three, whose gathering gives what all of them would have asked for."""

    size = 3

    def __init__(self, rank: int, seen: list):
        self.rank, self.seen = rank, seen

    def gather(self, value):
        self.seen.append(value)
        return [value]


def test_ranks_share_the_prompts_out_and_keep_the_samples_of_one_together(tmp_path):
    spec = write(tmp_path, "def score(p, r):\n return [float(text) for text in r]")
    settings = RLHFSettings(reward_function=spec)
    responses = [str(i) for i in range(8)]  # four prompts of two samples
    asked = []
    for rank in range(3):
        source = Rewards(settings, OtherRanks(rank, asked))
        source._ask(source.sources[0][0], [PROMPTS[0]] * 8, responses, [{}] * 8, group=2)
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], []]


def by_text(tmp_path) -> str:
    """A function that gives what the response says."""
    return write(tmp_path, "def score(prompts, responses):\n    return [float(text) for text in responses]")


def reward(rewards: Rewards, scores: list[float], of_model: list[float] | None = None):
    texts = [repr(score) for score in scores]
    return rewards.reward(of_model or [], [PROMPTS[0]] * len(texts), texts, [{}] * len(texts), group=1)


def test_running_statistics_are_those_of_all_numbers_together():
    statistics = RunningStatistics()
    for batch in ([1.0, 2.0, 6.0], [], [7.0], [-4.0, 0.0]):  # mean 2, squares 1 + 0 + 16 + 25 + 36 + 4
        statistics.update(batch)
    assert (statistics.count, statistics.mean) == (6, pytest.approx(2.0))
    assert statistics.deviation == pytest.approx((82 / 6) ** 0.5)


def test_numbers_that_differ_by_rounding_alone_are_not_spread_out():
    statistics = RunningStatistics()
    statistics.update([0.1 + 0.2, 0.3, 0.3])
    assert running([], statistics) == (pytest.approx(0.3), 1.0)
    statistics.update([0.0])
    assert running([], statistics)[1] < 0.2


def test_a_function_of_0_to_100_keeps_its_differences(tmp_path):
    settings = RLHFSettings(reward_function=by_text(tmp_path), reward_weights={"model": 0}, advantage="reinforce++")
    given = [0.0, 50.0, 100.0, 90.0]  # mean 60, deviation sqrt((3600 + 100 + 1600 + 900) / 4)
    found = reward(Rewards(settings, ONE), given)
    deviation = 1550**0.5
    assert found.raw == given and found.metrics["reward/function_mean"] == 60.0
    assert found.scores == pytest.approx([(score - 60) / deviation for score in given])
    assert found.metrics["reward/clipped_fraction"] == 0.0
    as_they_are = settings.model_copy(update={"reward_normalization": "none"})
    found = reward(Rewards(as_they_are, ONE), given)
    assert found.scores == found.raw == given and found.metrics["reward/clipped_fraction"] == 0.0


def test_the_statistics_go_on_from_iteration_to_iteration(tmp_path):
    settings = RLHFSettings(reward_function=by_text(tmp_path), reward_weights={"model": 0}, advantage="reinforce++")
    rewards = Rewards(settings, ONE)
    reward(rewards, [0.0, 2.0])
    resumed = Rewards(settings, ONE)
    resumed.restore(json.loads(json.dumps(rewards.state())))
    for each in (rewards, resumed):  # mean 1.5 of 0 2 1 3, squares 2.25 + 0.25 + 0.25 + 2.25
        assert reward(each, [1.0, 3.0]).scores == pytest.approx([-0.5 / 1.25**0.5, 1.5 / 1.25**0.5])
    assert resumed.state() == rewards.state()


def test_each_shaping_shifts_and_scales_by_hand():
    statistics = RunningStatistics()
    for scores in ([0.0, 2.0], [1.0, 3.0]):  # all: mean 1.5, variance 1.25; the last: mean 2, variance 1
        statistics.update(scores)
    found = {name: entry.formula([1.0, 3.0], statistics) for name, entry in SHAPINGS.entries.items()}
    deviation = pytest.approx(1.25**0.5)
    assert found == {"running": (1.5, deviation), "scale": (0.0, deviation), "batch": (2.0, 1.0), "none": (0.0, 1.0)}


def test_the_scale_of_a_reward_model_from_elsewhere_is_known(tmp_path):
    rewards = Rewards(RLHFSettings(reward_normalization="batch"), ONE, model_is_normalized=False)
    for scores in ([0.0, 0.0], [10.0, 30.0]):
        found = rewards.reward(scores, PROMPTS, RESPONSES, ROWS, group=1)
    assert found.scale_of_model == (20.0, 10.0) and found.scores == [-1.0, 1.0]
    assert Rewards(RLHFSettings(), ONE).reward([1.0, 2.0], PROMPTS, RESPONSES, ROWS, group=1).scale_of_model is None


def test_a_run_from_before_goes_on_without(tmp_path):
    settings = RLHFSettings(reward_function=by_text(tmp_path), reward_weights={"model": 0}, advantage="reinforce++")
    rewards = Rewards(settings, ONE)
    rewards.restore(None)
    assert reward(rewards, [1.0, 30.0]).scores == [1.0, 30.0]


def test_a_source_that_fails_leaves_the_statistics_as_they_were(tmp_path):
    settings = RLHFSettings(reward_function=by_text(tmp_path), reward_weights={"model": 0}, advantage="reinforce++")
    rewards = Rewards(settings, ONE)
    reward(rewards, [0.0, 2.0])
    before = rewards.state()
    with pytest.raises(RewardFailed):
        rewards.reward([], PROMPTS, ["1.0", "no number"], ROWS, group=1)
    assert rewards.state() == before


def test_only_normalised_scores_are_clipped_each_source_by_itself(tmp_path):
    settings = RLHFSettings(
        reward_function=by_text(tmp_path),
        reward_weights={"model": 2.0, "function": 0.5},
        reward_normalization="none",
        score_clip=3.0,
    )
    of_model, own = [1.0, -4.0, 30.0, 3.0], [100.0, 0.0, -100.0, 7.0]
    found = reward(Rewards(settings, ONE), own, of_model)
    assert found.scores == [2.0 + 50, -6.0, 6.0 - 50, 6.0 + 3.5]
    assert found.raw == [2.0 + 50, -8.0, 60.0 - 50, 6.0 + 3.5]
    assert found.metrics["reward/clipped_fraction"] == 0.5
    free = Rewards(settings.model_copy(update={"score_clip": 0.0}), ONE)
    assert reward(free, own, of_model).scores == found.raw
    foreign = Rewards(settings, ONE, model_is_normalized=False)  # it may score in tens
    assert reward(foreign, own, of_model).scores == found.raw


def test_a_reward_model_from_elsewhere_is_normalised_and_clipped_then():
    settings = RLHFSettings(score_clip=1.5)
    rewards = Rewards(settings, ONE, model_is_normalized=False)
    found = rewards.reward([10.0, 10.0, 10.0, 50.0], PROMPTS * 2, [""] * 4, ROWS * 2, group=1)  # 20 and sqrt(300)
    assert found.scores == pytest.approx([-10 / 300**0.5] * 3 + [1.5])
    assert found.metrics == {"reward/clipped_fraction": 0.25}
    own = Rewards(settings, ONE)
    assert own.reward([1.0, 1.0, 1.0, 5.0], PROMPTS * 2, [""] * 4, ROWS * 2, group=1).scores == [1.0, 1.0, 1.0, 1.5]


def try_function(tmp_path, body: str, rows: list[dict], **settings) -> list[str]:
    said: list[str] = []
    spec = write(tmp_path, f"def score(prompts, responses, rows):\n    {body}")
    try_sources(Rewards(RLHFSettings(reward_function=spec, **settings), ONE), rows, said.append)
    return said


FIRST = [{"prompt": PROMPTS[0], "extra": {"answer": "42"}}]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("return [1.0] * 2", "returned 2 scores for 3 responses"),
        ("return [float('nan')] * len(rows)", "returned nan"),
        ("return [row['gold'] for row in rows]", "KeyError: 'gold'"),
        ("return [1 / len(text) for text in responses]", "ZeroDivisionError"),  # an answer may be empty
    ],
)
def test_what_is_wrong_with_a_function_shows_before_training(tmp_path, body, sentence):
    with pytest.raises(RewardFailed, match=f"{sentence}.*tried before training"):
        try_function(tmp_path, body, FIRST * 3)


def test_a_function_is_tried_on_the_data(tmp_path):
    told = write(
        tmp_path, "seen = []\ndef score(p, r, rows):\n    seen.append((p, r, rows))\n    return [0.0] * len(r)"
    )
    rewards = Rewards(RLHFSettings(reward_function=told, samples_per_prompt=2), ONE)
    try_sources(rewards, [*FIRST, {"prompt": PROMPTS[1]}, *FIRST], print)
    ((prompts, responses, rows),) = rewards.sources[0][0].function.__globals__["seen"]
    assert prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2 and rows == [{"answer": "42"}] * 2 + [{}] * 2
    assert "" in responses and len(responses) == 4
    assert try_function(tmp_path, "return [0.0 for row in rows]", []) == []  # without a row, one is made up


def test_an_address_that_is_not_there_is_refused_where_it_is_needed(endpoint):  # noqa: F811
    said: list[str] = []
    rewards = Rewards(RLHFSettings(reward_url=endpoint.url, reward_retries=3), ONE)
    endpoint.answers = [(503, {}), (503, {})]
    try_sources(rewards, FIRST, said.append, needed=False)
    assert len(endpoint.asked) == 1 and endpoint.url in said[0] and "step 3" in said[0]
    with pytest.raises(RewardFailed, match=r"HTTP 503 .* 1 tries\); see that it runs, .* again\. Or without\."):
        try_sources(rewards, FIRST, said.append, without=" Or without.")
    assert len(endpoint.asked) == 2
    endpoint.answers = [(200, {"scores": [1.0]})]
    try_sources(rewards, FIRST, said.append)
    for answer, sentence in (((200, {"scores": []}), "0 scores for 1"), ((404, {}), "HTTP 404")):
        endpoint.answers = [answer]
        with pytest.raises(RewardFailed, match=sentence):
            try_sources(rewards, FIRST, said.append)
    assert len(said) == 1
