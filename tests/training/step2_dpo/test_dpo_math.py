"""The formulas of DPO with numbers worked out by hand."""

import math

import pytest
import torch

from training.step2_dpo.dpo_math import dpo_loss, implicit_rewards


def test_rewards_are_beta_times_the_log_ratio():
    logprobs = torch.tensor([[-4.0, -10.0], [-6.0, -3.0]])  # chosen, rejected
    reference = torch.tensor([[-5.0, -10.0], [-4.0, -9.0]])
    rewards = implicit_rewards(logprobs, reference, None, beta=0.5)
    assert rewards.tolist() == [[0.5, 0.0], [-1.0, 3.0]]
    lengths = torch.tensor([[4, 2], [1, 3]])
    assert implicit_rewards(logprobs, reference, lengths, beta=2.0).tolist() == [[0.5, 0.0], [-4.0, 4.0]]


def test_loss_is_minus_log_sigmoid_of_the_margin():
    margins = torch.tensor([0.0, 2.0, -3.0])
    by_hand = [math.log(2), math.log(1 + math.exp(-2)), math.log(1 + math.exp(3))]
    assert dpo_loss(margins).tolist() == pytest.approx(by_hand, abs=1e-6)


def test_label_smoothing_weighs_the_pair_turned_round():
    margins = torch.tensor([0.0, 2.0], requires_grad=True)
    loss = dpo_loss(margins, label_smoothing=0.25)
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert loss.tolist() == pytest.approx([math.log(2), 0.75 * right + 0.25 * wrong], abs=1e-6)
    loss.sum().backward()
    sigmoid = 1 / (1 + math.exp(-2))
    assert margins.grad.tolist() == pytest.approx([0.5 - 0.75, sigmoid - 0.75], abs=1e-6)  # least where it is 0.75
