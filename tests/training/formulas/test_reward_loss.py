"""The loss of the reward model with numbers worked out by hand, and what its terms do to scores."""

import math

import pytest
import torch

from training.formulas.losses import preference_losses


def test_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.5, 2.0]), torch.tensor([1.0, -0.5, -1.0])
    plain = [math.log(2), math.log(1 + math.exp(-1)), math.log(1 + math.exp(-3))]
    assert preference_losses(chosen, rejected, None, 0.0).tolist() == pytest.approx(plain)
    ahead = [math.log(2), math.log(1 + math.exp(1)), math.log(2)]  # leads of 0, 1 and 3 that are to be 0, 2 and 3
    assert preference_losses(chosen, rejected, torch.tensor([0.0, 2.0, 3.0]), 0.0).tolist() == pytest.approx(ahead)
    centred = [loss + 0.5 * square for loss, square in zip(plain, (4, 0, 1), strict=True)]
    assert preference_losses(chosen, rejected, None, 0.5).tolist() == pytest.approx(centred)


def trained(margins: torch.Tensor | None, centering: float) -> torch.Tensor:
    """Scores of chosen and rejected, (2, pairs), that begin as 3 and go downhill."""
    scores = torch.full((2, 3), 3.0, requires_grad=True)
    for _ in range(200):
        (slope,) = torch.autograd.grad(preference_losses(*scores, margins, centering).sum(), scores)
        scores = (scores - 0.05 * slope).detach().requires_grad_()
    return scores.detach()


def test_a_margin_draws_its_pair_further_apart_and_centering_draws_both_scores_around_0():
    plain, ahead, centred = trained(None, 0), trained(torch.tensor([0.0, 1.0, 3.0]), 0), trained(None, 0.1)
    leads = {name: (each[0] - each[1]).tolist() for name, each in (("plain", plain), ("ahead", ahead))}
    assert leads["plain"] == pytest.approx([leads["plain"][0]] * 3) and leads["ahead"][0] == leads["plain"][0]
    assert leads["ahead"][1] > leads["ahead"][0] + 0.5 and leads["ahead"][2] > leads["ahead"][1] + 1
    assert plain.sum(0).tolist() == pytest.approx([6.0] * 3, abs=1e-4)  # nothing else holds them
    assert centred.sum(0).abs().max() < 0.2
