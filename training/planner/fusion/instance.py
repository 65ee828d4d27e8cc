"""What there is to schedule: two models in training on the same devices, their pipelines in opposite directions.

Model A runs device 0 -> N - 1, model B the other way. A model with fewer stages than there are devices stands on them
in several copies side by side, each with its own micro-batches: 4 stages on 8 devices are a pipeline on devices 0-3
and one on devices 4-7. Times and bytes are in any unit, the same for both models.

The problem: RLHFuse (arXiv 2409.13221, section 5).
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

FORWARD, BACKWARD, WEIGHT = 0, 1, 2
KINDS = ("forward", "backward", "weight")
"""Names of the kinds of operation: `weight` is the weight-gradient part of a backward that is split in two."""
MODELS = ("A", "B")


@dataclass(frozen=True)
class Pipeline:
    """One model in training, cut into stages that all take the same time."""

    stages: int
    micro_batches: int
    """Of each copy, in one mini-batch."""
    forward: float
    """Time of a micro-batch's forward on one stage."""
    backward: float
    """Time of its backward; without the weight-gradient part where that is split off."""
    activation: float
    """Memory of a micro-batch on one stage, from the start of its forward to the end of its backward (both parts)."""
    weight: float = 0
    """Time of the weight-gradient part where it is an operation of its own; 0 means that it is part of `backward`."""

    def __post_init__(self) -> None:
        if min(self.stages, self.micro_batches) < 1 or min(self.forward, self.backward) <= 0:
            raise ValueError("a pipeline needs at least one stage, one micro-batch and times above 0")
        if min(self.activation, self.weight) < 0:
            raise ValueError("activation and weight must not be below 0")

    @property
    def kinds(self) -> tuple[int, ...]:
        """The kinds of operation of a micro-batch on one stage."""
        return (FORWARD, BACKWARD, WEIGHT) if self.weight else (FORWARD, BACKWARD)

    @property
    def times(self) -> tuple[float, float, float]:
        """By kind."""
        return self.forward, self.backward, self.weight

    @property
    def work(self) -> float:
        """Time that a mini-batch keeps each of the model's devices busy."""
        return self.micro_batches * sum(self.times)

    @property
    def serial(self) -> float:
        """Time of a mini-batch under 1F1B with nothing else on the devices."""
        return (self.micro_batches + self.stages - 1) * sum(self.times)

    def split(self, share: float = 0.5) -> "Pipeline":
        """The same with the weight-gradient part, that share of the backward, as an operation of its own."""
        if self.weight or not 0 < share < 1:
            raise ValueError("only a whole backward can be split, and the share lies between 0 and 1")
        return replace(self, backward=self.backward * (1 - share), weight=self.backward * share)


@dataclass(frozen=True)
class Instance:
    """Two pipelines, and what a schedule of them must keep to.

    With several mini-batches there is no barrier between the models: a device begins with a model's next mini-batch as
    soon as that model's optimiser step there is done, which is when its last backward there ends (the optimiser step
    itself takes no time). For a barrier schedule one mini-batch and repeat it (`Schedule.repeated`).
    """

    a: Pipeline
    b: Pipeline
    mini_batches: int = 1
    memory_cap: float = math.inf
    """Most memory that the activations alive on a device may take."""

    def __post_init__(self) -> None:
        if self.mini_batches < 1:
            raise ValueError("mini_batches must be at least 1")
        if self.memory_cap < self.a.activation + self.b.activation:
            raise ValueError("memory_cap must have room for one micro-batch of each model")

    @property
    def models(self) -> tuple[Pipeline, Pipeline]:
        return self.a, self.b

    @cached_property
    def devices(self) -> int:
        return math.lcm(self.a.stages, self.b.stages)

    def of_mini_batches(self, number: int) -> "Instance":
        """The same with another number of mini-batches, without a barrier between them."""
        return replace(self, mini_batches=number)

    def split(self, share: float = 0.5) -> "Instance":
        """The same with the weight-gradient part of all backwards, that share of them, as an operation of its own."""
        return replace(self, a=self.a.split(share), b=self.b.split(share))

    def micro_batches(self, model: int) -> int:
        """Of each copy, in all mini-batches."""
        return self.mini_batches * self.models[model].micro_batches

    def stage(self, model: int, device: int) -> int:
        """Which of the model's stages the device holds."""
        stages = self.models[model].stages
        place = device % stages
        return place if model == 0 else stages - 1 - place

    def before(self, model: int, device: int) -> int | None:
        """The device with the stage before; None at the first stage."""
        if self.stage(model, device) == 0:
            return None
        return device - 1 if model == 0 else device + 1

    def after(self, model: int, device: int) -> int | None:
        """The device with the stage behind; None at the last stage."""
        if self.stage(model, device) == self.models[model].stages - 1:
            return None
        return device + 1 if model == 0 else device - 1
