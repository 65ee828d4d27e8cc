"""Where the old policy's log-probabilities come from, and so which calls an iteration has."""

import torch

from training.calls import Call, with_recomputed_logprobs
from training.rlhf_settings import RLHFSettings


def keeps_generation_logprobs(settings: RLHFSettings, dtype: torch.dtype, is_exact: bool) -> bool:
    """Whether the old log-probabilities of PPO are those of generation; else the actor scores too. `is_exact` says that
    training gives the same, to the bit."""
    whole_distribution = settings.min_response_tokens == 0
    return settings.old_logprobs == "generation" or (
        settings.old_logprobs == "auto" and (dtype == torch.float32 or is_exact) and whole_distribution
    )


def iteration_calls(settings: RLHFSettings, dtype: torch.dtype, is_exact: bool = False) -> tuple[Call, ...]:
    """What an iteration runs in a number format, and what the planner plans."""
    keeps = keeps_generation_logprobs(settings, dtype, is_exact)
    return settings.calls if keeps else with_recomputed_logprobs(settings.calls)
