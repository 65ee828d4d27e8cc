"""Each estimator with numbers worked out by hand; tests/training/step3_rlhf/test_experience.py has KL and whitening."""

from dataclasses import replace

import pytest
import torch

from training.formulas.estimators import ESTIMATORS, Scored, dr_grpo, gae, grpo, reinforce, rloo
from training.step3_rlhf.ppo_math import kl_penalty

MASK = torch.tensor([[True, True, True], [True, True, False]])


def scored(rewards: list[list[float]], mask, values=None, group: int = 1, gamma: float = 1.0, lam: float = 1.0):
    """Samples whose tokens get these rewards."""
    penalty = -torch.tensor(rewards)
    values = torch.zeros_like(penalty) if values is None else values
    return Scored(torch.zeros(len(rewards)), penalty, values, mask, group, gamma, lam)


def whole(scores: list[float], group: int) -> Scored:
    """Samples of one token."""
    one = torch.ones(len(scores), 1)
    return Scored(torch.tensor(scores), 0 * one, 0 * one, one.bool(), group, 1.0, 1.0)


def test_token_rewards_put_the_score_on_the_last_real_token():
    logprobs = torch.tensor([[-1.0, -1, -1], [-1, -1, -1]])
    reference = torch.tensor([[-1.5, -1, -0.5], [-2, -1, 9]])
    penalty = kl_penalty(logprobs, reference, MASK, coefficient=0.1)
    rewards = replace(scored([[0.0] * 3] * 2, MASK), score=torch.tensor([10.0, 20]), kl_penalty=penalty).rewards
    # -0.1 * (logp - ref): row 1: -0.05, 0, 0.05 (+10); row 2: -0.1, 0 (+20), padding 0
    assert torch.allclose(rewards, torch.tensor([[-0.05, 0, 10.05], [-0.1, 20, 0]]), atol=1e-6)


def test_gae_by_hand():
    values = torch.tensor([[0.5, 0.4, 0.3], [1, 1, 77]])
    advantages = gae(scored([[0.0, 0, 1], [0, 2, 0]], MASK, values, gamma=0.5, lam=0.5))
    # row 1, from the end: 1 - 0.3 = 0.7; 0 + 0.15 - 0.4 = -0.25, + 0.25 * 0.7 = -0.075;
    # 0 + 0.2 - 0.5 = -0.3, + 0.25 * -0.075 = -0.31875
    # row 2: 2 - 1 = 1; 0 + 0.5 - 1 = -0.5, + 0.25 * 1 = -0.25; the 77 behind the end counts for nothing
    assert torch.allclose(advantages, torch.tensor([[-0.31875, -0.075, 0.7], [-0.25, 1, 0]]))


def test_gae_against_the_double_sum():
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(4, 7, generator=generator), torch.randn(4, 7, generator=generator)
    lengths = [7, 1, 4, 6]
    mask = torch.arange(7)[None] < torch.tensor(lengths)[:, None]
    gamma, lam = 0.9, 0.8
    advantages = gae(scored((rewards * mask).tolist(), mask, values, gamma=gamma, lam=lam))
    for row, length in enumerate(lengths):
        for t in range(length):
            total = 0.0
            for k in range(t, length):
                after = float(values[row, k + 1]) if k + 1 < length else 0.0
                delta = float(rewards[row, k]) + gamma * after - float(values[row, k])
                total += (gamma * lam) ** (k - t) * delta
            assert float(advantages[row, t]) == pytest.approx(total, abs=1e-5)
        assert not advantages[row, length:].any()


def test_rloo_takes_off_the_mean_of_the_others():
    # first prompt: 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2; second prompt: all alike
    assert rloo(whole([1.0, 2.0, 6.0, 4.0, 4.0, 4.0], 3)).tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]


def test_grpo_has_one_mean_and_deviation_a_prompt():
    one = 1 / (2**0.5 + 1e-4)  # means 2 and 10; unbiased deviations sqrt(2) and 0
    assert grpo(whole([1.0, 3.0, 10.0, 10.0], 2)).tolist() == pytest.approx([-one, one, 0.0, 0.0])


def test_dr_grpo_takes_off_the_mean_and_leaves_the_deviation():
    assert dr_grpo(whole([1.0, 3.0, 10.0, 10.0, 2.0, 8.0], 2)).tolist() == [-1.0, 1.0, 0.0, 0.0, -3.0, 3.0]


def test_the_group_mean_is_no_baseline_for_a_single_sample():
    assert reinforce(whole([1.0, 3.0, 5.0, 5.0], 2)).flatten().tolist() == [-1.0, 1.0, 0.0, 0.0]
    assert reinforce(whole([1.0, 3.0, 5.0, 5.0], 1)).flatten().tolist() == [1.0, 3.0, 5.0, 5.0]


def test_reinforce_takes_the_rewards_to_come_discounted():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = reinforce(scored([[1.0, 0.0, 4.0], [2.0, 0.0, 0.0]], mask, torch.ones(2, 3), gamma=0.5, lam=0.1))
    assert found.tolist() == [[1 + 0.25 * 4, 0.5 * 4, 4.0], [2.0, 0.0, 0.0]]


def test_an_estimator_is_tried_on_what_it_gets_in_a_run():
    from training.rlhf_settings import RLHFSettings

    for entry in ESTIMATORS.entries.values():
        given = entry.example(RLHFSettings(samples_per_prompt=2))
        found = entry.formula(*given)
        assert entry.complaint(found, *given) == "" and entry.advantages(*given).shape == (4, 3)
        assert "shape" in entry.complaint(found[:1], *given)
        assert "finite" in entry.complaint(found / 0, *given)
