"""Which settings of a run may change on the way: those that teach nothing do freely, lengths grow, the rest stays."""

from enum import Enum
from typing import Any

from training.config import RunConfig


class Kind(Enum):
    """Of a setting."""

    FREE = "memory, disk, processes and what lies on each, what is shown: teaches nothing"
    RECORD = "what is kept of the way: teaches nothing, and a fork that asks for it trains the step"
    EVALUATION = "decides which model is left with keep=best, and else is a record"
    LENGTH = "may grow (training/lengthening.py)"
    LEARNED = "decides what is learned, and stays for the life of a run"


NAMES = {
    Kind.FREE: """
        announce method processes threads zero_stage offload generation_tensor_parallel micro_batch_tokens
        generation_batch release_generation gradient_checkpointing checkpoint_every keep_checkpoints reward_url
        reward_timeout reward_retries architecture plan""",
    Kind.RECORD: "measure samples_every sample_prompts rollouts_every",
    Kind.EVALUATION: "eval_every eval_rows eval_prompts",
    Kind.LENGTH: "epochs max_steps iterations",
    Kind.LEARNED: """
        model reward_model sft_model trained_reward_model reference_model fork_of seed dtype save_dtype source
        eval_source split held_out split_seed max_prompt_tokens max_response_tokens parent limit comparisons bad_rows
        batch_size
        keep dropout learning_rate schedule warmup weight_decay betas epsilon gradient_clipping master_weights rank
        alpha targets deepspeed token_budget initialize_from layers normalize beta label_smoothing length_normalized
        sft_coefficient by_prompt margin undesirable_weight
        advantage loss prompts_per_iteration samples_per_prompt mini_batches ppo_epochs temperature min_response_tokens
        clip clip_high ratio loss_mean mask_truncated ppo_kl_stop value_clip gamma lam whiten_advantages reward_function
        function url reward_normalization
        score_clip missing_end_penalty critic_warmup align_overflow ema coefficient rows exact old_logprobs centering
        target horizon stop place""",
}
"""By the last part of the key."""
KINDS = {name: kind for kind, names in NAMES.items() for name in names.split()} | {
    "reward.eval_rows": Kind.LEARNED,  # the scores are normalised on them
    **dict.fromkeys(("rlhf.fusion", "rlhf.scoring_tensor_parallel", "logging", "evaluation"), Kind.FREE),
}
"""By name, and by key or group where the name alone does not tell."""


def kind_of(key: str) -> Kind:
    """Of a dotted key, which may lead into a mapping. Raises LookupError for one that is in no class."""
    parts = key.split(".")
    names = [name for depth, part in enumerate(parts, 1) for name in (".".join(parts[:depth]), part)]
    known = [name for name in names if name in KINDS]
    return KINDS[known[0]]


def teaches(key: str, config: RunConfig) -> bool:
    """Whether what a run with these settings learns, or the model that it leaves, depends on the setting."""
    kind = kind_of(key)
    if key == "rlhf.reward_url":  # from another address come the same scores, from none there are none
        return not config.rlhf.reward_url
    if kind is Kind.EVALUATION:
        return getattr(config, key.partition(".")[0]).keep == "best"
    return kind not in (Kind.FREE, Kind.RECORD)


def is_recorded(key: str) -> bool:
    """Whether the setting says what a step writes about its way."""
    return kind_of(key) in (Kind.RECORD, Kind.EVALUATION)


def differences(old: dict, new: dict, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ -> both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found |= differences(before, now, f"{prefix}{key}.")
        elif before != now:
            found[prefix + key] = (before, now)
    return found
