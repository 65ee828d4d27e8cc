"""Workload of one iteration: the models of the roles, the samples and their lengths."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Literal

from training.hybrid_engine.layout import Layout, StageCut
from training.plan import Assignment
from training.role_settings import LoRASettings
from training.shape import Shape

Precision = Literal["fp32", "bf16", "fp16"]
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
SCORERS = ("critic", "reward")
"""Roles with a score head in place of the output matrix."""


@dataclass(frozen=True)
class Model:
    """Describes one role's model: its shape, whether it gives a distribution over the vocabulary, and its adapters."""

    shape: Shape
    has_vocabulary_head: bool
    lora: LoRASettings = field(default_factory=LoRASettings)

    @cached_property
    def layer_weights(self) -> int:
        s = self.shape
        attention = 2 * s.hidden * s.head_dim * (s.heads + s.kv_heads)
        return attention + (3 if s.is_gated else 2) * s.hidden * s.ffn

    @cached_property
    def head_weights(self) -> int:
        """Weights of the matrix that the last layer's output is multiplied with at the end."""
        return self.shape.hidden * (self.shape.vocabulary if self.has_vocabulary_head else 1)

    @cached_property
    def parameters(self) -> int:
        return self.shape.parameters if self.has_vocabulary_head else self.shape.scorer_parameters

    @cached_property
    def trained_parameters(self) -> int:
        """Weights that training changes: all of them, or those of the adapters."""
        return self.shape.lora_parameters(self.lora.rank, self.lora.targets) if self.lora.rank else self.parameters

    @cached_property
    def cache_values(self) -> int:
        """Numbers in the keys and values of one token in one layer."""
        return self.shape.cache_values(1) // self.shape.layers

    @cached_property
    def layer_activations(self) -> int:
        """Numbers that a layer saves of one token for its backward pass."""
        return self.shape.activation_values(1, checkpointing=False) // self.shape.layers

    def stages(self, layout: Layout) -> "tuple[Model, ...]":
        """Return the models that its pipeline stages hold."""
        if layout.pipeline == 1:
            return (self,)
        runs = layout.runs(self.shape.layers)
        if runs not in self._stages:
            cuts = (StageCut(stage, runs) for stage in range(len(runs)))
            shapes = (self.shape.stage(cut, self.has_vocabulary_head) for cut in cuts)
            self._stages[runs] = tuple(replace(self, shape=shape) for shape in shapes)
        return self._stages[runs]

    def largest_stage(self, layout: Layout) -> "Model":
        return max(self.stages(layout), key=lambda stage: stage.parameters)

    @cached_property
    def _stages(self) -> "dict[tuple[int, ...], tuple[Model, ...]]":
        return {}


@dataclass(frozen=True)
class Workload:
    """Describes one iteration. Lengths are means in tokens; decoding lasts as long as the longest response."""

    models: Mapping[str, Model]
    samples: int
    prompt_tokens: int
    response_tokens: int
    longest_response: int
    mini_batches: int = 4
    epochs: int = 1
    precision: Precision = "bf16"
    checkpointing: bool = True
    generation_batch: int = 0
    """Samples that a data rank decodes at the same time, at most, where a search may choose; 0 sets no bound."""
    own_reference: bool = False
    """Whether the reference is no SFT model, and so never the actor with its adapters off."""

    @classmethod
    def of(
        cls,
        shapes: Mapping[str, Shape],
        samples: int,
        prompt_tokens: int,
        response_tokens: int,
        mini_batches: int = 4,
        epochs: int = 1,
        precision: Precision = "bf16",
        checkpointing: bool = True,
        lora: Mapping[str, LoRASettings] = MappingProxyType({}),
        generation_batch: int = 0,
        own_reference: bool = False,
    ) -> "Workload":
        """Make one whose responses are equally long. `shapes` and `lora` are by role."""
        models = {
            role: Model(shape, role not in SCORERS, lora.get(role, LoRASettings())) for role, shape in shapes.items()
        }
        lengths = prompt_tokens, response_tokens, response_tokens
        slots = generation_batch, own_reference
        return cls(models, samples, *lengths, mini_batches, epochs, precision, checkpointing, *slots)

    @property
    def reference_is_actor(self) -> bool:
        """Whether the reference is the actor without its adapters, where both lie alike."""
        return bool(self.models["actor"].lora.rank) and not self.own_reference

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.response_tokens

    @property
    def longest(self) -> int:
        return self.prompt_tokens + self.longest_response

    @property
    def mini_batch_samples(self) -> int:
        return -(-self.samples // self.mini_batches)

    @property
    def value_bytes(self) -> int:
        return BYTES[self.precision]

    def rows(self, kind: str) -> int:
        """Return the samples that one pass of a call of this kind takes together."""
        return self.mini_batch_samples if kind == "train" else self.samples

    def rows_together(self, kind: str, assignment: Assignment) -> int:
        """Return the samples of a micro-batch of mean lengths, or those that a pipeline stage decodes in one step."""
        most, limit = -(-self.rows(kind) // assignment.layout.data), assignment.micro_batch_limit
        if not limit:
            return -(-most // assignment.micro_batches)
        return min(most, max(1, limit if kind == "generate" else limit // self.length))

    def micro_batches(self, kind: str, assignment: Assignment) -> int:
        if not assignment.micro_batch_limit:
            return assignment.micro_batches
        return -(-self.rows(kind) // (assignment.layout.data * self.rows_together(kind, assignment)))
