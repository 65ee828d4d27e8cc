"""Where everything of a run lies, and the promise that files appear whole or not at all.

runs/<name>/
  config.yaml  starts.jsonl  data/  models/  tokens/  evaluation.json  comparison.jsonl  report.html  preferences.jsonl
  step1_sft/  step2_reward/  step3_rlhf/  (or step2_dpo/ with evaluation_dpo.json, comparison_dpo.jsonl; steps.py)
    model/  checkpoints/N/  best/N/  metrics.jsonl  samples.jsonl  log.txt  result.json (written last: the step is done)
"""

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from inference.disk import hold_lock, is_held, settle, write_text
from inference.errors import UserError, typed
from training.config import RunConfig
from training.config_files import read_yaml, validate_config, with_absolute_paths
from training.steps import COMPARED, Step

if TYPE_CHECKING:
    from torch import Tensor


PACKAGES = ("rlhf-chat", "torch", "deepspeed", "transformers", "peft", "accelerate", "datasets", "tokenizers")


def versions() -> dict[str, str]:
    result = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            result[package] = "not installed"
    return result


def processor() -> tuple[str, list[str]]:
    """Return the processor's name, and its flags where the system tells them."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()]
    except OSError:  # not Linux
        return platform.processor() or platform.machine(), []
    values = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    flags = values.get("flags") or values.get("Features") or ""  # on x86, on ARM
    return values.get("model name") or platform.machine(), flags.split()


class Inside:
    """A file or directory of fixed name in a directory."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, directory: Any, kind: type | None = None) -> Path:
        return directory.path / self.name


@dataclass(frozen=True)
class RunDirectory:
    path: Path
    config_file = Inside("config.yaml")
    data = Inside("data")
    tokens = Inside("tokens")  # of its rows (training/data/token_cache.py)
    inputs_file = Inside("inputs.json")  # what the run was prepared from, as it was then
    starts_file = Inside("starts.jsonl")  # what ran each time, where and when (training/opening.py)
    preferences = Inside("preferences.jsonl")  # what people said of two answers (inference/preferences.py)
    error_file = Inside("error.json")  # why the preparation or the comparison failed
    log_file = Inside("log.txt")  # of the preparation and the comparison
    lock_file = Inside(".lock")

    @property
    def last_step(self) -> Step:
        """The step whose model is compared with SFT: PPO, or another where it alone is finished."""
        return next((step for step in COMPARED if self.step(step).is_finished), COMPARED[0])

    def comparison_of(self, step: Step) -> tuple[Path, Path]:
        """Return the files of figures and answers of the comparison of SFT with the model of `step`."""
        figures, answers = step.comparison_files
        return self.path / figures, self.path / answers

    def read_comparison(self, step: Step) -> dict[str, Any] | None:
        """Read the figures of `comparison_of`; None without any. Raises UserError where the file is damaged."""
        file, _ = self.comparison_of(step)
        way_out = f"delete it, then rlhf-chat eval {typed(self.path)} makes it again"
        return read_json(file, way_out) if file.exists() else None

    @property
    def lock_files(self) -> list[Path]:
        return [self.lock_file, *self.path.glob(".step*.lock")]

    @property
    def is_in_use(self) -> bool:
        """Whether a command, or a stage, works in it now."""
        return any(map(is_held, self.lock_files))

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
        return with_absolute_paths(config)  # older runs may have relative paths

    def write_config(self, config: RunConfig, made_by: dict[str, str]) -> None:
        """Store the resolved settings with the versions of what ran."""
        self.path.mkdir(parents=True, exist_ok=True)
        values = {**config.model_dump(mode="json"), "versions": made_by}
        write_text(self.config_file, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    def require_model(self, step: Step) -> Path:
        """Return the finished model of an earlier step. Raises UserError with the sentence that says how to get it."""
        directory = self.step(step)
        if not directory.is_finished:
            raise UserError(
                f"{step.folder} of {self.path} is not finished; run it first: "
                f"rlhf-chat {step.command} {typed(self.path)}"
            )
        return directory.model

    @contextmanager
    def locked(self, wait_seconds: float = 0) -> Iterator[None]:
        """Hold the run, and make its directory, for one command: nobody else writes there or cleans up.

        What is refused inside before there are data leaves nothing of a new run, so that its name is free for another
        try. Raises UserError while another command works in it, and where something else is there.
        """
        there = {file.name for file in self.path.iterdir()} if self.path.is_dir() else set()
        ours = {self.config_file.name, self.error_file.name, self.log_file.name}  # the last two of a refused one
        if (self.path.exists() and not self.path.is_dir()) or (
            self.config_file.name not in there and any(not name.startswith(".") for name in there - ours)
        ):
            raise UserError(f"{self.path} exists and is not a run directory; give the run another name.")
        if there and not os.access(self.path, os.W_OK):
            raise UserError(
                f"{self.path} is not yours to write in; chat, serve, report --out and export only read it, and all "
                f"else works in a copy: cp -r {typed(self.path)} MINE."
            )
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            with hold_lock(self.lock_file, f"{self.path} is in use by another command", wait_seconds):
                is_new = not self.config_file.exists()
                before = {*self.path.iterdir()} - {self.error_file, self.log_file}
                try:
                    yield
                except UserError:
                    if is_new and not self.data.exists():
                        for path in ({*self.path.iterdir()} - before).union(self.lock_files):
                            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                    raise
        except UserError:
            for path in made:
                with suppress(OSError):  # something is in it
                    path.rmdir()
            raise


@dataclass(frozen=True)
class StepDirectory:
    path: Path
    step: Step
    model = Inside("model")
    adapter = Inside("adapter")
    ema_model = Inside("ema_model")  # with rlhf.ema: the moving average of the actor
    ema_adapter = Inside("ema_adapter")
    checkpoints = Inside("checkpoints")
    best = Inside("best")  # with keep=best: the weights of the best evaluation
    metrics_file = Inside("metrics.jsonl")
    samples_file = Inside("samples.jsonl")
    rollouts_file = Inside("rollouts.jsonl")  # with rlhf.rollouts_every: every sample of an iteration
    iteration_file = Inside("iteration.json")  # who did what when in the newest iteration, and who was to
    reward_accuracy_file = Inside("reward_accuracy.json")  # step 3: how the reward model ranks held-out pairs
    reference_file = Inside("reference.safetensors")  # DPO: what its reference says of the pairs
    panel_file = Inside("panel.jsonl")  # the score of each text that people rated, and their mean rating
    log_file = Inside("log.txt")
    error_file = Inside("error.json")
    result_file = Inside("result.json")

    @property
    def is_finished(self) -> bool:
        return self.result_file.exists() and self.model.is_dir()

    def read_result(self) -> dict[str, Any]:
        """Read result.json. Raises UserError where it is damaged."""
        command = f"rlhf-chat {self.step.command} {typed(self.path.parent)}"
        return read_json(self.result_file, f"delete it, then {command} ends the step again from its last checkpoint")

    @contextmanager
    def locked(self, wait_seconds: float = 30) -> Iterator[None]:
        """Hold the step for one training process group; waits for orphans of a killed command to end themselves."""
        file = self.path.with_name(f".{self.path.name}.lock")
        with hold_lock(file, f"{self.path} is still being written by another process", wait_seconds):
            yield


def numbered(directory: Path) -> list[int]:
    """List the numbers of the complete checkpoints in a directory, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdigit())


def write_tensors(file: Path, tensors: "dict[str, Tensor]") -> None:
    """Replace a file of safetensors at once. What fails leaves nothing."""
    from safetensors.torch import save_file

    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary)
        settle(temporary)
        os.replace(temporary, file)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def read_json(file: Path, way_out: str) -> dict[str, Any]:
    """Read the object in a file. Raises UserError with the way out where it is damaged or missing."""
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


def write_directory(directory: Path, write: Callable[[Path], None], replaces: bool = True) -> None:
    """Fill a directory under another name, then give it its own; an older one is replaced, or stays. What fails leaves
    nothing. Others who write the same one wait."""
    temporary, lock = (directory.with_name(f".{directory.name}.{ending}") for ending in ("tmp", "writing"))
    with hold_lock(lock, f"{directory} is being written by another process"):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            if replaces or not directory.exists():
                temporary.mkdir(parents=True)
                write(temporary)
                publish_directory(temporary, directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            lock.unlink(missing_ok=True)


def publish_directory(temporary: Path, directory: Path) -> None:
    """Move a complete directory to its name, its bytes on the disk first."""
    settle(temporary)
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        os.rename(directory, old)
    os.rename(temporary, directory)
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(directory: Path) -> None:
    """Delete a checkpoint so that a crash halfway leaves nothing that looks like one."""
    doomed = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
