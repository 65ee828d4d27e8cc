"""The losses of DPO with numbers worked out by hand."""

import math

import pytest
import torch

from training.formulas.losses import DPO_LOSSES, Answers, Pairs, implicit_rewards


def test_rewards_are_beta_times_the_log_ratio():
    logprobs = torch.tensor([[-4.0, -10.0], [-6.0, -3.0]])  # chosen, rejected
    reference = torch.tensor([[-5.0, -10.0], [-4.0, -9.0]])
    rewards = implicit_rewards(logprobs, reference, None, beta=0.5)
    assert rewards.tolist() == [[0.5, 0.0], [-1.0, 3.0]]
    lengths = torch.tensor([[4, 2], [1, 3]])
    assert implicit_rewards(logprobs, reference, lengths, beta=2.0).tolist() == [[0.5, 0.0], [-4.0, 4.0]]


PAIRED = [name for name, entry in DPO_LOSSES.entries.items() if not entry.unpaired]
ONE = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
"""-log sigmoid of 1 and of -1."""
SIGMOID = {x: 1 / (1 + math.exp(-x)) for x in (-0.5, 0.5, 1.5, 1.0)}
BY_HAND = {  # rewards 0 and 0, 0.5 and -0.5, 1.5 and 0.5 (margins 0, 1, 1), with beta 0.5 and a quarter wrong
    "sigmoid": [math.log(2)] + [0.75 * ONE[0] + 0.25 * ONE[1]] * 2,
    "robust": [math.log(2)] + [(0.75 * ONE[0] - 0.25 * ONE[1]) / 0.5] * 2,
    "hinge": [1.0, 0.0, 0.0],
    "ipo": [1.0, 1.0, 1.0],  # (0 - 1)² and (1 / 0.5 - 1)²
    "sppo_hard": [2.0, 0.0, 8.0],  # (-1)² + 1², 0² + 0², 2² + 2²
    "apo_zero": [1.0, 1 - SIGMOID[0.5] + SIGMOID[-0.5], 1 - SIGMOID[1.5] + SIGMOID[0.5]],
    "apo_down": [1.0, SIGMOID[0.5] + 1 - SIGMOID[1.0], SIGMOID[1.5] + 1 - SIGMOID[1.0]],
}


@pytest.mark.parametrize("name", PAIRED)
def test_each_loss_by_hand(name):
    pairs = Pairs(torch.tensor([0.0, 0.5, 1.5]), torch.tensor([0.0, -0.5, 0.5]), beta=0.5, smoothing=0.25)
    entry = DPO_LOSSES.entries[name]
    found = entry.formula(pairs)
    assert found.tolist() == pytest.approx(BY_HAND[name], abs=1e-6)
    assert entry.complaint(found, pairs) == "" and "shape (3,)" in entry.complaint(found.sum(), pairs)
    unsmoothed = entry.formula(Pairs(pairs.chosen, pairs.rejected, 0.5))
    assert torch.equal(found, unsmoothed) != entry.smooths


@pytest.mark.parametrize("name", PAIRED)
def test_each_loss_pulls_a_new_policy_the_right_way(name):
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    DPO_LOSSES.entries[name].formula(Pairs(chosen, rejected, beta=0.5)).sum().backward()
    assert rejected.grad > 0  # less of the rejected answer
    assert chosen.grad < rejected.grad


def test_smoothing_is_least_where_the_share_of_right_labels_is():
    margins = torch.tensor([0.0, 2.0], requires_grad=True)
    pairs = Pairs(margins, torch.zeros(2), beta=1.0, smoothing=0.25)
    DPO_LOSSES.entries["sigmoid"].formula(pairs).sum().backward()
    sigmoid = 1 / (1 + math.exp(-2))
    assert margins.grad.tolist() == pytest.approx([0.5 - 0.75, sigmoid - 0.75], abs=1e-6)


def test_kto_by_hand():
    answers = Answers(torch.tensor([1.5, 0.5, 1.5, 0.0]), torch.tensor([True, True, False, False]), 0.5)
    entry = DPO_LOSSES.entries["kto"]
    found = entry.formula(answers)
    assert found.tolist() == pytest.approx([1 - SIGMOID[1.0], 0.5, SIGMOID[1.0], 1 - SIGMOID[0.5]], abs=1e-6)
    assert entry.complaint(found, answers) == "" and "shape (4,)" in entry.complaint(found.sum(), answers)
    (example,) = entry.example(None)
    assert entry.complaint(entry.formula(example), example) == ""
