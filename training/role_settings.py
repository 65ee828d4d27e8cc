"""How the weights of one role are trained, or where they lie if the role only scores."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from training.merging import merge


@dataclass(frozen=True)
class Unit:
    """What the number of a setting counts or measures."""

    name: str


Tokens = Annotated[int, Unit("tokens")]
Rows = Annotated[int, Unit("rows")]
Prompts = Annotated[int, Unit("prompts")]
Samples = Annotated[int, Unit("samples")]
Epochs = Annotated[int, Unit("epochs")]
Updates = Annotated[int, Unit("optimiser steps")]
Iterations = Annotated[int, Unit("iterations")]
Checkpoints = Annotated[int, Unit("checkpoints")]
Ranks = Annotated[int, Unit("ranks")]
Share = Annotated[float, Unit("share")]
Nats = Annotated[float, Unit("nats a response")]
ZeroStage = Literal[0, 1, 2, 3]
DecayRate = Annotated[float, Field(ge=0, lt=1)]
StepSeed = Annotated[int, Field(ge=-1, lt=2**63)]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _lay_groups_over_their_defaults(cls, given: Any) -> Any:
        """Lay what is given of a group over the group's default here, which need not be its class's."""
        if not isinstance(given, dict):
            return given
        defaults = {name: field.default for name, field in cls.model_fields.items() if name in given}
        groups = {name: group.model_dump() for name, group in defaults.items() if isinstance(group, Settings)}
        return merge(groups, given)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raise UserError for a value that cannot be, or does not fit the others; all is then as it was."""
        before = dict(self.__dict__)
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            from training.config_files import refusal

            self.__dict__.clear()
            self.__dict__.update(before)
            raise refusal(error, type(self)) from None


def without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out nulls in all groups: a null lies over a key to take it away."""
    items = ((key, without_nulls(value) if isinstance(value, dict) else value) for key, value in values.items())
    return {key: value for key, value in items if value is not None}


Mapping = Annotated[dict[str, Any], AfterValidator(without_nulls)]
"""A group with keys that are not ours."""


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


Keep = Literal["last", "best"]


def unguided(keep: Keep, eval_every: int) -> str:
    """Say why no best model can be chosen; '' where one can, or is not asked for."""
    lacks = keep == "best" and not eval_every
    return "keep=best chooses by evaluations on the way, so eval_every must be over 0" if lacks else ""


def misplaced(offload: str, zero_stage: int) -> str:
    """Say why DeepSpeed cannot hold this in host memory under that stage; '' where it can."""
    if offload == "optimizer" and zero_stage == 0:
        return "offload=optimizer needs zero_stage 1, 2 or 3"
    return f"offload={offload} needs zero_stage 3" if "parameters" in offload and zero_stage < 3 else ""


class OptimizerSettings(Settings):
    """How one role's weights are trained."""

    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up; linear and cosine end at 0."""
    warmup: Share = Field(0.05, ge=0, le=1)
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
    deepspeed: Mapping = {}
    """DeepSpeed configuration laid over ours, for what has no setting here; a key that it would ignore is refused."""

    @property
    def adapter_learning_rate(self) -> float:
        return self.lora.learning_rate or self.learning_rate


class FrozenSettings(Settings):
    """Where the weights of a role that only scores lie."""

    zero_stage: Literal[0, 3] = 0
    """0 keeps the weights whole on every rank, 3 divides them over the ranks."""
    offload: Literal["none", "parameters"] = "none"
    """`parameters` keeps them in host memory between uses (GPU runs; needs ZeRO stage 3)."""

    @property
    def as_optimizer(self) -> OptimizerSettings:
        """The same placement in the words that DeepSpeed's configuration is built from."""
        offload: Literal["none", "optimizer+parameters"] = "none" if self.offload == "none" else "optimizer+parameters"
        return OptimizerSettings(zero_stage=self.zero_stage, offload=offload)


class ScoringDegrees(Settings):
    """Ranks that score together in a role, each with a part of its weights; each divides the number of ranks."""

    reference: Ranks = Field(1, ge=1)
    """Of the reference; over 1 where it does not fit whole on a rank beside training."""
    reward: Ranks = Field(1, ge=1)
    """Of the reward model, as for the reference."""
    critic: Ranks = Field(1, ge=1)
    """Of the critic, which keeps a part of its weights for scoring then, beside those that it trains."""
