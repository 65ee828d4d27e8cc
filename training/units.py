"""What the numbers of settings count and measure, as `rlhf-chat settings` and docs/configuration.md tell it."""

from dataclasses import dataclass
from typing import Annotated


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
