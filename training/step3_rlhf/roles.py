"""The roles of step 3: the actor always, reference, critic and reward model where the settings have them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from inference.chat_format import ChatFormat
from inference.generation.cpu_weights import BlockedWeights
from inference.tensor_parallel.group import TensorParallel
from training.data.batching import TokenBatch
from training.deepspeed_config import deepspeed_config
from training.distributed import Ranks
from training.hybrid_engine.deepspeed_setup import deepspeed
from training.hybrid_engine.dividing import divide, loads
from training.hybrid_engine.group_scoring import GroupScoring
from training.hybrid_engine.layout import Layout
from training.hybrid_engine.moving_average import MovingAverage
from training.hybrid_engine.reallocation import Reallocation, tensor_parallel_of
from training.hybrid_engine.zero_engine import ZeroEngine
from training.models.loading import load_causal_lm, load_scorer
from training.models.policy import Policy
from training.models.scorer import Scorer, at_last_token
from training.role_settings import FrozenSettings
from training.stage import Stage
from training.step3_rlhf.exactness import settle_exactness
from training.steps import REWARD, SFT


def starting_scorer(stage: Stage) -> Path | None:
    """What the reward model is and the critic starts as; None where there is neither.

    Without a reward model the critic starts where step 2 would: from the reward model's base checkpoint or, with
    reward.initialize_from=sft, from the SFT model, with a fresh head.
    """
    config = stage.config
    if config.rlhf.has_reward_model or (config.rlhf.has_critic and config.trained_reward_model):
        return stage.earlier_model(REWARD)
    if not config.rlhf.has_critic:
        return None
    if config.reward.initialize_from == "sft":
        return stage.earlier_model(SFT)
    return stage.model_directory(config.reward_model_source)


def load_critic(stage: Stage, scorer: Path | None, chat_format: ChatFormat) -> Scorer:
    """The critic as it starts."""
    assert scorer is not None
    settings = stage.config.rlhf.critic
    trained = stage.config.rlhf.has_reward_model or bool(stage.config.trained_reward_model)
    layers = 0 if trained else stage.config.reward.layers
    dtype, with_weights = loads(settings.zero_stage, stage.dtype, stage.ranks)
    model = load_scorer(scorer, chat_format, dtype, layers, with_weights=with_weights, trained=trained)
    return Scorer(model, settings.lora)


def load_reward(stage: Stage, scorer: Path, chat_format: ChatFormat) -> Scorer:
    """The reward model, which has learned already."""
    _, with_weights = loads(stage.config.rlhf.reward.zero_stage, stage.dtype, stage.ranks)
    return Scorer(load_scorer(scorer, chat_format, stage.dtype, with_weights=with_weights, trained=True))


class Roles:
    """Actor and critic under ZeRO; reference and reward frozen. The critic starts as the reward model."""

    def __init__(self, stage: Stage, sft: Path, scorer: Path | None, chat_format: ChatFormat, updates: tuple[int, int]):
        """`scorer` is that of `starting_scorer`; `updates` the optimiser steps that the learning rates of actor and
        critic span."""
        settings, ranks, dtype = stage.config.rlhf, stage.ranks, stage.dtype
        self.settings = settings
        loaded, with_weights = loads(settings.actor.zero_stage, dtype, ranks)
        actor = load_causal_lm(sft, chat_format, loaded, with_weights=with_weights)
        self.exact = settle_exactness(stage, actor)
        """How training and scoring of the actor equal its generation to the bit, where they do."""
        self.actor = ZeroEngine(
            Policy(actor, settings.actor.lora, self.exact), settings.actor, dtype, updates[0], ranks
        )
        critic = load_critic(stage, scorer, chat_format) if settings.has_critic else None
        self._critic = None if critic is None else ZeroEngine(critic, settings.critic, dtype, updates[1], ranks)
        self.ema = MovingAverage(self.actor, settings.ema) if settings.ema else None
        tensor, scoring = settings.generation_tensor_parallel, settings.scoring_tensor_parallel
        self._parts = {
            degree: tensor_parallel_of(Layout.over(ranks.size, degree))  # checked in preparation
            for degree in sorted({tensor, scoring.reference, scoring.reward, scoring.critic, 1})
        }
        self.generation_layout = Layout.over(ranks.size, tensor)
        trained = Layout.over(ranks.size, zero_stage=settings.actor.zero_stage)
        self.generator = Reallocation(
            self.actor.language_model, trained, self.generation_layout, self._part(tensor), ranks
        )
        self.critic_scale: tuple[float, float] | None = None
        """Shift and scale that PPO gave it; None while it has its own."""
        self._critic_view: Reallocation | None = None
        self._critic_group: GroupScoring | None = None
        if self._critic is not None and scoring.critic > 1:
            part, layout = self._part(scoring.critic), Layout.over(ranks.size, scoring.critic)
            trained = Layout.over(ranks.size, zero_stage=settings.critic.zero_stage)
            self._critic_view = Reallocation(self._critic.language_model, trained, layout, part, ranks)
            self._critic_group = GroupScoring(Scorer(cast(PreTrainedModel, self._critic_view.run())), part)
        self._reference: nn.Module | GroupScoring | None = None
        """None where there is none, or, with LoRA, the actor is it."""
        if settings.has_reference and not settings.actor.lora.rank:
            _, with_weights = loads(settings.reference.zero_stage, dtype, ranks)
            reference = Policy(load_causal_lm(sft, chat_format, dtype, with_weights=with_weights), exact=self.exact)
            self._reference = self._frozen(reference, settings.reference, scoring.reference, stage)
        self._reward: nn.Module | GroupScoring | None = None
        self.reward_is_normalized = True
        """By step 2, which leaves a scale in the reward model's config.json."""
        if settings.has_reward_model:
            assert scorer is not None
            reward = load_reward(stage, scorer, chat_format)
            self.reward_is_normalized = (reward.shift, reward.scale) != (0.0, 1.0)
            self._reward = self._frozen(reward, settings.reward, scoring.reward, stage)
        frozen = [(self._reward, settings.reward)]
        if self.exact is None or self.exact.blocked:
            frozen.append((self._reference, settings.reference))
        self._frozen_blocked = [
            BlockedWeights(role.role if isinstance(role, GroupScoring) else role)
            for role, placed in frozen
            if role is not None and placed.zero_stage == 0
        ]

    def _part(self, degree: int) -> TensorParallel:
        """This rank's of a tensor-parallel group of so many; every rank is in one."""
        part = self._parts[degree]
        assert part is not None
        return part

    def _frozen(
        self, role: Policy | Scorer, settings: FrozenSettings, degree: int, stage: Stage
    ) -> nn.Module | GroupScoring:
        """A role that only scores: whole on every rank, divided by ZeRO 3, or this rank's tensor-parallel part."""
        if degree == 1:
            return freeze(role, settings, stage.dtype, stage.ranks)
        part, size = self._part(degree), stage.ranks.size
        shard = Reallocation(role.model, Layout.over(size), Layout.over(size, degree), part, stage.ranks).run()
        role.model = cast(PreTrainedModel, shard)  # the whole one is forgotten here
        return GroupScoring(freeze(role, settings, stage.dtype, stage.ranks), part)

    @property
    def critic(self) -> ZeroEngine:
        """Only `advantage=gae` has one."""
        assert self._critic is not None
        return self._critic

    def scale_critic(self, shift: float, scale: float) -> None:
        """Give the critic, which starts as the reward model, the scale that the scores of that model got."""
        self.critic_scale = shift, scale
        group = [self._critic_group.role] if self._critic_group is not None else []
        for critic in (self.critic.module, *group):
            cast(Scorer, critic).shift, cast(Scorer, critic).scale = shift, scale

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Inside, the critic that scores has the present weights, and reference, reward and critic have theirs in
        blocked order on a CPU, where no ZeRO 3 divides them.

        Not the actor: old log-probabilities must round as in training.
        """
        blocked = list(self._frozen_blocked)
        if self._critic_view is not None:
            blocked.append(BlockedWeights(cast(nn.Module, self._critic_view.run())))
        elif self._critic is not None and self._critic.settings.zero_stage < 3:
            blocked.append(BlockedWeights(self._critic.module))
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
        critic = self._critic_group or self.critic
        return response_values(critic(batch), batch)

    @torch.no_grad()
    def scores(self, batch: TokenBatch) -> Tensor:
        """Of the reward model at each sample's last token, float32 (rows)."""
        assert self._reward is not None
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
        if self._critic is not None:
            self._critic.save(directory / "critic")
        if self.ema is not None:
            self.ema.save(directory / "ema")

    def load(self, directory: Path) -> None:
        self.actor.load(directory / "actor")
        if self._critic is not None:
            self._critic.load(directory / "critic")
        if self.ema is not None:
            self.ema.load(directory / "ema")


def response_values(scores: Tensor, batch: TokenBatch) -> Tensor:
    """The value of the state in which each response token is drawn: that of the token before it."""
    return scores[batch.predicting]


def freeze(model: nn.Module, settings: FrozenSettings, dtype: torch.dtype, ranks: Ranks) -> nn.Module:
    """A role that only scores: as it is on every rank's device, or divided over the ranks by ZeRO 3."""
    model.eval().requires_grad_(False)
    if settings.zero_stage == 0:
        return model.to(ranks.device)
    config = deepspeed_config(settings.as_optimizer, dtype, trained=False)
    divide(model, config, dtype, ranks)
    engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    engine.eval()  # returns nothing, unlike torch's
    return engine
