"""Metrics in TensorBoard and Weights & Biases too, for those who look there; metrics.jsonl stays what counts."""

import hashlib
import importlib.util
import math
import time
from collections.abc import Sequence
from typing import Any, Protocol

from inference.errors import UserError
from inference.streams import redacted_values
from training.config import RunConfig
from training.metrics import Journal
from training.run_directory import RunDirectory, StepDirectory

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""Setting of logging and pip extra -> module that it needs."""


class Tracker(Protocol):
    def begin(self, number: int) -> None:
        """From here on values come; what an earlier start wrote after `number` no longer counts."""

    def write(self, number: int, values: dict[str, float]) -> None: ...


class TrackedJournal(Journal):
    """metrics.jsonl, each line with the time, and its followers. Both kinds of training rewind it before they write."""

    def __init__(self, step: StepDirectory, trackers: Sequence[Tracker]):
        super().__init__(step.metrics_file)
        self.trackers = trackers

    def rewind(self, number: int) -> None:
        super().rewind(number)
        for tracker in self.trackers:
            tracker.begin(number)

    def write(self, number: int, values: dict[str, Any]) -> None:
        super().write(number, {**values, "time/unix": round(time.time(), 3)})
        finite = {key: float(value) for key, value in values.items() if math.isfinite(value)}
        for tracker in self.trackers:
            tracker.write(number, finite)


class TensorBoard:
    """Event files in tensorboard/STEP of the run: `tensorboard --logdir runs/NAME/tensorboard`."""

    def __init__(self, run: RunDirectory, step: StepDirectory):
        self.directory = run.path / "tensorboard" / step.path.name

    def begin(self, number: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.directory), purge_step=number + 1)

    def write(self, number: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, number)
        self.writer.flush()  # a rank may be killed, or end itself without a farewell


class Wandb:
    """One W&B run a step, in one group. A resumed step goes on in the same one and writes some numbers twice."""

    def __init__(self, run: RunDirectory, step: StepDirectory, config: RunConfig):
        self.directory, self.step, self.config = run.path.resolve(), step.path.name, config

    def begin(self, number: int) -> None:
        import wandb

        self.directory.mkdir(parents=True, exist_ok=True)
        place = hashlib.sha256(str(self.directory).encode()).hexdigest()[:8]  # two runs may have one name
        self.run = wandb.init(
            project=self.config.logging.wandb_project,
            id=f"{self.directory.name}-{self.step}-{place}",
            name=f"{self.directory.name}/{self.step}",
            group=self.directory.name,
            config=redacted_values(self.config.model_dump(mode="json")),
            dir=str(self.directory),
            resume="allow",
        )
        self.run.define_metric("number")
        self.run.define_metric("*", step_metric="number")

    def write(self, number: int, values: dict[str, float]) -> None:
        self.run.log({"number": number, **values})


def metrics_journal(run: RunDirectory, step: StepDirectory, config: RunConfig) -> Journal:
    """metrics.jsonl of a step, and what the settings want beside it."""
    require_packages(config)
    trackers: list[Tracker] = []
    if config.logging.tensorboard:
        trackers.append(TensorBoard(run, step))
    if config.logging.wandb:
        trackers.append(Wandb(run, step, config))
    return TrackedJournal(step, trackers)


def require_packages(config: RunConfig) -> None:
    """Raise UserError where a setting needs a package that is not installed."""
    for name, module in PACKAGES.items():
        if getattr(config.logging, name) and importlib.util.find_spec(module) is None:
            raise UserError(
                f"logging.{name}=true needs the package {module}: pip install 'rlhf-chat[{name}]' (in the project: "
                f"pip install -e '.[{name}]'), or leave the setting out."
            )
