"""Every setting of a run with its default, a pydantic model a stage; config_files.py reads what people write."""

from operator import attrgetter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from training.data_settings import DataSettings
from training.formulas.losses import DPO_LOSSES
from training.plan import from_blocks
from training.reward_specs import with_reward_of_tasks
from training.rlhf_settings import RLHFSettings
from training.role_settings import (
    Checkpoints,
    Epochs,
    Keep,
    OptimizerSettings,
    Prompts,
    Ranks,
    Rows,
    Settings,
    Share,
    StepSeed,
    Tokens,
    Unit,
    Updates,
    misplaced,
    unguided,
)
from training.steps import ANSWERS, DPO, METHODS, REWARD, SFT, Method, Step, TrainingRows

Dtype = Literal["auto", "fp32", "bf16", "fp16"]
TRAINED_ROLES = ("sft.optimizer", "reward.optimizer", "dpo.optimizer", "rlhf.actor", "rlhf.critic")
"""Where settings of an optimiser stand."""


class StepSettings(Settings):
    """What steps 1 and 2 (reward model, DPO) have in common."""

    batch_size: Rows = Field(32, ge=1)
    """Rows (pairs in step 2; prompts with by_prompt) in one optimiser step, over all ranks."""
    micro_batch_tokens: Tokens = Field(4096, ge=8)
    """Tokens that one forward pass of one rank takes; the gradient does not depend on it."""
    epochs: Epochs = Field(1, ge=1)
    """Passes over the training rows."""
    max_steps: Updates = Field(0, ge=0)
    """Stop after this many optimiser steps; 0 means after all epochs."""
    eval_every: Updates = Field(50, ge=0)
    """Optimiser steps between evaluations on held-out rows; 0 means only at the start and the end."""
    eval_rows: Rows = Field(200, ge=1)
    """Held-out rows used in an evaluation."""
    keep: Keep = "last"
    """The model that is left: the last one, or that of the best evaluation, by accuracy (pairs) and then by loss."""
    checkpoint_every: Updates = Field(50, ge=0)
    """Optimiser steps between checkpoints; 0 means none."""
    keep_checkpoints: Checkpoints = Field(2, ge=1)
    """How many of the newest checkpoints are kept."""
    seed: StepSeed = -1
    """Seed of everything that the step draws at random; -1: the run's."""
    dropout: Share = Field(0.0, ge=0, lt=1)
    """Share of activations and attention weights that training drops, wherever the family has dropout; 0 is off."""
    optimizer: OptimizerSettings = OptimizerSettings()

    @model_validator(mode="after")
    def _fits_together(self):
        if problem := unguided(self.keep, self.eval_every):
            raise ValueError(problem)
        if problem := misplaced(self.optimizer.offload, self.optimizer.zero_stage):
            raise ValueError(f"optimizer.{problem}")
        return self


class SFTSettings(StepSettings):
    token_budget: Tokens = Field(0, ge=0)
    """Use only the first rows that have together no more than this many tokens; 0 means all rows."""


class PairSettings(StepSettings):
    by_prompt: bool = False
    """Take all pairs of a prompt into one optimiser step and count them as one; a batch is so many prompts then."""


class RewardSettings(PairSettings):
    initialize_from: Literal["base", "sft"] = "base"
    """Start from the reward model's base checkpoint, or from step 1's model (same architecture only)."""
    layers: Annotated[int, Unit("layers")] = Field(0, ge=0)
    """Use only the first so many layers of the base checkpoint, for the critic too; 0 uses all."""
    normalize: bool = True
    """Shift and scale the scores so that human replies of held-out rows have mean 0 and standard deviation 1."""
    margin: float = Field(0.0, ge=0)
    """Weight of the margins of the data, by which the score of a chosen answer is to be ahead; 0: any lead will do."""
    centering: float = Field(0.0, ge=0)
    """Weight of the squared sum of a pair's two scores in the loss, which keeps them around 0; 0: none."""


class DPOSettings(PairSettings):
    loss: Annotated[str, AfterValidator(DPO_LOSSES.stored)] = "sigmoid"
    """What is made of the implicit rewards of a pair; `sigmoid` is DPO as published."""
    beta: float = Field(0.1, gt=0)
    """How dear it is to leave the reference: an implicit reward is beta times the log-ratio of policy and reference."""
    label_smoothing: Share = Field(0.0, ge=0, lt=0.5)
    """Share of the pairs taken to be labelled the wrong way round (conservative DPO); 0: none."""
    length_normalized: bool = False
    """Divide each log-ratio by its response's tokens, so that length earns nothing; wants a larger beta (2 to 10)."""
    sft_coefficient: float = Field(0.0, ge=0)
    """Weight of the chosen response's negative log-likelihood, a mean over its tokens, beside the loss; 0: none."""
    undesirable_weight: float = Field(0.0, ge=0)
    """Weight of a bad answer in an unpaired loss (`kto`), where a good one weighs 1; 0: both kinds weigh the same."""
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=1e-6)

    @property
    def is_unpaired(self) -> bool:
        """Whether the loss is of answers with a label each."""
        return DPO_LOSSES.entry(self.loss).unpaired

    @model_validator(mode="after")
    def _loss_reads_what_is_set(self):
        if self.undesirable_weight and not self.is_unpaired:
            raise ValueError(f"loss={self.loss} reads no undesirable_weight: leave it at 0, or use kto")
        if self.by_prompt and self.is_unpaired:
            raise ValueError(f"loss={self.loss} has answers, not pairs of a prompt: leave by_prompt at false")
        if self.sft_coefficient and self.is_unpaired:
            raise ValueError(f"loss={self.loss} has no chosen response for sft_coefficient: leave it at 0")
        if self.batch_size == 1 and self.is_unpaired:
            raise ValueError(f"batch_size=1 leaves loss={self.loss} no other answer to compare with; use 2 or more")
        if self.label_smoothing and not DPO_LOSSES.entry(self.loss).smooths:
            known = [name for name, entry in DPO_LOSSES.entries.items() if entry.smooths]
            raise ValueError(f"loss={self.loss} reads no label_smoothing: leave it at 0, or use {' or '.join(known)}")
        return self


class EvaluationSettings(Settings):
    prompts: Prompts = Field(200, ge=0)
    """Held-out prompts answered by the SFT and the RLHF (or DPO) model in the end; 0 leaves the comparison out."""
    rows: Rows = Field(200, ge=0)
    """Held-out pairs (accuracy of a judge or reward model from elsewhere), demonstrations (perplexity) and answers (KL,
    perplexity) read then."""
    true_score: Literal["none", "upbeat"] = "none"
    """A rule that judges the answers beside the learned reward: `upbeat` is the vaderSentiment lexicon."""


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
    reference_model: str = ""
    """What PPO's KL and DPO's log-ratios count from: a model as `model` is, or a run, whose newest one it is; empty:
    the SFT model."""
    fork_of: str = ""
    """A run whose rows and steps serve here where nothing that decides about them differs (`run --from`)."""
    method: Method = "ppo"
    """What follows step 1: a reward model and PPO (steps 2 and 3), or DPO alone, straight from the pairs (or, with
    `dpo.loss=kto`, from answers with a label)."""
    seed: int = Field(1, ge=0, lt=2**63)
    """Seed of everything drawn at random."""
    dtype: Dtype = "auto"
    """Number format of the weights while computing; auto is bf16 where that is fast, else fp32 (fp16 on a GPU)."""
    save_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the models that the run leaves behind."""
    processes: Ranks = Field(1, ge=1)
    """Processes (ranks) on this machine; each takes one GPU where there are GPUs."""
    threads: Annotated[int, Unit("threads")] = Field(0, ge=0)
    """CPU threads of one process; 0 divides the machine's cores among the processes."""
    optimizer: OptimizerSettings = Field(OptimizerSettings(), exclude=True)  # config_files.py lays it below the roles'
    data: DataSettings = DataSettings()
    sft: SFTSettings = SFTSettings()
    reward: RewardSettings = RewardSettings()
    dpo: DPOSettings = DPOSettings()
    rlhf: RLHFSettings = RLHFSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    logging: LoggingSettings = LoggingSettings()
    architecture: dict[str, dict[str, Any]] = Field({})
    """Hugging Face configuration values of `model` and `reward_model`, so that a dry run needs no hub."""
    announce: str = ""
    """A line that the command prints before it starts (presets say here how long they take)."""

    @field_validator("model")
    @classmethod
    def _some_model(cls, model: str) -> str:
        if not model.strip():
            raise ValueError("is empty; give a preset, a hub id or a directory")
        return model

    @model_validator(mode="before")
    @classmethod
    def _tasks_bring_their_reward(cls, given: Any) -> Any:
        return with_reward_of_tasks(given)

    @model_validator(mode="after")
    def _fits_together(self):
        self.data.keep_labels(self.method == "dpo" and self.dpo.is_unpaired)
        self.rlhf.take_reference(self.reference_model)
        self.rlhf.require_fitting_roles()
        if self.reference_model and self.method == "ppo" and not self.rlhf.has_reference:
            raise ValueError(
                f"reference_model={self.reference_model} would never be asked, as rlhf.kl has no coefficient, target "
                f"or stop; give one, or rlhf.kl.measure=true"
            )
        self.require_work_for(self.processes)
        if self.dtype == "fp16" and not all(role.master_weights for role in self.trained_roles.values()):
            raise ValueError("master_weights=false needs dtype bf16: fp16 cannot train without fp32 weights")
        if self.rlhf.min_response_tokens >= self.data.max_response_tokens:
            raise ValueError(
                f"rlhf.min_response_tokens={self.rlhf.min_response_tokens} must be less than "
                f"data.max_response_tokens={self.data.max_response_tokens}"
            )
        return self

    def require_work_for(self, processes: int) -> None:
        """Raise ValueError where an iteration or a batch leaves some of so many processes idle."""
        samples = self.rlhf.prompts_per_iteration * self.rlhf.samples_per_prompt
        if samples < processes:
            raise ValueError(
                f"an iteration of {samples} samples leaves some of processes={processes} idle; use {samples} or "
                f"fewer, or raise rlhf.prompts_per_iteration to {-(-processes // self.rlhf.samples_per_prompt)}"
            )
        for step in self.steps:
            batch = processes if step.draws_samples else self.supervised(step).batch_size
            if batch < processes:
                raise ValueError(
                    f"{step.command}.batch_size={batch} leaves some of processes={processes} idle; use {batch} or "
                    f"fewer, or raise {step.command}.batch_size to {processes}"
                )

    def idle_warning(self, processes: int) -> str:
        """Return a sentence where some of so many processes have no call of a plan, or no samples in a mini-batch of
        PPO, which only costs time."""
        if self.method == "ppo" and self.rlhf.plan:
            assignments = from_blocks(self.rlhf.plan).assignments.values()
            used = {rank for assignment in assignments for rank in assignment.layout.mesh}
            idle = sorted(set(range(processes)) - used)
            sentence = f"Warning: rlhf.plan leaves {len(idle)} of {processes} ranks without a call in step 3"
            return f"{sentence} ({', '.join(map(str, idle[:4]))}{', ...' * (len(idle) > 4)})." if idle else ""
        samples = self.rlhf.prompts_per_iteration * self.rlhf.samples_per_prompt
        smallest = samples // self.rlhf.mini_batches
        if self.method != "ppo" or smallest >= processes:
            return ""
        fewer = max(samples // processes, 1)
        prompts = -(-processes * self.rlhf.mini_batches // self.rlhf.samples_per_prompt)
        return (
            f"Warning: a mini-batch of {smallest} samples leaves {processes - smallest} of {processes} ranks idle in "
            f"PPO's optimiser steps: use rlhf.mini_batches={fewer}, or rlhf.prompts_per_iteration={prompts}."
        )

    @property
    def trained_roles(self) -> dict[str, OptimizerSettings]:
        """The optimiser settings of each role that a step trains, by their key."""
        return {key: attrgetter(key)(self) for key in TRAINED_ROLES}

    @property
    def steps(self) -> list[Step]:
        """The steps of the run's method; the reward model only where one is used."""
        return [step for step in METHODS[self.method] if not step.leaves_scorer or self.rlhf.has_reward_model]

    def of_step(self, step: Step) -> Any:
        return getattr(self, step.command)

    def rows_of(self, step: Step) -> TrainingRows:
        return ANSWERS if step is DPO and self.dpo.is_unpaired else step.rows

    def supervised(self, step: Step) -> StepSettings:
        settings = self.of_step(step)
        assert isinstance(settings, StepSettings)
        return settings

    def unit_of(self, step: Step) -> str:
        """Return what a batch of a step that learns from rows is counted in."""
        return "prompts" if getattr(self.supervised(step), "by_prompt", False) else self.rows_of(step).unit

    def seed_of(self, step: Step) -> int:
        own = self.of_step(step).seed
        return self.seed if own < 0 else own

    def given_model(self, step: Step) -> str:
        """Return the finished model that is used instead of what the step would leave; else empty."""
        return getattr(self, step.given_by) if step.given_by else ""

    @property
    def round_of(self) -> str:
        """The run with whose model this one goes on in another round. A fork is no round of its parent, nor is a run
        that has the fork's settings and begins from the start."""
        return self.data.parent if self.sft_model and self.data.parent != self.fork_of else ""

    @property
    def begun_from(self) -> list[str]:
        """The runs whose settings and rows this one has taken over."""
        return list(dict.fromkeys(filter(None, (self.fork_of, self.data.parent))))

    @property
    def split_seed(self) -> int:
        return self.seed if self.data.split_seed < 0 else self.data.split_seed

    def steps_before(self, step: Step) -> list[Step]:
        """List the steps with whose models `step` begins."""
        needed = [other for other in step.starts_from if not other.leaves_scorer or self.rlhf.has_reward_model]
        if step is REWARD and self.reward.initialize_from == "sft":
            needed.append(SFT)
        return needed

    def earlier_steps(self, step: Step) -> list[Step]:
        """List the steps that must have left a model before `step` begins."""
        return [earlier for earlier in self.steps_before(step) if not self.given_model(earlier)]

    @property
    def reward_model_source(self) -> str:
        return self.reward_model or self.model

    @property
    def actor_source(self) -> str:
        """What steps 2 and 3 start from, as far as it is known before step 1."""
        return self.sft_model or self.model

    @property
    def needs_scorer(self) -> bool:
        """Whether a reward model or a critic is trained or used."""
        return self.method == "ppo" and (self.rlhf.has_reward_model or self.rlhf.has_critic)

    @property
    def scorer_source(self) -> str:
        """What reward model and critic are, or start from, as far as it is known before step 1."""
        base = self.actor_source if self.reward.initialize_from == "sft" else self.reward_model_source
        return self.trained_reward_model or base

    @property
    def scorer_layers(self) -> int:
        """How many of its layers, the first ones, reward model and critic have; 0: all."""
        return 0 if self.trained_reward_model else self.reward.layers
