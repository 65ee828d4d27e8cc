"""The loss of the reward model."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def preference_losses(chosen: Tensor, rejected: Tensor, margins: Tensor | None, centering: float) -> Tensor:
    """-log σ(chosen - rejected - margin) + centering * (chosen + rejected)² of each pair; (pairs) each.

    Bradley and Terry, as in Ouyang et al. 2022 (arXiv 2203.02155), equation 1; the margin: "Llama 2" (Touvron et al.
    2023, arXiv 2307.09288), equation 2; the centring: Eisenstein et al. 2023 (arXiv 2312.09244), equation 2.
    """
    difference = chosen - rejected
    losses = -logsigmoid(difference if margins is None else difference - margins)
    return losses + centering * (chosen + rejected).square() if centering else losses
