"""Expected values are worked out by hand in the comments, or by a slow second implementation."""

import math

import pytest
import torch

from training.step3_rlhf import ppo_math

MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_whiten_removes_the_mean_over_real_tokens_only():
    # real entries 1 2 3 4 5: mean 3, variance 2; the 100 is padding
    whitened = ppo_math.whiten(torch.tensor([[1.0, 2, 3], [4, 5, 100]]), MASK)
    expected = torch.tensor([[-2.0, -1, 0], [1, 2, 0]]) / math.sqrt(2)
    assert torch.allclose(whitened, expected, atol=1e-6)  # adding the mean back would shift all by 3


def test_kl_estimators():
    logprobs, other = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert ppo_math.kl_k1(logprobs, other).item() == pytest.approx(math.log(2))
    # k3 = r - 1 - log r with r = other / own = 0.5
    assert ppo_math.kl_k3(logprobs, other).item() == pytest.approx(0.5 - 1 + math.log(2))
    assert ppo_math.kl_k1(other, logprobs).item() < 0 <= ppo_math.kl_k3(other, logprobs).item()


def test_kl_estimators_are_unbiased():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact = float((p * (p / q).log()).sum())
    drawn = torch.multinomial(p, 200_000, replacement=True, generator=generator)
    for estimator in (ppo_math.kl_k1, ppo_math.kl_k3):
        assert estimator(p.log()[drawn], q.log()[drawn]).mean().item() == pytest.approx(exact, abs=0.01)


def test_k3_stays_finite_for_a_hopeless_token():
    assert torch.isfinite(ppo_math.kl_k3(torch.tensor([-500.0]), torch.tensor([-0.1]))).all()


def test_centering_takes_the_mean_penalty_off_every_token():
    logprobs = torch.tensor([[-1.0, -1, -1], [-1, -1, -1]])
    reference = torch.tensor([[-1.5, -1, -0.5], [-3, -2, 9]])
    # log-ratios 0.5, 0, -0.5 and 2, 1 (behind the end: nothing): their mean over the 5 tokens is 0.6
    penalty = ppo_math.kl_penalty(logprobs, reference, MASK, coefficient=0.1, centering=1.0)
    assert torch.allclose(-penalty, torch.tensor([[0.01, 0.06, 0.11], [-0.14, -0.04, 0]]), atol=1e-6)
    half = ppo_math.kl_penalty(logprobs, reference, MASK, coefficient=0.1, centering=0.5)
    assert torch.allclose(-half, torch.tensor([[-0.02, 0.03, 0.08], [-0.17, -0.07, 0]]), atol=1e-6)


def test_policy_loss_clips_only_what_would_move_further_away():
    logprobs = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]))
    advantages = torch.tensor([1.0, -1, 1, -1, 2])
    ratio = ppo_math.policy_ratio(logprobs, torch.zeros(5))
    assert torch.allclose(ratio, torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]))
    loss = ppo_math.policy_loss(ratio, advantages, clip=0.2, clip_high=0.2)
    assert torch.allclose(loss, torch.tensor([-1.2, 1.5, -0.5, 0.8, -2.2]))  # max(-A r, -A clip(r))


def policy_gradient(logprobs: list[float], advantages: list[float], high: float, weights=None, lengths=None):
    """Of tokens whose old log-probabilities were 0, with clip=0.2; and the loss."""
    given, zeros = torch.tensor(logprobs, requires_grad=True), torch.zeros(len(logprobs))
    weights = torch.ones(len(logprobs)) if weights is None else weights
    loss = ppo_math.actor_loss(given, zeros, zeros, zeros, torch.tensor(advantages), weights, 0.2, high, None, lengths)
    loss.total.backward()
    return given.grad.tolist(), loss


def test_a_higher_clip_lets_what_was_unlikely_grow():
    logprobs, advantages = [math.log(1.25), math.log(1.4), math.log(0.7)], [1.0, 1.0, -1.0]
    narrow, clipped = policy_gradient(logprobs, advantages, 0.2)
    assert narrow == [0, 0, 0] and clipped.sums["policy/clip_fraction"].tolist() == [1, 1, 1]
    wide, clipped = policy_gradient(logprobs, advantages, 0.28)
    assert wide == pytest.approx([-1.25, 0, 0]) and clipped.sums["policy/clip_fraction"].tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("mean", "expected"), [("token", [1 / 6, 1 / 6]), ("sequence", [1 / 4, 1 / 8]), ("constant", [1 / 20, 1 / 20])]
)
def test_what_a_token_of_a_short_and_of_a_long_sample_counts(mean, expected):
    """Of two samples with 2 and 4 tokens, the longest may have 10: 1 / 6; 1 / (2 * 2), 1 / (2 * 4); 1 / (2 * 10)."""
    weights = ppo_math.token_weights([2, 4], mean, average=3.0, longest=10) / 6
    assert weights.tolist() == pytest.approx([expected[0]] * 2 + [expected[1]] * 4)


def test_a_samples_ratio_is_the_geometric_mean_of_its_tokens_and_clips_all_of_them():
    logprobs, lengths = [0.8, 0.0, 0.0, 0.0, 0.1, 0.1], [4, 2]  # means 0.2, and exp(0.2) is over 1.2; 0.1
    weights = ppo_math.token_weights(lengths, "sequence", average=3.0, longest=10)
    gradient, loss = policy_gradient(logprobs, [1.0] * 6, 0.2, weights, lengths)
    assert loss.sums["policy/ratio_mean"].tolist() == pytest.approx([math.exp(0.2)] * 4 + [math.exp(0.1)] * 2)
    assert loss.sums["policy/clip_fraction"].tolist() == [1] * 4 + [0] * 2
    # over 6 tokens: a half of the samples, a half of its tokens
    assert [each / 6 for each in gradient] == pytest.approx([0] * 4 + [-math.exp(0.1) / 4] * 2)
    assert loss.total.item() / 6 == pytest.approx(-(1.2 + math.exp(0.1)) / 2)
    token_by_token, _ = policy_gradient(logprobs, [1.0] * 6, 0.2)
    assert token_by_token == pytest.approx([0, -1, -1, -1, -math.exp(0.1), -math.exp(0.1)])


def test_policy_gradient_at_ratio_one_is_the_advantage():
    logprobs = torch.zeros(3, requires_grad=True)
    advantages = torch.tensor([1.0, -2, 3])
    ppo_math.policy_loss(ppo_math.policy_ratio(logprobs, torch.zeros(3)), advantages, 0.2, 0.2).sum().backward()
    assert torch.allclose(logprobs.grad, -advantages)


def test_policy_loss_survives_an_extreme_ratio():
    ratio = ppo_math.policy_ratio(torch.tensor([0.0]), torch.tensor([-1000.0]))
    loss = ppo_math.policy_loss(ratio, torch.tensor([-1.0]), 0.2, 0.2)
    assert torch.isfinite(loss)


def test_value_loss_takes_the_worse_of_clipped_and_unclipped():
    values, old, returns = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 2.0])
    loss, clipped = ppo_math.value_loss(values, old, returns, clip=0.2)
    # token 1: (2-1)^2 = 1 against (0.2-1)^2 = 0.64 -> 1; token 2: both 4
    assert loss.item() == pytest.approx(0.5 * (1 + 4))
    assert clipped.tolist() == [False, False]
    loss, clipped = ppo_math.value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), clip=0.2)
    assert loss.item() == pytest.approx(0.5 * 0.64) and clipped.item()
    assert ppo_math.value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), clip=0)[0].item() == 0


@pytest.mark.parametrize("coefficient", [None, 0.5])
def test_the_actors_loss_and_what_is_reported_of_it(coefficient):
    logprobs = torch.log(torch.tensor([1.5, 1.0]))
    reference = logprobs + torch.log(torch.tensor([2.0, 1.0]))  # k3: 2 - 1 - log 2, and 0
    entropy, advantages = torch.tensor([0.7, 0.1]), torch.tensor([1.0, -1])
    old, weights = torch.zeros(2), torch.ones(2)
    loss = ppo_math.actor_loss(logprobs, entropy, old, reference, advantages, weights, 0.2, 0.2, coefficient)
    sums = {name: float(value.sum()) for name, value in loss.sums.items()}
    expected = {
        "policy/loss": -1.2 + 1,  # max(-1.5, -1.2), max(1, 1)
        "policy/entropy": 0.8,
        "policy/ratio_mean": 2.5,
        "policy/clip_fraction": 1,
        "kl/old_k1": -math.log(1.5),
        "kl/old_k3": 0.5 - math.log(1.5),
    }
    penalty = {} if coefficient is None else {"policy/kl_penalty": 0.5 * (1 - math.log(2))}
    assert sums == pytest.approx(expected | penalty, abs=1e-6)
    assert float(loss.total) == pytest.approx(-0.2 + penalty.get("policy/kl_penalty", 0.0), abs=1e-6)
    assert float(loss.largest["policy/ratio_max"].max()) == pytest.approx(1.5)


def test_the_critics_loss_and_that_of_demonstrations():
    loss = ppo_math.critic_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 3.0]), torch.tensor([1.0, 2.0]), 0.2)
    # token 1: 0 against (0.2 - 1)^2, so clipping acts; token 2: 1
    assert float(loss.total) == float(loss.sums["value/loss"]) == pytest.approx(0.5 * (0.64 + 1))
    assert loss.sums["value/clip_fraction"].tolist() == [1, 0]
    loss = ppo_math.ptx_loss(torch.tensor([-1.0, -3.0]), demonstrated=8, tokens=10)
    assert float(loss.total) == 0.5 and float(loss.sums["ptx/loss"]) == 5


def test_explained_variance():
    returns = torch.tensor([[1.0, 2, 3], [4, 5, 999]])
    assert ppo_math.explained_variance(returns.clone(), returns, MASK) == pytest.approx(1.0)
    assert ppo_math.explained_variance(torch.zeros_like(returns), returns, MASK) == pytest.approx(0.0)
    # predictions of the wrong sign: errors 2 4 6 8 10 have four times the variance
    assert ppo_math.explained_variance(-returns, returns, MASK) == pytest.approx(-3.0)


def test_adaptive_kl_follows_its_target_and_a_fixed_one_stays():
    controller = ppo_math.KLController(coefficient=1.0, target=2.0, horizon=100.0)
    controller.update(kl=2.2, samples=10)  # error 0.1 -> 1 + 0.1 * 10 / 100
    assert controller.coefficient == pytest.approx(1.01)
    controller.update(kl=0.0, samples=10)  # error bounded at -0.2
    assert controller.coefficient == pytest.approx(1.01 * 0.98)
    fixed = ppo_math.KLController(coefficient=0.3, target=0.0, horizon=100.0)
    fixed.update(kl=50.0, samples=10)
    assert fixed.coefficient == 0.3


def test_correlation():
    assert ppo_math.correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])) == pytest.approx(1)
    # centred: (-1, 0, 1) and (0, 1, -1): -1 / (sqrt 2 * sqrt 2)
    assert ppo_math.correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 3.0, 1.0])) == pytest.approx(-0.5)
    assert ppo_math.correlation(torch.tensor([1.0, 2.0]), torch.tensor([7.0, 7.0])) == 0
