"""The four roles of step 3: actor, critic, reference, reward."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from inference.chat_format import ChatFormat
from inference.generation.cpu_weights import BlockedWeights
from training.config import FrozenSettings
from training.data.batching import TokenBatch
from training.deepspeed_config import deepspeed_config
from training.hybrid_engine.deepspeed_setup import deepspeed
from training.hybrid_engine.generation_view import GenerationView
from training.hybrid_engine.layout import Layout
from training.hybrid_engine.reallocation import tensor_parallel_of
from training.hybrid_engine.zero_engine import ZeroEngine
from training.models.loading import load_causal_lm, load_scorer
from training.models.policy import Policy
from training.models.scorer import Scorer, at_last_token
from training.stage import Stage


class Roles:
    """Actor and critic under ZeRO; reference and reward frozen. The critic starts as the reward model."""

    def __init__(self, stage: Stage, sft: Path, reward: Path, chat_format: ChatFormat, updates: tuple[int, int]):
        """`updates` are the optimiser steps that the learning rates of actor and critic span."""
        settings, ranks, dtype = stage.config.rlhf, stage.ranks, stage.dtype
        self.settings = settings
        actor = Policy(load_causal_lm(sft, chat_format, torch.float32), settings.actor.lora).to(ranks.device)
        critic = Scorer(load_scorer(reward, chat_format, torch.float32), settings.critic.lora).to(ranks.device)
        self.actor = ZeroEngine(actor, settings.actor, dtype, updates[0], ranks)
        self.critic = ZeroEngine(critic, settings.critic, dtype, updates[1], ranks)
        tensor = settings.generation_tensor_parallel
        self.generation_layout = Layout.over(ranks.size, tensor, settings.actor.zero_stage)
        parts = tensor_parallel_of(self.generation_layout) if tensor > 1 else None
        self.generator = GenerationView(self.actor, parts)
        self.reference_is_actor = settings.actor.lora.rank > 0
        self._reference: nn.Module | None = None
        if not self.reference_is_actor:
            reference = Policy(load_causal_lm(sft, chat_format, dtype)).to(ranks.device)
            self._reference = freeze(reference, settings.reference, dtype)
        scorer = Scorer(load_scorer(reward, chat_format, dtype)).to(ranks.device)
        self._reward = freeze(scorer, settings.reward, dtype)
        frozen = [(self._reference, settings.reference), (self._reward, settings.reward)]
        self._frozen_blocked = [
            BlockedWeights(role) for role, placed in frozen if role is not None and placed.zero_stage == 0
        ]

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Inside, reference, reward and critic have their weights in blocked order on a CPU, where they are whole.

        Not the actor: old log-probabilities must round as in training.
        """
        blocked = list(self._frozen_blocked)
        if self.critic.settings.zero_stage < 3:
            blocked.append(BlockedWeights(self.critic.module))
        with ExitStack() as stack:
            for weights in blocked:
                stack.enter_context(weights.in_use())
            yield

    @torch.no_grad()
    def logprobs(self, batch: TokenBatch) -> Tensor:
        """Of the actor, float32 (response tokens)."""
        return self.actor(batch, self.settings.temperature)[0]

    @torch.no_grad()
    def reference_logprobs(self, batch: TokenBatch) -> Tensor:
        """Of the frozen SFT model, at the temperature of the policy; float32 (response tokens)."""
        if self._reference is not None:
            return self._reference(batch, self.settings.temperature)[0]
        with cast(Policy, self.actor.module).without_adapter():
            return self.actor(batch, self.settings.temperature)[0]

    @torch.no_grad()
    def values(self, batch: TokenBatch) -> Tensor:
        """Of the critic, float32 (response tokens)."""
        return response_values(self.critic(batch), batch)

    @torch.no_grad()
    def scores(self, batch: TokenBatch) -> Tensor:
        """Of the reward model at each sample's last token, float32 (rows)."""
        return at_last_token(self._reward(batch), batch)

    def score(self, role: str, batch: TokenBatch) -> Tensor:
        """The score call of a role (`training.calls`): what it makes of `batch`."""
        calls = {
            "actor": self.logprobs,
            "reference": self.reference_logprobs,
            "reward": self.scores,
            "critic": self.values,
        }
        return calls[role](batch)

    def save(self, directory: Path) -> None:
        """All ranks call it."""
        self.actor.save(directory / "actor")
        self.critic.save(directory / "critic")

    def load(self, directory: Path) -> None:
        self.actor.load(directory / "actor")
        self.critic.load(directory / "critic")


def response_values(scores: Tensor, batch: TokenBatch) -> Tensor:
    """The value of the state in which each response token is drawn: that of the token before it."""
    return scores[batch.predicting]


def freeze(model: nn.Module, settings: FrozenSettings, dtype: torch.dtype) -> nn.Module:
    """A role that only scores: whole on every rank, or divided over the ranks by ZeRO 3."""
    model.eval().requires_grad_(False)
    if settings.zero_stage == 0:
        return model
    config = deepspeed_config(settings.as_optimizer, dtype, trained=False)
    engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    engine.eval()  # returns nothing, unlike torch's
    return engine
