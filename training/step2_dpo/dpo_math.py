"""The formulas of DPO; pure tensor functions."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def implicit_rewards(logprobs: Tensor, reference_logprobs: Tensor, lengths: Tensor | None, beta: float) -> Tensor:
    """beta * log-ratio of policy and reference, of whole responses; all float32 of one shape.

    Rafailov et al. 2023, below equation 7. `lengths` (tokens) divide the log-ratios: length-normalised DPO, as in
    "Tulu 3" (Lambert et al. 2024, arXiv 2411.15124), section 5.
    """
    logratios = logprobs - reference_logprobs
    return beta * (logratios if lengths is None else logratios / lengths)


def dpo_loss(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Of each pair, from reward(chosen) - reward(rejected): (pairs) -> (pairs).

    Equation 7; label smoothing is that of "A note on DPO with noisy preferences" (Mitchell 2023): that share of the
    pairs is taken to be labelled the wrong way round.
    """
    return -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
