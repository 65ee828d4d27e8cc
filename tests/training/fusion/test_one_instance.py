"""One instance: interleaved as asked for, or on a device that can score beside decoding if a trial paid."""

from dataclasses import replace

import pytest

from inference.generation.engine import StepWork
from training.fusion.board import SampleLengths
from training.fusion.choice import FusionChooser, FusionSetup
from training.fusion.costs import LengthStatistics, Measured

SETTING = FusionSetup("auto", 1, 1, slots=4, samples=4, micro_batch_tokens=4096, unit_tokens=128, overlaps=True)
SAMPLES = [[SampleLengths(index, prompt=10, response=20) for index in range(4)]]
# 0.1 s a prefill, 0.01 s a decode step, 0.2 s to score 120 tokens: 0.49 s in all
MEASURED = [
    Measured(0.1, work=StepWork(prefilled=40)),
    *[Measured(0.01, work=StepWork(rows=4, context=40 + 4 * step)) for step in range(19)],
    Measured(0.2, scored=120),
]


def after_rollouts(choice, *achieved):
    for number, seconds in enumerate(achieved, 1):
        choice.next(number)
        choice.learn(SAMPLES, {0: [20] * 4}, seconds, MEASURED, bandwidth=float("inf"), cache_bytes=8)
    return choice.next(len(achieved) + 1)


def test_a_cpu_has_nothing_to_gain():
    found = after_rollouts(FusionChooser(replace(SETTING, overlaps=False), LengthStatistics(20)), 0.49, 0.49, 0.49)
    assert found.policy is None and "same cores" in found.reason


def test_asked_for_it_interleaves():
    found = FusionChooser(replace(SETTING, mode="inter", overlaps=False), LengthStatistics(20)).next(1)
    assert found.policy is not None and found.policy.interleaves


@pytest.mark.parametrize(("tried", "keeps"), [(0.40, True), (0.49, False), (0.60, False)])
def test_scoring_beside_decoding_is_tried_once_and_kept_if_it_saved(tried, keeps):
    choice = FusionChooser(SETTING, LengthStatistics(20))
    trial = after_rollouts(choice, 0.49, 0.49)  # the first runs cold code, the second is measured
    assert trial.policy is not None and trial.policy.interleaves and "tried once" in trial.reason
    found = after_rollouts(choice, tried)
    assert choice.overlap == pytest.approx(tried / 0.49, rel=0.01)
    assert (found.policy is not None) == keeps
    resumed = FusionChooser(SETTING, LengthStatistics(20))
    resumed.restore(choice.as_dict())
    assert resumed.next(9) == found
