"""When to fuse and with which threshold: reasons, hysteresis, checkpoints, and what is learnt when."""

import json
from dataclasses import replace

import pytest

from inference.generation.engine import StepWork
from training.fusion import choice as module
from training.fusion.board import FusionPolicy, SampleLengths
from training.fusion.choice import FusionChoice, FusionChooser, FusionSetup
from training.fusion.costs import Costs, LengthStatistics, Measured
from training.fusion.simulator import SimulatedRollout

SETTING = FusionSetup(
    mode="auto", instances=4, tensor=1, slots=8, samples=32, micro_batch_tokens=512, unit_tokens=64
)  # fmt: skip
STEP = 1e-3
COSTS = Costs(
    rows=(1, 8), step=(STEP, STEP), per_context=0.0, prefill=(STEP, 0.0), score=(0.0, 4e-5),
    bandwidth=1e9, cache_bytes=1,
)  # fmt: skip
LENGTHS = [10] * 28 + [200] * 4
"""Decoding takes 0.2 s; scoring 32 prompts of 10 and 1,080 tokens on four ranks 0.056 s / 4."""


def a_choice(setting=SETTING, costs=COSTS, **values):
    lengths = LengthStatistics(200)
    lengths.add({0: list(LENGTHS)})
    return FusionChooser(setting, lengths, costs, prompts=[10], **values)


def test_switched_off():
    choice = a_choice(replace(SETTING, mode="none")).next(0)
    assert choice.policy is None
    assert str(choice) == "fusion: none (switched off)"


def test_before_anything_is_measured():
    assert "being measured" in str(a_choice(costs=None).next(0))
    asked = a_choice(replace(SETTING, mode="inter"), costs=None).next(0)
    assert (asked.policy.threshold, asked.policy.rows, asked.policy.interleaves) == (32 // 5, 8, False)
    told = a_choice(replace(SETTING, mode="inter", threshold=9, rows=3), costs=None).next(0)
    assert (told.policy.threshold, told.policy.rows) == (9, 3)


def test_one_instance_can_only_interleave_and_does_so_only_when_asked():
    alone = replace(SETTING, instances=1)
    assert a_choice(alone).next(0).policy is None
    assert "one instance" in a_choice(alone).next(0).reason
    asked = a_choice(replace(alone, mode="inter")).next(0).policy
    assert (asked.threshold, asked.interleaves) == (0, True)


def test_auto_fuses_where_scoring_is_worth_hiding():
    choice = a_choice(costs=replace(COSTS, score=(0.0, 4e-4))).next(0)
    assert choice.policy is not None
    assert choice.expected < 0.98 * choice.expected_serial
    assert f"{1 - choice.expected / choice.expected_serial:.1%}" in choice.reason
    assert str(choice).endswith(f"expected {choice.expected:.2f} s, {choice.expected_serial:.2f} s without")


def test_auto_says_none_where_scoring_is_too_cheap_to_hide_and_inter_fuses_all_the_same():
    cheap = replace(COSTS, score=(0.0, 1e-7))
    choice = a_choice(costs=cheap).next(0)
    assert choice.policy is None
    assert "it would save 0." in choice.reason
    asked = a_choice(replace(SETTING, mode="inter"), costs=cheap).next(0)
    assert asked.policy is not None and asked.reason == "asked for"


def test_a_given_threshold_is_the_one_taken():
    policy = a_choice(replace(SETTING, mode="inter", threshold=11, rows=5)).next(0).policy
    assert (policy.threshold, policy.rows, policy.unit_tokens) == (11, 5, 64)


@pytest.fixture
def simulated(monkeypatch):
    """Seconds by threshold and rows instead of a simulation; 2 without fusion."""
    seconds = {}

    def fused_from(instances, policy, remaining):
        return SimulatedRollout(seconds.get((policy.threshold, policy.rows), 1.5), 1.0)

    monkeypatch.setattr(module, "fused_from", fused_from)
    monkeypatch.setattr(module, "serial", lambda shares, config: SimulatedRollout(2.0, 1.0))
    return seconds


def test_the_best_of_the_grid_is_taken(simulated):
    """Thresholds in the grid: eighths of 32, and 8, 16, 24 and multiples of 4 that fill whole instances."""
    simulated |= {(16, 4): 1.0, (8, 8): 0.9, (15, 8): 0.1}
    choice = a_choice().next(0)
    assert (choice.policy.threshold, choice.policy.rows, choice.expected) == (8, 8, pytest.approx(0.9))
    assert choice.reason == "it saves 55.0%"


@pytest.mark.parametrize(("kept_seconds", "threshold"), [(1.0, 16), (1.019, 16), (1.021, 8)])
def test_the_threshold_stays_unless_another_is_two_percent_better(simulated, kept_seconds, threshold):
    simulated |= {(8, 8): 1.0, (16, 8): kept_seconds}
    fusion = a_choice(current=FusionChoice(FusionPolicy(16, 8, 123.0, 64), "it was best"))
    choice = fusion.choose(5)
    assert choice.policy.threshold == threshold
    assert choice.expected == pytest.approx(kept_seconds if threshold == 16 else 1.0)
    assert choice.policy.tick != 123.0, "ticks follow the costs"


def test_a_threshold_that_stopped_paying_goes(simulated):
    simulated |= {(threshold, rows): 1.99 for threshold in range(33) for rows in (4, 8)}
    choice = a_choice(current=FusionChoice(FusionPolicy(16, 8, 1.0, 64), "it was best")).choose(5)
    assert choice.policy is None
    assert choice.reason == "it would save 0.5%"


def test_a_choice_stands_until_lengths_drift():
    fusion = a_choice()
    first = fusion.next(0)
    assert first.mean_length == sum(LENGTHS) / len(LENGTHS)
    fusion.lengths.add({1: list(LENGTHS)})
    assert fusion.next(1) is first
    fusion.lengths.add({2: [200] * 8})
    assert fusion.next(2) is not first
    assert fusion.next(2).mean_length == fusion.lengths.mean


@pytest.mark.parametrize("setting", [SETTING, replace(SETTING, mode="inter"), replace(SETTING, mode="none")])
@pytest.mark.parametrize("drifts", [False, True])
def test_a_restored_choice_goes_on_alike(setting, drifts):
    fusion = a_choice(setting, replace(COSTS, score=(0.0, 4e-4)))
    first = fusion.next(3)
    restored = FusionChooser(setting, LengthStatistics(200))
    restored.restore(json.loads(json.dumps(fusion.as_dict())))
    if drifts:
        for each in (fusion, restored):
            each.lengths.add({1: [150] * 30})
    assert restored.next(4) == fusion.next(4)
    assert (fusion.next(4) == first) != (drifts and setting.mode != "none")


@pytest.mark.parametrize("other", [{"instances": 3}, {"tensor": 2}, {"slots": 4}])
def test_costs_and_policies_of_other_instances_are_forgotten_and_lengths_are_not(other):
    fusion = a_choice(replace(SETTING, mode="inter"))
    assert fusion.next(3).policy.rows > 0
    restored = FusionChooser(replace(fusion.setting, **other), LengthStatistics(200))
    restored.restore(json.loads(json.dumps(fusion.as_dict())))
    assert restored.costs is restored.current is None
    assert restored.lengths.recent == fusion.lengths.recent and restored.prompts == fusion.prompts
    assert "not measured yet" in restored.next(4).reason


def test_restored_before_the_first_choice():
    restored = FusionChooser(SETTING, LengthStatistics(200))
    restored.restore(json.loads(json.dumps(FusionChooser(SETTING, LengthStatistics(200)).as_dict())))
    assert restored.next(0) == FusionChoice(None, "costs are being measured")


SHARES = [[SampleLengths(index, 10, 20) for index in range(place, 32, 4)] for place in range(4)]


def measured(costs):
    works = [StepWork(rows=rows, context=context) for rows in (1, 8) for context in (10, 50, 400)]
    works += [StepWork(prefilled=tokens) for tokens in (40, 80)]
    found = [Measured(costs.work_seconds(work), work=work) for work in works]
    return found + [Measured(costs.score_seconds(tokens), scored=tokens) for tokens in (50, 100)]


def learn(fusion, costs, achieved):
    return fusion.learn(SHARES, {3: [20, 20], 5: [20]}, achieved, measured(costs), bandwidth=1e9, cache_bytes=1)


SLOW = replace(COSTS, step=(2 * STEP, 3 * STEP), score=(0.0, 8e-5))


def test_the_first_rollout_is_not_learnt_from_but_its_lengths_are():
    """Cold code: nothing of its seconds is kept, and they do not make known costs wrong."""
    fusion = FusionChooser(SETTING, LengthStatistics(200))
    assert fusion.next(0).reason == "costs are being measured"
    assert learn(fusion, SLOW, achieved=9.0) == 0
    assert (fusion.costs, len(fusion.measured)) == (None, 0)
    assert (fusion.lengths.mean, fusion.lengths.expected(3), fusion.prompts) == (20, 20, [10] * 32)
    assert fusion.next(1).reason == "costs are being measured"
    learn(fusion, COSTS, achieved=9.0)
    assert [fusion.costs.step_seconds(rows) for rows in (1, 4, 8)] == pytest.approx([STEP] * 3)
    assert fusion.next(2).reason != "costs are being measured"

    resumed = a_choice()
    resumed.next(0)
    learn(resumed, SLOW, achieved=99.0)
    assert resumed.costs == COSTS


def test_costs_stay_while_they_predict_well_and_are_fitted_anew_when_they_do_not():
    fusion = a_choice(is_warm=True)
    before = fusion.next(0)
    predicted = fusion.predict(SHARES)
    assert learn(fusion, SLOW, achieved=predicted * 1.08) == pytest.approx(predicted)
    assert fusion.costs is COSTS
    learn(fusion, SLOW, achieved=predicted * 2)
    assert [fusion.costs.step_seconds(rows) for rows in (1, 8)] == pytest.approx(SLOW.step)
    assert fusion.costs.score == pytest.approx(SLOW.score)
    assert fusion.next(1) is not before


def test_what_is_predicted_follows_the_present_choice():
    """No fusion, by hand: a prefill and 19 decode steps, then 8 samples of 30 tokens scored on each rank."""
    fusion = a_choice()
    assert fusion.predict(SHARES) == 0, "nothing is chosen yet"
    fusion.current = FusionChoice(None, "off")
    assert fusion.predict(SHARES) == pytest.approx(20 * STEP + 240 * 4e-5)
    fusion.current = FusionChoice(FusionPolicy(0, 8, 1.0, 64, interleaves=True), "asked for")
    assert fusion.predict(SHARES) == pytest.approx(20 * STEP + 240 * 4e-5)


def test_a_choice_for_many_instances_takes_few_simulations(simulated, monkeypatch):
    """At 64 instances each takes some milliseconds: every policy once, the best four on three more rollouts."""
    asked, given = [], module.fused_from
    monkeypatch.setattr(module, "fused_from", lambda *arguments: asked.append(arguments) or given(*arguments))
    fusion = a_choice(replace(SETTING, instances=64, slots=32, samples=1024))
    assert fusion.next(0).policy is not None
    assert 20 < len(fusion._grid()) <= 36 and len(asked) == len(fusion._grid()) + 4 * 4
