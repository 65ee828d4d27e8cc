"""The settings of step 3: rollouts, rewards, KL penalty, fusion, updates, and its four roles."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge
from pydantic import AfterValidator, Field, PrivateAttr, field_validator, model_validator

from inference.errors import UserError
from training.calls import Call, rlhf_calls
from training.formulas.estimators import ESTIMATORS, SHAPINGS, Estimator
from training.plan import from_blocks, read_plan, to_blocks
from training.reward_specs import RewardSpec, specs_of, stored_specs
from training.role_settings import (
    Checkpoints,
    DecayRate,
    Epochs,
    FrozenSettings,
    Iterations,
    Keep,
    Nats,
    OptimizerSettings,
    Prompts,
    Ranks,
    Rows,
    Samples,
    ScoringDegrees,
    Settings,
    Share,
    StepSeed,
    Tokens,
    Unit,
    Updates,
    misplaced,
    unguided,
    without_nulls,
)


class KLSettings(Settings):
    coefficient: float = Field(0.05, ge=0)
    """Weight of the per-token KL penalty towards the reference (its starting value when adaptive)."""
    centering: Share = Field(0.0, ge=0, le=1)
    """Share of the mean KL per token that is taken off each token's penalty: at 1 short responses are not favoured."""
    target: Nats = Field(0.0, ge=0)
    """KL to the reference in nats per response that the controller steers to; 0 keeps the coefficient fixed."""
    horizon: Annotated[float, Unit("samples")] = Field(10_000, gt=0)
    """Samples over which the adaptive controller acts (smaller reacts faster)."""
    stop: Nats = Field(0.0, ge=0)
    """End training when the KL in nats per response exceeds this, with the model of the iteration before, which was
    inside; 0 never stops."""
    keep: Nats = Field(0.0, ge=0)
    """With rlhf.keep=best: the largest KL in nats per response of a model that may be kept; 0 means that of `stop`, and
    any where that is 0."""
    place: Literal["auto", "reward", "loss"] = "auto"
    """Where the penalty acts: taken off the rewards (k1), or added to the actor's loss (k3); auto: as the
    estimator's entry says."""
    measure: bool = False
    """Score with a reference, for the metrics and warnings of KL, also where nothing else asks for it."""

    @property
    def bound(self) -> float:
        """The largest KL of a model that keep=best keeps."""
        return self.keep or self.stop or math.inf


class RewardWeights(Settings):
    """What each source of rewards counts in their sum."""

    model: float = Field(1.0, ge=0)
    """Of the reward model's score; at 0 no reward model is loaded and step 2 is not needed."""
    function: float = Field(1.0, ge=0)
    """Of what `rlhf.reward_function` returns; several have weights of their own, which it multiplies."""
    url: float = Field(1.0, ge=0)
    """Of what `rlhf.reward_url` answers."""


class PTXSettings(Settings):
    """The SFT loss on demonstrations, mixed into the actor's PPO steps (InstructGPT's PPO-ptx)."""

    coefficient: float = Field(0.0, ge=0)
    """Weight of the SFT loss per token beside the policy loss (DeepSpeed-Chat: 27.8); 0 switches it off."""
    source: str = ""
    """JSON-lines file (or directory) of demonstrations; empty means those of step 1, data/sft_train.jsonl."""
    rows: Rows = Field(0, ge=0)
    """Demonstrations in each mini-batch, over all ranks; 0 means as many as it has samples."""


class FusionSettings(Settings):
    """Inter-stage fusion: samples are scored as they end, the long tail is gathered on few ranks. Intra-stage fusion:
    actor and critic train in each other's pauses. Same algorithm."""

    mode: Literal["none", "inter", "auto"] = "auto"
    """auto fuses where a simulation with measured costs says that it pays, and logs what it decided."""
    threshold: Samples = Field(0, ge=0)
    """Unfinished samples at which the tail is gathered; 0: the simulation chooses."""
    rows: Samples = Field(0, ge=0)
    """Samples that one rank (one tensor-parallel group) takes then, at most; 0: the simulation chooses."""
    move: Literal["auto", "cache", "tokens"] = "auto"
    """What travels with a sample: its keys and values, or only its tokens (a new prefill); auto takes the cheaper."""
    training: Literal["auto", "serial", "1f1b", "fused"] = "auto"
    """Order of micro-batches where a plan trains in pipeline stages: one at a time, 1F1B role by role, or actor
    and critic woven together; auto takes the faster of the last two."""


class RLHFSettings(Settings):
    advantage: Annotated[str, AfterValidator(ESTIMATORS.stored)] = "gae"
    """Estimator of the advantages: `gae` is PPO with a critic; the others need none."""
    seed: StepSeed = -1
    """Seed of everything that the step draws at random; -1: the run's."""
    iterations: Iterations = Field(100, ge=1)
    """PPO rounds: each generates new samples and trains on them."""
    prompts_per_iteration: Prompts = Field(64, ge=1)
    """Prompts of one iteration, over all ranks."""
    samples_per_prompt: Samples = Field(1, ge=1)
    """Responses generated for each prompt."""
    mini_batches: Updates = Field(4, ge=1)
    """Optimiser steps that one PPO epoch makes over an iteration's samples."""
    ppo_epochs: Epochs = Field(1, ge=1)
    """Passes over an iteration's samples."""
    micro_batch_tokens: Tokens = Field(4096, ge=8)
    """Tokens that one forward pass of one rank takes; the gradient does not depend on it."""
    generation_batch: Annotated[Annotated[int, Ge(1)] | Literal["auto"], Unit("samples")] = "auto"
    """Samples that one rank (one tensor-parallel group) decodes at the same time: slots, refilled as samples end. auto:
    on a GPU as many as its memory holds beside all else, on a CPU 32."""
    release_generation: bool = False
    """Give back, while training, the memory of what generation keeps: keys and values, and a copy of the weights."""
    generation_tensor_parallel: Ranks = Field(1, ge=1)
    """Ranks that generate together, each with a part of the actor's weights; divides the number of ranks."""
    scoring_tensor_parallel: ScoringDegrees = ScoringDegrees()
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; log-probabilities are taken at the same temperature."""
    min_response_tokens: Tokens = Field(0, ge=0)
    """The end-of-turn token is forbidden before this many tokens."""
    clip: float = Field(0.2, gt=0)
    """PPO's clip range of the policy ratio."""
    clip_high: float = Field(0.0, ge=0)
    """Its range above 1, where that is to be another (DAPO: 0.28 over 0.2); 0: as `clip`."""
    ratio: Literal["token", "sequence"] = "token"
    """Whose ratio is clipped: each token's, or the whole sample's (GSPO, whose `clip` is 3e-4, `clip_high` 4e-4)."""
    loss_mean: Literal["token", "sequence", "constant"] = "token"
    """What the actor's loss is a mean of: all tokens (DAPO), each sample's mean (GRPO's paper), or each sample's sum
    over data.max_response_tokens (Dr. GRPO)."""
    mask_truncated: bool = False
    """Learn nothing from samples that did not end (DAPO's overlong filtering)."""
    ppo_kl_stop: Annotated[float, Unit("nats a token")] = Field(0.0, ge=0)
    """End an iteration's updates when a mini-batch is this far from the old policy (k3, nats a token); 0 never does."""
    value_clip: float = Field(0.2, ge=0)
    """Clip range of the value function around its old prediction; 0 switches it off."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE's lambda."""
    whiten_advantages: bool = True
    """Give advantages mean 0 and standard deviation 1 over an iteration's batch, where the
    estimator's entry says so."""
    reward_function: Annotated[str | list[str], AfterValidator(stored_specs)] = ""
    """What scores responses, added to the reward model's score (docs/step3_rlhf.md): `path/to/file.py:function`, or a
    reward by name, as `length:..40`; a list adds several, `=0.5` behind one is its weight."""
    reward_url: str = ""
    """http(s) address that scores responses: POST {prompts, responses, rows} -> {scores}; added as well. A secret in it
    is named: https://me:${REWARD_KEY}@host stands for the environment variable's value."""
    reward_timeout: Annotated[float, Unit("seconds")] = Field(60.0, gt=0)
    """Seconds to wait for an answer of `reward_url`."""
    reward_retries: Annotated[int, Unit("tries")] = Field(5, ge=0)
    """Further tries when `reward_url` does not answer, with growing pauses."""
    reward_weights: RewardWeights = RewardWeights()
    reward_normalization: Annotated[str, AfterValidator(SHAPINGS.stored)] = "running"
    """Of scores that step 2 has not normalised (functions, addresses, other reward models): running makes their mean 0
    and their standard deviation 1, over all seen so far; none takes them as they are."""
    score_clip: float = Field(5.0, ge=0)
    """Normalised scores are clipped to +- this, others never; 0 switches it off."""
    missing_end_penalty: float = Field(1.0, ge=0)
    """Taken off the score of a response that has no end-of-turn token; 0 switches it off."""
    critic_warmup: Iterations = Field(0, ge=0)
    """Iterations at the start in which only the critic learns."""
    align_overflow: bool = True
    """In fp16: when the gradient of actor or critic overflows, both skip that optimiser step."""
    ema: DecayRate = 0.0
    """Decay of a moving average of the actor's weights, saved as step3_rlhf/ema_model (try 0.99); 0 keeps none."""
    ptx: PTXSettings = PTXSettings()
    exact: Literal["auto", True, False] = "auto"
    """Let training compute what generation computed, to the bit, on a CPU; auto does in bf16 where the processor
    multiplies it."""
    old_logprobs: Literal["auto", "generation", "recompute"] = "auto"
    """Where the old policy's log-probabilities come from; auto keeps generation's in fp32 and where `exact` holds, and
    recomputes otherwise."""
    plan: dict[str, dict[str, Any]] = Field({})
    """Where each call runs (docs/plans.md): a file as the command `plan` writes it, or what is in one. It then
    decides about ZeRO stages, tensor-parallel degrees, micro-batches and where frozen roles wait in step 3. Empty:
    every call on all ranks."""
    fusion: FusionSettings = FusionSettings()
    kl: KLSettings = KLSettings()
    actor: OptimizerSettings = OptimizerSettings(learning_rate=1e-6, epsilon=1e-5)
    critic: OptimizerSettings = OptimizerSettings(learning_rate=9e-6, epsilon=1e-5)
    reference: FrozenSettings = FrozenSettings()
    reward: FrozenSettings = FrozenSettings()
    samples_every: Iterations = Field(10, ge=1)
    """Iterations between looks at the fixed prompts in samples.jsonl."""
    sample_prompts: Prompts = Field(4, ge=1)
    """How many fixed prompts those are."""
    rollouts_every: Iterations = Field(0, ge=0)
    """Iterations between those of which every sample goes into rollouts.jsonl; 0: none."""
    eval_every: Iterations = Field(0, ge=0)
    """Iterations between evaluations on held-out prompts, with one before the first and one at the end; 0: none."""
    eval_prompts: Prompts = Field(64, ge=1)
    """Held-out prompts answered in an evaluation."""
    keep: Keep = "last"
    """The model that is left: the last one, or that of the evaluation with the highest reward within kl.keep."""
    checkpoint_every: Iterations = Field(10, ge=0)
    """Iterations between checkpoints; 0 means none."""
    keep_checkpoints: Checkpoints = Field(2, ge=1)
    """How many of the newest checkpoints are kept."""

    @field_validator("plan", mode="before")
    @classmethod
    def _plan_as_it_is_stored(cls, given: Any) -> Any:
        """Read what is in the file, every block whole."""
        given = without_nulls(given) if isinstance(given, dict) else given
        if given in ("", {}):
            return {}
        try:
            return to_blocks(read_plan(Path(given)) if isinstance(given, str) else from_blocks(given))
        except UserError as error:
            raise ValueError(str(error).rstrip(".")) from None

    _has_own_reference: bool = PrivateAttr(False)
    """Whether `reference_model` names one (`take_reference`)."""

    @property
    def reference_is_actor(self) -> bool:
        """Whether the reference is the actor without its adapters, where both lie alike (Plan.actor_is_reference)."""
        return bool(self.actor.lora.rank) and not self._has_own_reference

    @property
    def reward_functions(self) -> list[RewardSpec]:
        """What `reward_function` names."""
        return specs_of(self.reward_function)

    @property
    def asked_functions(self) -> list[RewardSpec]:
        """The reward functions that count, with their weights in the sum."""
        weight = self.reward_weights.function
        return [replace(spec, weight=spec.weight * weight) for spec in self.reward_functions if weight]

    @property
    def estimator(self) -> Estimator:
        """The estimator's entry; training.formulas.own has the formula of a user's own."""
        return ESTIMATORS.entry(self.advantage)

    @property
    def has_critic(self) -> bool:
        """Whether a critic is trained."""
        return self.estimator.critic

    @property
    def has_reward_model(self) -> bool:
        """Whether the reward model of step 2 scores; else rewards come from a function or an address alone."""
        return self.reward_weights.model > 0

    @property
    def has_reference(self) -> bool:
        """Whether the frozen SFT model scores; it is loaded unless, with LoRA, it is the actor."""
        return self.kl.measure or max(self.kl.coefficient, self.kl.target, self.kl.stop, self.kl.keep) > 0

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL penalty is a term of the actor's loss, not a part of the rewards."""
        in_loss = self.kl.place == "loss" or (self.kl.place == "auto" and self.estimator.kl == "loss")
        return in_loss and self.has_reference

    @property
    def evaluations(self) -> int:
        """How many evaluations eval_every makes: one before the first iteration, then every so many, one at the end."""
        return 1 + math.ceil(self.iterations / self.eval_every) if self.eval_every else 0

    @property
    def calls(self) -> tuple[Call, ...]:
        """What an iteration runs."""
        return rlhf_calls(self.has_critic, self.has_reward_model, self.has_reference)

    @property
    def as_planned(self) -> "RLHFSettings":
        """The settings with the ZeRO stages, tensor-parallel degrees and offload of frozen roles of a plan."""
        changed: dict[str, Any] = {}
        for role in ("actor", "critic", "reference", "reward"):
            is_trained = isinstance(getattr(self, role), OptimizerSettings)
            if block := self.plan.get(f"{role}_train" if is_trained else f"{role}_score"):
                planned = {"zero_stage": block["zero_stage"]}
                planned |= {} if is_trained else {"offload": "parameters" if block.get("offload") else "none"}
                changed[role] = getattr(self, role).model_copy(update=planned)
        scoring = {role: self.plan.get(f"{role}_score") for role in ScoringDegrees.model_fields}
        degrees = {role: block["tensor"] for role, block in scoring.items() if block}
        changed["scoring_tensor_parallel"] = self.scoring_tensor_parallel.model_copy(update=degrees)
        return self.model_copy(update=changed)

    @property
    def divided_scorer(self) -> str:
        """A role that scores and is divided over ranks, so that no rank can score alone; '' if there is none."""
        reference = "actor" if self.reference_is_actor else "reference"
        roles = [reference] * self.has_reference + ["critic"] * self.has_critic + ["reward"] * self.has_reward_model
        divided = [
            role
            for role in roles
            if getattr(self, role).zero_stage == 3 or getattr(self.scoring_tensor_parallel, role, 1) > 1
        ]
        return min(divided, default="")

    @model_validator(mode="after")
    def _the_best_is_looked_for(self):
        if problem := unguided(self.keep, self.eval_every):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _offload_has_its_stage(self):
        for role in () if self.plan else ("actor", "critic", "reference", "reward"):  # a plan has stages of its own
            settings = getattr(self, role)
            if problem := misplaced(settings.offload, settings.zero_stage):
                raise ValueError(f"{role}.{problem}")
        return self

    @model_validator(mode="after")
    def _scoring_degrees_fit_the_roles(self):
        if self.plan:  # it replaces degrees and stages
            return self
        degrees = self.scoring_tensor_parallel
        for role in ("reference", "reward"):
            if getattr(degrees, role) > 1 and getattr(self, role).zero_stage == 3:
                raise ValueError(
                    f"scoring_tensor_parallel.{role} and {role}.zero_stage=3 both divide its weights; choose one"
                )
        if degrees.critic > 1 and not self.has_critic:
            raise ValueError(f"scoring_tensor_parallel.critic needs a critic, and {self.advantage} has none")
        return self

    def take_reference(self, model: str) -> None:
        """Know of the run's `reference_model`, which lies beside these settings; empty where the run has none."""
        self._has_own_reference = bool(model)

    def require_fitting_roles(self) -> None:
        """Raise ValueError where the reference, or a role that fusion needs whole, is divided as it cannot be."""
        if self.plan:  # is judged itself
            return
        if self.scoring_tensor_parallel.reference > 1 and self.reference_is_actor:
            raise ValueError(
                "rlhf.scoring_tensor_parallel.reference: with LoRA the actor is the reference; leave it at 1"
            )
        if self.fusion.mode == "inter" and self.divided_scorer:
            is_zero_3 = getattr(self, self.divided_scorer).zero_stage == 3
            raise ValueError(
                f"rlhf.fusion.mode=inter needs every role that scores whole on each rank, and {self.divided_scorer} "
                f"has {'zero_stage 3' if is_zero_3 else 'scoring_tensor_parallel over 1'}; use stage 0, 1 or 2 and "
                f"whole weights for it, or rlhf.fusion.mode=none"
            )

    @model_validator(mode="after")
    def _fusion_rows_are_decoded(self):
        if not self.plan and self.generation_batch != "auto" and self.fusion.rows > self.generation_batch:
            raise ValueError(f"fusion.rows={self.fusion.rows} is more than generation_batch={self.generation_batch}")
        return self

    @model_validator(mode="after")
    def _estimator_has_what_it_needs(self):
        if self.samples_per_prompt < (least := self.estimator.samples):
            raise ValueError(
                f"advantage={self.advantage} compares the samples of a prompt and needs samples_per_prompt of {least} "
                f"or more"
            )
        if self.critic_warmup and not self.has_critic:
            raise ValueError(f"critic_warmup={self.critic_warmup} needs a critic, and {self.advantage} has none")
        return self

    @model_validator(mode="after")
    def _something_rewards(self):
        if self.reward_url and not self.reward_url.startswith(("http://", "https://")):
            raise ValueError(f"reward_url={self.reward_url} must begin with http:// or https://")
        weights = self.reward_weights
        used = self.asked_functions or (self.reward_url and weights.url)
        if not self.has_reward_model and not used:
            raise ValueError("reward_weights.model=0 leaves nothing that rewards; give reward_function or reward_url")
        return self

    @model_validator(mode="after")
    def _batch_divides(self):
        if self.mini_batches > self.prompts_per_iteration * self.samples_per_prompt:
            samples = self.prompts_per_iteration * self.samples_per_prompt
            raise ValueError(
                f"mini_batches={self.mini_batches} is more than the {samples} samples of an iteration; use {samples} "
                f"or fewer, or raise prompts_per_iteration to {-(-self.mini_batches // self.samples_per_prompt)}"
            )
        return self
