"""Where everything of a run lies, and the promise that files appear whole or not at all.

runs/<name>/
  config.yaml  starts.jsonl  data/  evaluation.json  comparison.jsonl  report.html
  step1_sft/  step2_reward/  step3_rlhf/  (or step2_dpo/ with evaluation_dpo.json, comparison_dpo.jsonl; steps.py)
    model/  checkpoints/N/  metrics.jsonl  samples.jsonl  log.txt  result.json (written last: the step is done)
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from inference.errors import UserError
from training.config import RunConfig
from training.config_files import read_yaml, validate_config
from training.paths import found_from_anywhere
from training.steps import COMPARED, Step
from training.versions import versions


@dataclass(frozen=True)
class RunDirectory:
    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def inputs_file(self) -> Path:
        """What the run was prepared from, as it was then."""
        return self.path / "inputs.json"

    @property
    def starts_file(self) -> Path:
        """What ran each time, where and when (training/starts.py)."""
        return self.path / "starts.jsonl"

    @property
    def last_step(self) -> Step:
        """The step whose model is compared with SFT: PPO, or another where it alone is finished."""
        return next((step for step in COMPARED if self.step(step).is_finished), COMPARED[0])

    def comparison_of(self, step: Step) -> tuple[Path, Path]:
        """Figures and answers of the comparison of SFT with the model of `step`."""
        figures, answers = step.comparison_files
        return self.path / figures, self.path / answers

    def read_comparison(self, step: Step) -> dict[str, Any] | None:
        """The figures of `comparison_of`; None where there are none. Raises UserError where the file is damaged."""
        file, _ = self.comparison_of(step)
        return read_json(file, f"delete it, then rlhf-chat eval {self.path} makes it anew") if file.exists() else None

    @property
    def lock_file(self) -> Path:
        return self.path / ".lock"

    @property
    def error_file(self) -> Path:
        """Why the preparation or the comparison failed."""
        return self.path / "error.json"

    @property
    def log_file(self) -> Path:
        """Of the preparation and the comparison."""
        return self.path / "log.txt"

    def step(self, step: Step) -> "StepDirectory":
        return StepDirectory(self.path / step.folder, step)

    def read_config(self) -> RunConfig:
        if not self.config_file.exists():
            raise UserError(f"{self.path} is not a run directory: it has no config.yaml (make one with rlhf-chat run).")
        values = read_yaml(self.config_file)
        made_by = values.pop("versions", None)
        try:
            config = validate_config(values)
        except UserError as error:
            theirs = made_by.get("rlhf-chat", "?") if isinstance(made_by, dict) else "?"
            raise UserError(
                f"{self.config_file}, written by rlhf-chat {theirs} (this is {versions()['rlhf-chat']}): {error}"
            ) from None
        return found_from_anywhere(config)  # older runs may have relative paths

    def write_config(self, config: RunConfig, made_by: dict[str, str]) -> None:
        """Store the resolved settings with the versions of what ran."""
        self.path.mkdir(parents=True, exist_ok=True)
        values = {**config.model_dump(mode="json"), "versions": made_by}
        write_text(self.config_file, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    def require_model(self, step: Step) -> Path:
        """The finished model of an earlier step, or the sentence that says how to get it."""
        directory = self.step(step)
        if not directory.is_finished:
            raise UserError(
                f"{step.folder} of {self.path} is not finished; run it first: rlhf-chat {step.command} {self.path}"
            )
        return directory.model

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for one command. Raises UserError while another one works in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with hold_lock(self.lock_file, wait_seconds=0, busy=f"{self.path} is in use by another command"):
            yield


@dataclass(frozen=True)
class StepDirectory:
    path: Path
    step: Step

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def reward_accuracy_file(self) -> Path:
        """Step 3: how the reward model ranks held-out pairs."""
        return self.path / "reward_accuracy.json"

    @property
    def ema_model(self) -> Path:
        """Step 3 with rlhf.ema: the moving average of the actor."""
        return self.path / "ema_model"

    @property
    def ema_adapter(self) -> Path:
        return self.path / "ema_adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples_file(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def log_file(self) -> Path:
        return self.path / "log.txt"

    @property
    def result_file(self) -> Path:
        return self.path / "result.json"

    @property
    def error_file(self) -> Path:
        return self.path / "error.json"

    @property
    def is_finished(self) -> bool:
        return self.result_file.exists() and self.model.is_dir()

    def read_result(self) -> dict[str, Any]:
        """Raises UserError where the file is damaged."""
        command = f"rlhf-chat {self.step.command} {self.path.parent}"
        return read_json(self.result_file, f"delete it, then {command} ends the step anew from its last checkpoint")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the step for one training process group; waits for orphans of a killed command to end themselves."""
        self.path.mkdir(parents=True, exist_ok=True)
        busy = f"{self.path} is still being written by another process"
        with hold_lock(self.path / ".lock", wait_seconds=30, busy=busy):
            yield


@contextmanager
def hold_lock(file: Path, wait_seconds: float, busy: str) -> Iterator[None]:
    """An exclusive lock that ends with the process, however it ends."""
    with open(file, "a") as handle:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise UserError(f"{busy}; wait until it has ended, or stop it.") from None
                time.sleep(0.1)
        yield


def write_text(file: Path, text: str) -> None:
    """Replace a file at once: a reader or a crash sees the old text or the new one."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")  # ranks may write the same file at the same time
    try:
        with open(temporary, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(file)) from error  # of a full disk it knows no name


def read_json(file: Path, way_out: str) -> dict[str, Any]:
    """The object in a file. Raises UserError with the way out where it is damaged or missing."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing: {way_out}.") from None
    except ValueError:  # no text, or no JSON
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged (it holds no JSON object): {way_out}.")
    return values


def write_json(file: Path, values: Any) -> None:
    write_text(file, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_directory(directory: Path, write: Callable[[Path], None]) -> None:
    """Fill a directory beside its place, then move it there; an older one is replaced. What fails leaves nothing."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        publish_directory(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish_directory(temporary: Path, directory: Path) -> None:
    """Move a complete directory to its name, its bytes on the disk first."""
    for file in temporary.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        os.rename(directory, old)
    os.rename(temporary, directory)
    shutil.rmtree(old, ignore_errors=True)
