"""Every setting of a run with its default, one pydantic model a stage; config_files.py reads what people write."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Dtype = Literal["auto", "fp32", "bf16", "fp16"]
ZeroStage = Literal[0, 1, 2, 3]
DecayRate = Annotated[float, Field(ge=0, lt=1)]


EMBEDDED_DATA = "chitchat"
DPO_STEP = 4
"""The number of the step that `method: dpo` puts in the place of steps 2 and 3."""


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)


class LoRASettings(Settings):
    rank: int = Field(0, ge=0)
    """Rank of the LoRA adapter; 0 trains all weights."""
    alpha: int = Field(16, gt=0)
    """LoRA scale: the adapter's output is multiplied by alpha / rank."""
    targets: str | list[str] = "all-linear"
    """Module names that get an adapter, or `all-linear`."""
    learning_rate: float = Field(0.0, ge=0)
    """Peak learning rate of the adapters; 0 takes the optimizer's, which a reward model's score head always has."""

    @field_validator("targets")
    @classmethod
    def _some_targets(cls, targets: str | list[str]) -> str | list[str]:
        if not targets or "" in ([targets] if isinstance(targets, str) else targets):
            raise ValueError("is empty; give names of modules, or all-linear")
        return targets


class OptimizerSettings(Settings):
    """How one role's weights are trained."""

    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up; linear and cosine end at 0."""
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of all optimiser steps in which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay, on matrices only."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    epsilon: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    gradient_clipping: float = Field(1.0, ge=0)
    """Largest norm of the whole gradient; 0 switches clipping off."""
    zero_stage: ZeroStage = 0
    """DeepSpeed ZeRO stage: what is divided over the ranks (1 optimiser, 2 gradients too, 3 weights too)."""
    master_weights: bool = True
    """In bf16: keep the weights in fp32 too, and sum gradients in it. Without, less memory; small updates get lost."""
    offload: Literal["none", "optimizer", "optimizer+parameters"] = "none"
    """What ZeRO keeps in host memory (GPU runs; parameters need ZeRO stage 3)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoRASettings = LoRASettings()
    deepspeed: dict[str, Any] = {}
    """DeepSpeed configuration laid over ours, for what has no setting here."""

    @model_validator(mode="after")
    def _offload_needs_zero(self):
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload=optimizer needs zero_stage 1, 2 or 3")
        if self.offload == "optimizer+parameters" and self.zero_stage != 3:
            raise ValueError("offload=optimizer+parameters needs zero_stage 3")
        return self

    @property
    def adapter_learning_rate(self) -> float:
        return self.lora.learning_rate or self.learning_rate


class FrozenSettings(Settings):
    """Where the weights of a role that only scores lie."""

    zero_stage: Literal[0, 3] = 0
    """0 keeps the weights whole on every rank, 3 divides them over the ranks."""
    offload: Literal["none", "parameters"] = "none"
    """`parameters` keeps them in host memory between uses (GPU runs; needs ZeRO stage 3)."""

    @model_validator(mode="after")
    def _offload_needs_zero(self):
        if self.offload == "parameters" and self.zero_stage != 3:
            raise ValueError("offload=parameters needs zero_stage 3")
        return self

    @property
    def as_optimizer(self) -> OptimizerSettings:
        """The same placement in the words that DeepSpeed's configuration is built from."""
        offload: Literal["none", "optimizer+parameters"] = "none" if self.offload == "none" else "optimizer+parameters"
        return OptimizerSettings(zero_stage=self.zero_stage, offload=offload)


class DataSettings(Settings):
    source: str | list[str] = EMBEDDED_DATA
    """`chitchat` (the embedded default), a file, directory or hub id; a list blends several, `=2` is a weight."""
    split: tuple[float, float, float] = (2, 4, 4)
    """Shares of one data set that go to steps 1, 2 and 3, when one set serves all steps."""
    held_out: float = Field(0.05, gt=0, lt=0.5)
    """Share of the prompts (of the embedded default: dialogues) that is kept for evaluation."""
    max_prompt_tokens: int = Field(256, ge=4)
    """Longest prompt; older turns are dropped first."""
    max_response_tokens: int = Field(256, ge=2)
    """Longest response, its end-of-turn token included."""
    limit: int = Field(0, ge=0)
    """Use at most this many rows (of the embedded default: dialogues) of each source; 0 means all."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What to do with a row that cannot be used: stop and name its line, or leave it out and count it."""

    @property
    def sources(self) -> list[str]:
        return [self.source] if isinstance(self.source, str) else self.source

    @field_validator("source")
    @classmethod
    def _check_source(cls, source: str | list[str]) -> str | list[str]:
        """A list of one is that one."""
        if not source:
            raise ValueError("is empty; give a file, a directory or a hub id")
        if isinstance(source, list) and len(source) > 1 and EMBEDDED_DATA in source:
            raise ValueError(f"'{EMBEDDED_DATA}' has a split of its own and cannot be blended with other sources")
        return source[0] if isinstance(source, list) and len(source) == 1 else source


class StepSettings(Settings):
    """What steps 1 and 2 (reward model, DPO) have in common."""

    batch_size: int = Field(32, ge=1)
    """Rows (pairs in step 2) in one optimiser step, over all ranks."""
    micro_batch_tokens: int = Field(4096, ge=8)
    """Tokens that one forward pass of one rank takes; the gradient does not depend on it."""
    epochs: int = Field(1, ge=1)
    """Passes over the training rows."""
    max_steps: int = Field(0, ge=0)
    """Stop after this many optimiser steps; 0 means after all epochs."""
    eval_every: int = Field(50, ge=0)
    """Optimiser steps between evaluations on held-out rows; 0 means only at the start and the end."""
    eval_rows: int = Field(200, ge=1)
    """Held-out rows used in an evaluation."""
    checkpoint_every: int = Field(50, ge=0)
    """Optimiser steps between checkpoints; 0 means none."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest checkpoints are kept."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of activations and attention weights that training drops, wherever the family has dropout; 0 is off."""
    optimizer: OptimizerSettings = OptimizerSettings()


class SFTSettings(StepSettings):
    token_budget: int = Field(0, ge=0)
    """Use only the first rows that have together no more than this many tokens; 0 means all rows."""


class RewardSettings(StepSettings):
    initialize_from: Literal["base", "sft"] = "base"
    """Start from the reward model's base checkpoint, or from step 1's model (same architecture only)."""
    layers: int = Field(0, ge=0)
    """Use only the first so many layers of the base checkpoint, for the critic too; 0 uses all."""
    normalize: bool = True
    """Shift and scale the scores so that human replies of held-out rows have mean 0 and standard deviation 1."""


class DPOSettings(StepSettings):
    beta: float = Field(0.1, gt=0)
    """How dear it is to leave the reference: an implicit reward is beta times the log-ratio of policy and reference."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the pairs taken to be labelled the wrong way round (conservative DPO); 0 is DPO as published."""
    length_normalized: bool = False
    """Divide each log-ratio by its response's tokens, so that length earns nothing; wants a larger beta (2 to 10)."""
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=1e-6)


class KLSettings(Settings):
    coefficient: float = Field(0.05, ge=0)
    """Weight of the per-token KL penalty towards the reference (its starting value when adaptive)."""
    centering: float = Field(0.0, ge=0, le=1)
    """Share of the mean KL per token that is taken off each token's penalty: at 1 short responses are not favoured."""
    target: float = Field(0.0, ge=0)
    """KL to the reference in nats per response that the controller steers to; 0 keeps the coefficient fixed."""
    horizon: float = Field(10_000, gt=0)
    """Samples over which the adaptive controller acts (smaller reacts faster)."""
    stop: float = Field(0.0, ge=0)
    """End training before the update of an iteration whose KL in nats per response exceeds this; 0 never stops."""
    place: Literal["auto", "reward", "loss"] = "auto"
    """Where the penalty acts: taken off the rewards (k1), or added to the actor's loss (k3); auto: loss for grpo."""


class RewardWeights(Settings):
    """What each source of rewards counts in their sum."""

    model: float = Field(1.0, ge=0)
    """Of the reward model's score; at 0 no reward model is loaded and step 2 is not needed."""
    function: float = Field(1.0, ge=0)
    """Of what `rlhf.reward_function` returns."""
    url: float = Field(1.0, ge=0)
    """Of what `rlhf.reward_url` answers."""


class PTXSettings(Settings):
    """The SFT loss on demonstrations, mixed into the actor's PPO steps (InstructGPT's PPO-ptx)."""

    coefficient: float = Field(0.0, ge=0)
    """Weight of the SFT loss per token beside the policy loss (DeepSpeed-Chat: 27.8); 0 switches it off."""
    source: str = ""
    """JSON-lines file (or directory) of demonstrations; empty means those of step 1, data/sft_train.jsonl."""
    rows: int = Field(0, ge=0)
    """Demonstrations in each mini-batch, over all ranks; 0 means as many as it has samples."""


class ScoringDegrees(Settings):
    """Ranks that score together in a role, each with a part of its weights; each divides the number of ranks."""

    reference: int = Field(1, ge=1)
    """Of the reference; over 1 where it does not fit whole on a rank beside training."""
    reward: int = Field(1, ge=1)
    """Of the reward model, as for the reference."""
    critic: int = Field(1, ge=1)
    """Of the critic, which keeps a part of its weights for scoring then, beside those that it trains."""


class FusionSettings(Settings):
    """Inter-stage fusion: samples are scored as they end, the long tail is gathered on few ranks. Same algorithm."""

    mode: Literal["none", "inter", "auto"] = "auto"
    """auto fuses where a simulation with measured costs says that it pays, and logs what it decided."""
    threshold: int = Field(0, ge=0)
    """Unfinished samples at which the tail is gathered; 0: the simulation chooses."""
    rows: int = Field(0, ge=0)
    """Samples that one rank (one tensor-parallel group) takes then, at most; 0: the simulation chooses."""
    move: Literal["auto", "cache", "tokens"] = "auto"
    """What travels with a sample: its keys and values, or only its tokens (a new prefill); auto takes the cheaper."""


class RLHFSettings(Settings):
    advantage: Literal["gae", "rloo", "grpo", "reinforce++"] = "gae"
    """Estimator of the advantages: `gae` is PPO with a critic; the others need none (docs/step3_rlhf.md)."""
    iterations: int = Field(100, ge=1)
    """PPO rounds: each generates new samples and trains on them."""
    prompts_per_iteration: int = Field(64, ge=1)
    """Prompts of one iteration, over all ranks."""
    samples_per_prompt: int = Field(1, ge=1)
    """Responses generated for each prompt."""
    mini_batches: int = Field(4, ge=1)
    """Optimiser steps that one PPO epoch makes over an iteration's samples."""
    ppo_epochs: int = Field(1, ge=1)
    """Passes over an iteration's samples."""
    micro_batch_tokens: int = Field(4096, ge=8)
    """Tokens that one forward pass of one rank takes; the gradient does not depend on it."""
    generation_batch: int = Field(32, ge=1)
    """Samples that one rank (one tensor-parallel group) decodes at the same time: slots, refilled as samples end."""
    generation_tensor_parallel: int = Field(1, ge=1)
    """Ranks that generate together, each with a part of the actor's weights; divides the number of ranks."""
    scoring_tensor_parallel: ScoringDegrees = ScoringDegrees()
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; log-probabilities are taken at the same temperature."""
    min_response_tokens: int = Field(0, ge=0)
    """The end-of-turn token is forbidden before this many tokens."""
    clip: float = Field(0.2, gt=0)
    """PPO's clip range of the policy ratio."""
    ppo_kl_stop: float = Field(0.0, ge=0)
    """End an iteration's updates when a mini-batch is this far from the old policy (k3, nats a token); 0 never does."""
    value_clip: float = Field(0.2, ge=0)
    """Clip range of the value function around its old prediction; 0 switches it off."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE's lambda."""
    whiten_advantages: bool = True
    """Give advantages mean 0 and standard deviation 1 over an iteration's batch; gae and reinforce++ only."""
    reward_function: str = ""
    """`path/to/file.py:function` that scores responses, added to the reward model's score (docs/step3_rlhf.md)."""
    reward_url: str = ""
    """http(s) address that scores responses: POST {prompts, responses, rows} -> {scores}; added as well."""
    reward_timeout: float = Field(60.0, gt=0)
    """Seconds to wait for an answer of `reward_url`."""
    reward_retries: int = Field(5, ge=0)
    """Further tries when `reward_url` does not answer, with growing pauses."""
    reward_weights: RewardWeights = RewardWeights()
    score_clip: float = Field(5.0, ge=0)
    """Scores are clipped to +- this; 0 switches it off."""
    missing_end_penalty: float = Field(1.0, ge=0)
    """Taken off the score of a response that has no end-of-turn token; 0 switches it off."""
    critic_warmup: int = Field(0, ge=0)
    """Iterations at the start in which only the critic learns."""
    align_overflow: bool = True
    """In fp16: when the gradient of actor or critic overflows, both skip that optimiser step."""
    ema: DecayRate = 0.0
    """Decay of a moving average of the actor's weights, saved as step3_rlhf/ema_model (try 0.99); 0 keeps none."""
    ptx: PTXSettings = PTXSettings()
    old_logprobs: Literal["auto", "generation", "recompute"] = "auto"
    """Where the old policy's log-probabilities come from; auto keeps generation's in fp32 and recomputes otherwise."""
    fusion: FusionSettings = FusionSettings()
    kl: KLSettings = KLSettings()
    actor: OptimizerSettings = OptimizerSettings(learning_rate=1e-6, epsilon=1e-5)
    critic: OptimizerSettings = OptimizerSettings(learning_rate=9e-6, epsilon=1e-5)
    reference: FrozenSettings = FrozenSettings()
    reward: FrozenSettings = FrozenSettings()
    samples_every: int = Field(10, ge=1)
    """Iterations between looks at the fixed prompts in samples.jsonl."""
    sample_prompts: int = Field(4, ge=1)
    """How many fixed prompts those are."""
    checkpoint_every: int = Field(10, ge=0)
    """Iterations between checkpoints; 0 means none."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest checkpoints are kept."""

    @property
    def has_critic(self) -> bool:
        """Whether a critic is trained; only `gae` needs values."""
        return self.advantage == "gae"

    @property
    def has_reward_model(self) -> bool:
        """Whether the reward model of step 2 scores; else rewards come from a function or an address alone."""
        return self.reward_weights.model > 0

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL penalty is a term of the actor's loss, not a part of the rewards."""
        return self.kl.place == "loss" or (self.kl.place == "auto" and self.advantage == "grpo")

    @property
    def divided_scorer(self) -> str:
        """A role that scores and is divided over ranks, so that no rank can score alone; '' if there is none."""
        reference = "actor" if self.actor.lora.rank else "reference"  # with LoRA the actor is the reference too
        roles = [reference, *["critic"] * self.has_critic, *["reward"] * self.has_reward_model]
        divided = [
            role
            for role in roles
            if getattr(self, role).zero_stage == 3 or getattr(self.scoring_tensor_parallel, role, 1) > 1
        ]
        return min(divided, default="")

    @model_validator(mode="after")
    def _scoring_degrees_fit_the_roles(self):
        degrees = self.scoring_tensor_parallel
        if degrees.reference > 1 and self.actor.lora.rank:
            raise ValueError("scoring_tensor_parallel.reference: with LoRA the actor is the reference; leave it at 1")
        for role in ("reference", "reward"):
            if getattr(degrees, role) > 1 and getattr(self, role).zero_stage == 3:
                raise ValueError(
                    f"scoring_tensor_parallel.{role} and {role}.zero_stage=3 both divide its weights; choose one"
                )
        if degrees.critic > 1 and not self.has_critic:
            raise ValueError(f"scoring_tensor_parallel.critic needs a critic, and {self.advantage} has none")
        return self

    @model_validator(mode="after")
    def _fusion_needs_whole_roles(self):
        if self.fusion.mode == "inter" and self.divided_scorer:
            is_zero_3 = getattr(self, self.divided_scorer).zero_stage == 3
            raise ValueError(
                f"fusion.mode=inter needs every role that scores whole on each rank, and {self.divided_scorer} has "
                f"{'zero_stage 3' if is_zero_3 else 'scoring_tensor_parallel over 1'}; use stage 0, 1 or 2 and whole "
                f"weights for it, or fusion.mode=none"
            )
        if self.fusion.rows > self.generation_batch:
            raise ValueError(f"fusion.rows={self.fusion.rows} is more than generation_batch={self.generation_batch}")
        return self

    @model_validator(mode="after")
    def _estimator_has_what_it_needs(self):
        if self.advantage in ("rloo", "grpo") and self.samples_per_prompt < 2:
            raise ValueError(
                f"advantage={self.advantage} compares the samples of a prompt and needs samples_per_prompt of 2 or more"
            )
        if self.critic_warmup and not self.has_critic:
            raise ValueError(f"critic_warmup={self.critic_warmup} needs a critic, and {self.advantage} has none")
        return self

    @model_validator(mode="after")
    def _something_rewards(self):
        file, colon, name = self.reward_function.rpartition(":")
        if self.reward_function and not (file.endswith(".py") and colon and name.isidentifier()):
            raise ValueError(f"reward_function={self.reward_function} must be path/to/file.py:function")
        if self.reward_url and not self.reward_url.startswith(("http://", "https://")):
            raise ValueError(f"reward_url={self.reward_url} must begin with http:// or https://")
        weights = self.reward_weights
        used = (bool(self.reward_function) and weights.function) or (bool(self.reward_url) and weights.url)
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


class EvaluationSettings(Settings):
    prompts: int = Field(200, ge=0)
    """Held-out prompts answered by the SFT and the RLHF (or DPO) model in the end; 0 leaves the comparison out."""
    rows: int = Field(200, ge=0)
    """Held-out pairs (accuracy of the reward model) and demonstrations (perplexity) read then; 0 leaves both out."""
    true_score: Literal["none", "upbeat"] = "none"
    """The rule behind the preference, when it is known: `upbeat` is the vaderSentiment lexicon."""


class LoggingSettings(Settings):
    """Where metrics go beside metrics.jsonl."""

    tensorboard: bool = False
    """Also write TensorBoard event files (pip extra `tensorboard`)."""
    wandb: bool = False
    """Also send metrics to Weights & Biases (pip extra `wandb`)."""
    wandb_project: str = "rlhf-chat"
    """The project there."""


class RunConfig(Settings):
    model: str
    """Actor: a preset's model, a hub id, a local directory, or a model package."""
    reward_model: str = ""
    """Reward model and critic; empty means the same as `model`."""
    sft_model: str = ""
    """A finished SFT model used instead of step 1's; steps 2 and 3 then need no step 1."""
    trained_reward_model: str = ""
    """A finished reward model used instead of step 2's."""
    method: Literal["ppo", "dpo"] = "ppo"
    """What follows step 1: a reward model and PPO (steps 2 and 3), or DPO alone, straight from the pairs."""
    seed: int = Field(1, ge=0)
    """Seed of everything drawn at random."""
    dtype: Dtype = "auto"
    """Number format of the weights while computing; auto is bf16 where that is fast, else fp32 (fp16 on a GPU)."""
    save_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the models that the run leaves behind."""
    processes: int = Field(1, ge=1)
    """Processes (ranks) on this machine; each takes one GPU where there are GPUs."""
    threads: int = Field(0, ge=0)
    """CPU threads of one process; 0 divides the machine's cores among the processes."""
    data: DataSettings = DataSettings()
    sft: SFTSettings = SFTSettings()
    reward: RewardSettings = RewardSettings()
    dpo: DPOSettings = DPOSettings()
    rlhf: RLHFSettings = RLHFSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    logging: LoggingSettings = LoggingSettings()
    architecture: dict[str, dict[str, Any]] = {}
    """Hugging Face configuration values of `model` and `reward_model`, so that a dry run needs no hub."""
    announce: str = ""
    """A line that the command prints before it starts (presets say here how long they take)."""

    @model_validator(mode="after")
    def _fits_together(self):
        samples = self.rlhf.prompts_per_iteration * self.rlhf.samples_per_prompt
        if samples < self.processes:
            raise ValueError(
                f"an iteration of {samples} samples leaves some of processes={self.processes} idle; use {samples} or "
                f"fewer, or raise rlhf.prompts_per_iteration to {-(-self.processes // self.rlhf.samples_per_prompt)}"
            )
        for step in set(self.steps) - {3}:
            name, batch = {1: "sft", 2: "reward", DPO_STEP: "dpo"}[step], self.supervised(step).batch_size
            if batch < self.processes:
                raise ValueError(
                    f"{name}.batch_size={batch} leaves some of processes={self.processes} idle; use {batch} or fewer, "
                    f"or raise {name}.batch_size to {self.processes}"
                )
        trained = (
            self.sft.optimizer,
            self.reward.optimizer,
            self.dpo.optimizer,
            self.rlhf.actor,
            self.rlhf.critic,
        )
        if self.dtype == "fp16" and not all(optimizer.master_weights for optimizer in trained):
            raise ValueError("master_weights=false needs dtype bf16: fp16 cannot train without fp32 weights")
        if self.rlhf.min_response_tokens >= self.data.max_response_tokens:
            raise ValueError(
                f"rlhf.min_response_tokens={self.rlhf.min_response_tokens} must be less than "
                f"data.max_response_tokens={self.data.max_response_tokens}"
            )
        return self

    @property
    def steps(self) -> list[int]:
        """Numbers of the steps that the run's method has; without a reward model there is no step 2."""
        if self.method == "dpo":
            return [1, DPO_STEP]
        return [1, 2, 3] if self.rlhf.has_reward_model else [1, 3]

    def supervised(self, step: int) -> StepSettings:
        """Of a step that learns from rows: every one but 3."""
        return {1: self.sft, 2: self.reward, DPO_STEP: self.dpo}[step]

    @property
    def reward_model_source(self) -> str:
        return self.reward_model or self.model
