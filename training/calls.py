"""The model function calls of one iteration of every algorithm: what a trainer runs and what the planner plans.

A call names the keys it needs and the keys it makes; keys that no call makes come with the data. Calls stand in the
order in which a rank that takes part in several of them runs them.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["generate", "score", "train"]


@dataclass(frozen=True)
class Call:
    """One use of one role's weights on all samples of an iteration."""

    role: str
    kind: Kind
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.role}_{self.kind}"


def role_of(call: str) -> str:
    """Of a call by its name."""
    return call.partition("_")[0]


ACTOR_GENERATE = Call("actor", "generate", ("prompts",), ("samples", "logprobs"))
ACTOR_SCORE = Call("actor", "score", ("samples",), ("logprobs",))
"""Old log-probabilities taken anew: after generation in 16 bit, whose own are too coarse."""
REFERENCE_SCORE = Call("reference", "score", ("samples",), ("reference_logprobs",))
REWARD_SCORE = Call("reward", "score", ("samples",), ("scores",))
CRITIC_SCORE = Call("critic", "score", ("samples",), ("values",))
_EXPERIENCE = ("samples", "logprobs", "reference_logprobs", "scores")
ACTOR_TRAIN = Call("actor", "train", (*_EXPERIENCE, "values"))
CRITIC_TRAIN = Call("critic", "train", (*_EXPERIENCE, "values"))
ACTOR_TRAIN_ON_GROUPS = Call("actor", "train", _EXPERIENCE)
"""Advantages come from the other samples of a prompt, so that there are no values."""

PPO = (ACTOR_GENERATE, REFERENCE_SCORE, REWARD_SCORE, CRITIC_SCORE, ACTOR_TRAIN, CRITIC_TRAIN)
GRPO = (ACTOR_GENERATE, REFERENCE_SCORE, REWARD_SCORE, ACTOR_TRAIN_ON_GROUPS)
"""Those of all estimators without a critic; what differs is a formula between them."""
REFERENCE_SCORE_PAIRS = Call("reference", "score", ("pairs",), ("reference_logprobs",))
"""Once for each pair, before the first update, while the actor still is the reference."""
ACTOR_TRAIN_ON_PAIRS = Call("actor", "train", ("pairs", "reference_logprobs"))
ACTOR_SCORE_WRONG_ANSWERS = Call("actor", "score", ("pairs",), ("wrong_logprobs",))
"""Of each prompt of a batch with the answer to another one, for KTO's reference point."""
DPO = (REFERENCE_SCORE_PAIRS, ACTOR_TRAIN_ON_PAIRS)
KTO = (
    REFERENCE_SCORE_PAIRS,
    ACTOR_SCORE_WRONG_ANSWERS,
    Call("actor", "train", (*ACTOR_TRAIN_ON_PAIRS.inputs, *ACTOR_SCORE_WRONG_ANSWERS.outputs)),
)
SFT = (Call("actor", "train", ("rows",)),)
REWARD = (Call("reward", "train", ("pairs",)),)
ALGORITHMS = {
    "ppo": PPO,
    "grpo": GRPO,
    "dpo": DPO,
    "kto": KTO,
    "sft": SFT,
    "reward": REWARD,
}


def rlhf_calls(with_critic: bool, with_reward_model: bool = True, with_reference: bool = True) -> tuple[Call, ...]:
    """What step 3 runs; what a role that is not there would make comes with the data."""
    absent = [REWARD_SCORE] * (not with_reward_model) + [REFERENCE_SCORE] * (not with_reference)
    return tuple(call for call in (PPO if with_critic else GRPO) if call not in absent)


def with_recomputed_logprobs(calls: tuple[Call, ...]) -> tuple[Call, ...]:
    """`calls` with a score call of the actor behind its generation, which then makes samples only."""
    result: list[Call] = []
    for call in calls:
        if call == ACTOR_GENERATE:
            result += [Call("actor", "generate", call.inputs, ("samples",)), ACTOR_SCORE]
        else:
            result.append(call)
    return tuple(result)
