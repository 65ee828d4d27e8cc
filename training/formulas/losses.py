"""The losses of DPO, which `dpo.loss` names, and that of the reward model.

Imports torch where it is needed alone: settings are read without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training.formulas.table import Entry, Table

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Implicit rewards of responses, beta * log-ratio of policy and reference, as float32 (pairs)."""

    chosen: Tensor
    rejected: Tensor
    beta: float
    smoothing: float = 0.0  # `dpo.label_smoothing`

    @property
    def margin(self) -> Tensor:
        return self.chosen - self.rejected


@dataclass(frozen=True)
class Answers:
    """Implicit rewards of labelled answers: float32 (answers), and whether they are good: bool (answers)."""

    rewards: Tensor
    good: Tensor
    reference_point: float
    """The same for all answers of an optimiser step, from 0 on: beta times an estimate of KL(policy, reference)."""


@dataclass(frozen=True)
class DPOLoss(Entry):
    """`formula` makes of Pairs the loss of each: (pairs)."""

    smooths: bool = False  # whether it reads `dpo.label_smoothing`
    unpaired: bool = False  # whether it is of Answers, not of Pairs: (answers)

    def complaint(self, result: Any, *given: Any) -> str:
        import torch

        of = given[0].rewards if self.unpaired else given[0].margin
        if not isinstance(result, torch.Tensor) or result.shape != of.shape:
            return f"must return a tensor of shape {tuple(of.shape)}, not {str(result)[:80]!r}"
        if of.requires_grad and not result.requires_grad:
            names = "rewards" if self.unpaired else "chosen, rejected or margin"
            return f"returned what cannot be differentiated: make it of {names}, by torch alone"
        is_theirs = bool(of.isfinite().all()) and not result.isfinite().all()
        return "returned losses that are not finite numbers" if is_theirs else ""

    def example(self, settings: Any) -> tuple[Any, ...]:
        import torch

        if self.unpaired:
            return (Answers(torch.tensor([0.0, 1.0], requires_grad=True), torch.tensor([True, False]), 0.0),)
        chosen, rejected = torch.tensor([[0.0, 1.0], [0.0, 0.0]], requires_grad=True)
        return (Pairs(chosen, rejected, settings.beta, settings.label_smoothing),)


def implicit_rewards(logprobs: Tensor, reference_logprobs: Tensor, lengths: Tensor | None, beta: float) -> Tensor:
    """Compute beta * log-ratio of policy and reference, of whole responses; all float32 of one shape.

    Rafailov et al. 2023, below equation 7. `lengths` (tokens) divide the log-ratios: length-normalised DPO, as in
    "Tulu 3" (Lambert et al. 2024, arXiv 2411.15124), section 5.
    """
    logratios = logprobs - reference_logprobs
    return beta * (logratios if lengths is None else logratios / lengths)


def log_sigmoid(values: Tensor) -> Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(values)


def sigmoid(pairs: Pairs) -> Tensor:
    """-(1 - s) log σ(m) - s log σ(-m): a share s of the pairs is taken to be labelled the wrong way round (Rafailov et
    al. 2023, arXiv 2305.18290, equation 7; s: Mitchell 2023, "A note on DPO with noisy preferences")."""
    s = pairs.smoothing
    return -(1 - s) * log_sigmoid(pairs.margin) - s * log_sigmoid(-pairs.margin)


def robust(pairs: Pairs) -> Tensor:
    """(-(1 - s) log σ(m) + s log σ(-m)) / (1 - 2s): unbiased where a share s is labelled so (Chowdhury et al. 2024,
    arXiv 2403.00409)."""
    s = pairs.smoothing
    return (-(1 - s) * log_sigmoid(pairs.margin) + s * log_sigmoid(-pairs.margin)) / (1 - 2 * s)


def hinge(pairs: Pairs) -> Tensor:
    """max(0, 1 - m) (SLiC, Zhao et al. 2023, arXiv 2305.10425, as in RSO, Liu et al. 2023, arXiv 2309.06657)."""
    return (1 - pairs.margin).relu()


def ipo(pairs: Pairs) -> Tensor:
    """(m / beta - 1 / (2 beta))² (Azar et al. 2023, arXiv 2310.12036, equation 17); with `dpo.length_normalized` of
    means over tokens, as in TRL (1.16)."""
    return (pairs.margin / pairs.beta - 1 / (2 * pairs.beta)).square()


def sppo_hard(pairs: Pairs) -> Tensor:
    """((c - 1/2) / beta)² + ((r + 1/2) / beta)² (SPPO with hard labels, Wu et al. 2024, arXiv 2405.00675)."""
    return ((pairs.chosen - 0.5) / pairs.beta).square() + ((pairs.rejected + 0.5) / pairs.beta).square()


def apo_zero(pairs: Pairs) -> Tensor:
    """1 - σ(c) + σ(r): chosen answers become likelier, rejected ones less likely (D'Oosterlinck et al. 2024, arXiv
    2408.06266)."""
    return 1 - pairs.chosen.sigmoid() + pairs.rejected.sigmoid()


def apo_down(pairs: Pairs) -> Tensor:
    """σ(c) + 1 - σ(m): for pairs whose chosen answers are worse than the model's own (as apo_zero)."""
    return pairs.chosen.sigmoid() + 1 - pairs.margin.sigmoid()


def kto(answers: Answers) -> Tensor:
    """Of a good answer 1 - σ(r - z), of a bad one 1 - σ(z - r), where z = beta * max(0, mean log-ratio of each prompt's
    wrong answer, that of the next one in the batch) (Ethayarajh et al. 2024, arXiv 2402.01306, equation 7)."""
    over = answers.rewards - answers.reference_point
    return 1 - over.where(answers.good, -over).sigmoid()


DPO_LOSSES = Table(
    "dpo.loss",
    DPOLoss,
    {
        "sigmoid": DPOLoss(sigmoid, smooths=True),
        "robust": DPOLoss(robust, smooths=True),
        "hinge": DPOLoss(hinge),
        "ipo": DPOLoss(ipo),
        "sppo_hard": DPOLoss(sppo_hard),
        "apo_zero": DPOLoss(apo_zero),
        "apo_down": DPOLoss(apo_down),
        "kto": DPOLoss(kto, unpaired=True),
    },
)


def preference_losses(chosen: Tensor, rejected: Tensor, margins: Tensor | None, centering: float) -> Tensor:
    """-log σ(chosen - rejected - margin) + centering * (chosen + rejected)² of each pair; (pairs) each.

    Bradley and Terry, as in Ouyang et al. 2022 (arXiv 2203.02155), equation 1; the margin: "Llama 2" (Touvron et al.
    2023, arXiv 2307.09288), equation 2; the centring: Eisenstein et al. 2023 (arXiv 2312.09244), equation 2.
    """
    difference = chosen - rejected
    losses = -log_sigmoid(difference if margins is None else difference - margins)
    return losses + centering * (chosen + rejected).square() if centering else losses
