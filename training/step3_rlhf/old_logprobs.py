"""Where the old policy's log-probabilities come from, and so which calls an iteration has."""

import torch

from training.calls import Call, with_recomputed_logprobs
from training.rlhf_settings import RLHFSettings


def keeps_generation_logprobs(settings: RLHFSettings, dtype: torch.dtype) -> bool:
    """Whether the old log-probabilities of PPO are those of generation; else the actor scores too."""
    whole_distribution = settings.min_response_tokens == 0
    return settings.old_logprobs == "generation" or (
        settings.old_logprobs == "auto" and dtype == torch.float32 and whole_distribution
    )


def iteration_calls(settings: RLHFSettings, dtype: torch.dtype) -> tuple[Call, ...]:
    """What an iteration runs in a number format, and what the planner plans."""
    keeps = keeps_generation_logprobs(settings, dtype)
    return settings.calls if keeps else with_recomputed_logprobs(settings.calls)
