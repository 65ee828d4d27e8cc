"""Where the old policy's log-probabilities come from, and so which calls an iteration has."""

import torch

from training.calls import ACTOR_GENERATE, Call, with_recomputed_logprobs
from training.private_surfaces import multiplies_bf16
from training.rlhf_settings import RLHFSettings


def expects_exactness(settings: RLHFSettings, dtype: torch.dtype, device: torch.device, degree: int = 0) -> bool:
    """Whether a run tries for it: everywhere if it is asked for, else where it costs nothing, in bf16 on a CPU that
    multiplies it. So many ranks generate together; 0: as many as the settings say."""
    if settings.exact != "auto":
        return settings.exact
    on_cpu = device.type == "cpu" and (degree or generation_degree(settings)) == 1
    return on_cpu and dtype == torch.bfloat16 and multiplies_bf16()


def generation_degree(settings: RLHFSettings) -> int:
    """Ranks that generate together."""
    planned = settings.plan.get(ACTOR_GENERATE.name)
    return settings.generation_tensor_parallel if planned is None else planned.get("tensor", 1)


def keeps_generation_logprobs(settings: RLHFSettings, dtype: torch.dtype, is_exact: bool) -> bool:
    """Whether the old log-probabilities of PPO are those of generation; else the actor scores too. `is_exact` says that
    training gives the same, to the bit."""
    whole_distribution = settings.min_response_tokens == 0
    return settings.old_logprobs == "generation" or (
        settings.old_logprobs == "auto" and (dtype == torch.float32 or is_exact) and whole_distribution
    )


def iteration_calls(settings: RLHFSettings, dtype: torch.dtype, is_exact: bool = False) -> tuple[Call, ...]:
    """What an iteration runs in a number format, and what the planner plans. `is_exact` is as in
    `keeps_generation_logprobs`; a run that is asked to be so is, or does not start."""
    keeps = keeps_generation_logprobs(settings, dtype, is_exact or settings.exact is True)
    return settings.calls if keeps else with_recomputed_logprobs(settings.calls)
