"""What PPO makes of scored samples; expected values by hand."""

import math
from dataclasses import replace

import pytest
import torch

from training.rlhf_settings import KLSettings, RLHFSettings
from training.step3_rlhf.experience import Experience, Targets, score_metrics, total_score


def make(index: int, logprobs: list[float], reference: list[float], score: float, ended: bool = True) -> Experience:
    n = len(logprobs)
    return Experience(
        index=index,
        prompt=torch.tensor([5, 6]),
        response=torch.arange(n),
        generation_logprobs=torch.tensor(logprobs),
        ended=ended,
        logprobs=torch.tensor(logprobs),
        reference_logprobs=torch.tensor(reference),
        values=torch.zeros(n),
        score=score,
    )


SETTINGS = RLHFSettings(whiten_advantages=False, lam=1.0, missing_end_penalty=1.0)


def test_a_missing_end_costs_a_fixed_penalty():
    assert total_score(make(0, [-1.0], [-1.0], 9.0), SETTINGS) == 9.0
    assert total_score(make(0, [-1.0], [-1.0], 0.5, ended=False), SETTINGS) == -0.5
    free = RLHFSettings(missing_end_penalty=0)
    assert total_score(make(0, [-1.0], [-1.0], 9.0, ended=False), free) == 9.0


def test_kl_is_averaged_over_real_tokens_not_padding():
    # sample 1: three tokens with k1 = 0.1 each; sample 2: one token with k1 = 0.5
    experience = [make(0, [-1.0] * 3, [-1.1] * 3, 0.0), make(1, [-1.0], [-1.5], 0.0)]
    metrics = Targets.of(experience, SETTINGS, 0.1).metrics(experience, SETTINGS, 0.1)
    assert metrics["kl/reference_k1"] == pytest.approx((0.3 + 0.5) / 2)
    k3 = [math.exp(-0.1) - 1 + 0.1, math.exp(-0.5) - 1 + 0.5]
    assert metrics["kl/reference"] == pytest.approx((3 * k3[0] + k3[1]) / 2, abs=1e-6)
    assert metrics["kl/reference_per_token"] == pytest.approx((3 * k3[0] + k3[1]) / 4, abs=1e-6)
    # reward/total = score - coefficient * k1 of the sample
    assert metrics["reward/total"] == pytest.approx(-0.1 * 0.4)


def test_returns_are_taken_before_whitening():
    experience = [make(0, [-1.0, -1], [-1.0, -1], 1.0), make(1, [-1.0], [-1.0], -1.0)]
    targets = Targets.of(experience, SETTINGS.model_copy(update={"whiten_advantages": True}), 0.0)
    assert targets.returns.tolist() == [[1.0, 1.0], [-1.0, 0.0]]
    real = targets.advantages[targets.mask]
    assert real.mean().item() == pytest.approx(0, abs=1e-6) and real.std(correction=0).item() == pytest.approx(1)


def test_the_kl_penalty_lowers_the_advantage_of_tokens_that_leave_the_reference():
    experience = [make(0, [-1.0, -1.0], [-3.0, -1.0], 0.0)]
    targets = Targets.of(experience, SETTINGS, kl_coefficient=0.5)
    # rewards: -0.5 * 2 = -1 on the first token, 0 on the second; values 0, lambda 1: advantages -1 and 0
    assert targets.advantages.tolist() == [[-1.0, 0.0]]


def test_gamma_and_lambda_are_told_apart():
    # score 1 on the last of two tokens, values 0.5: delta of the last token 1 - 0.5 = 0.5, of the first
    # 0.8 * 0.5 - 0.5 = -0.1, and 0.8 * 0.25 * 0.5 = 0.1 of what follows
    experience = [replace(make(0, [-1.0] * 2, [-1.0] * 2, 1.0), values=torch.full((2,), 0.5))]
    settings = SETTINGS.model_copy(update={"gamma": 0.8, "lam": 0.25})
    targets = Targets.of(experience, settings, 0.0)
    assert targets.advantages[0].tolist() == pytest.approx([0.0, 0.5], abs=1e-6)
    discounted = RLHFSettings(advantage="reinforce++", gamma=0.8, lam=0.25, whiten_advantages=False)
    assert Targets.of(experience, discounted, 0.0).advantages[0].tolist() == pytest.approx([0.8, 1.0], abs=1e-6)


def test_length_and_ended_fraction():
    experience = [make(0, [-1.0] * 4, [-1.0] * 4, 3.0), make(1, [-1.0] * 2, [-1.0] * 2, 1.0, ended=False)]
    metrics = Targets.of(experience, SETTINGS, 0.0).metrics(experience, SETTINGS, 0.0)
    assert (metrics["response/length_mean"], metrics["response/length_max"]) == (3.0, 4.0)
    assert metrics["response/ended_fraction"] == 0.5
    assert metrics["reward/scaled_std"] == 1.0  # of the scores 3 and 1, without the penalty


def two_prompts() -> list[Experience]:
    """Two samples each; k1 of the first sample's two tokens is 0.5 each, else 0."""
    return [
        make(0, [-1.0, -1.0], [-1.5, -1.5], 2.0),
        make(1, [-1.0], [-1.0], 1.0),
        make(2, [-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0], -1.0),
        make(3, [-1.0], [-1.0], 1.0),
    ]


def advantages_by(estimator: str, **settings) -> list[list[float]]:
    settings = {"whiten_advantages": False, "samples_per_prompt": 2, **settings}
    targets = Targets.of(two_prompts(), RLHFSettings(advantage=estimator, **settings), kl_coefficient=1.0)
    return [row[mask].tolist() for row, mask in zip(targets.advantages, targets.mask, strict=True)]


def test_rloo_compares_whole_samples_penalty_included():
    # rewards 2 - 0.5 - 0.5 = 1 and 1; -1 and 1
    assert advantages_by("rloo") == [[0.0, 0.0], [0.0], [-2.0, -2.0, -2.0], [2.0]]
    # without the penalty: 2 and 1
    assert advantages_by("rloo", kl={"place": "loss"}) == [[1.0, 1.0], [-1.0], [-2.0, -2.0, -2.0], [2.0]]


def test_grpo_normalises_the_scores_of_a_prompt_and_leaves_the_penalty_to_the_loss():
    found = advantages_by("grpo")
    first = 0.5 / (0.5**0.5 + 1e-4)  # scores 2 and 1: deviation sqrt(1 / 2)
    second = 1 / (2**0.5 + 1e-4)  # scores -1 and 1: deviation sqrt(2)
    expected = [[first, first], [-first], [-second] * 3, [second]]
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted)
    assert advantages_by("grpo", kl={"place": "reward"})[0] == [0.0, 0.0]  # rewards 1 and 1


def test_reinforce_takes_the_penalty_to_come_and_whitens_over_the_batch():
    # scores less the prompt's mean: 0.5, -0.5, -1, 1; the first sample pays 0.5 a token
    assert advantages_by("reinforce++") == [[-0.5, 0.0], [-0.5], [-1.0, -1.0, -1.0], [1.0]]
    assert advantages_by("reinforce++", samples_per_prompt=1)[3] == [1.0]  # no baseline but the whitening
    whitened = advantages_by("reinforce++", whiten_advantages=True)
    values = torch.tensor([value for row in whitened for value in row])
    assert values.mean().item() == pytest.approx(0, abs=1e-6) and values.std(correction=0).item() == pytest.approx(1)


def test_without_a_critic_nothing_is_said_of_values_and_groups_are_measured():
    settings = RLHFSettings(advantage="rloo", samples_per_prompt=2)
    experience = two_prompts()
    experience[1] = replace(experience[1], score=2.0, ended=False)  # the other one's score; a penalty is no reward
    metrics = Targets.of(experience, settings, 0.0).metrics(experience, settings, 0.0)
    assert not [name for name in metrics if name.startswith(("value/", "returns/"))]
    assert metrics["reward/groups_alike"] == 0.5 and metrics["reward/group_std"] == 0.5  # deviations 0 and 1


def test_the_correlation_of_score_and_length():
    experience = [make(i, [-1.0] * (i + 1), [-1.0] * (i + 1), float(-i)) for i in range(4)]
    metrics = score_metrics([-float(i) for i in range(4)], experience)
    assert metrics["reward/length_correlation"] == pytest.approx(-1)


def test_scores_are_reported_as_they_were_given():
    experience = [make(i, [-1.0], [-1.0], 0.0) for i in range(3)]  # what PPO makes of them is another matter
    metrics = score_metrics([10.0, 70.0, 100.0], experience)
    assert (metrics["reward/score_mean"], metrics["reward/score_min"], metrics["reward/score_max"]) == (60.0, 10, 100)
    assert metrics["reward/score_std"] == pytest.approx(1400**0.5)


def test_the_total_is_the_sum_of_what_the_tokens_get():
    # k1: 0.1 on each of three tokens, 0.5 on one; their mean is 0.2. Scores 2, and 1 less 1 for the missing end
    experience = [make(0, [-1.0] * 3, [-1.1] * 3, 2.0), make(1, [-1.0], [-1.5], 1.0, ended=False)]
    for centering, penalties in ((0.0, (0.3, 0.5)), (1.0, (0.3 - 0.6, 0.5 - 0.2)), (0.5, (0.0, 0.4))):
        settings = SETTINGS.model_copy(update={"kl": KLSettings(centering=centering)})
        metrics = Targets.of(experience, settings, 0.1).metrics(experience, settings, 0.1)
        assert metrics["reward/total"] == pytest.approx((2.0 - 0.1 * penalties[0] + 0.0 - 0.1 * penalties[1]) / 2)
    in_the_loss = SETTINGS.model_copy(update={"kl": KLSettings(centering=1.0, place="loss")})  # nothing to centre there
    metrics = Targets.of(experience, in_the_loss, 0.1).metrics(experience, in_the_loss, 0.1)
    assert metrics["reward/total"] == pytest.approx((2.0 - 0.03 + 0.0 - 0.05) / 2)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_groups_are_alike_whatever_rounding_says(size):
    """Three equal scores have a mean that rounds to another number; sums in another order differ in the last bit."""
    alike = [0.1 * size, 0.1 * size, 0.1 * size, (0.1 + 0.2) * size, 0.3 * size, (0.3 + 2e-8) * size]
    apart = [0.3 * size, 0.3 * size, 0.301 * size]
    experience = [make(i, [-1.0], [-1.0], score) for i, score in enumerate(alike + apart)]
    settings = RLHFSettings(advantage="rloo", samples_per_prompt=3)
    metrics = Targets.of(experience, settings, 0.0).metrics(experience, settings, 0.0)
    assert metrics["reward/groups_alike"] == pytest.approx(2 / 3)
