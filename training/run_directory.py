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
from training.config_files import found_from_anywhere, read_yaml, validate_config
from training.steps import COMPARED, Step

if TYPE_CHECKING:
    from torch import Tensor


PACKAGES = ("rlhf-chat", "torch", "deepspeed", "transformers", "peft", "accelerate", "datasets", "tokenizers")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def processor() -> tuple[str, list[str]]:
    """The processor's name, and its flags where the system tells them."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()]
    except OSError:  # not Linux
        return platform.processor() or platform.machine(), []
    values = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    flags = values.get("flags") or values.get("Features") or ""  # on x86, on ARM
    return values.get("model name") or platform.machine(), flags.split()


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
    def tokens(self) -> Path:
        """Of its rows (training/data/token_cache.py)."""
        return self.path / "tokens"

    @property
    def inputs_file(self) -> Path:
        """What the run was prepared from, as it was then."""
        return self.path / "inputs.json"

    @property
    def starts_file(self) -> Path:
        """What ran each time, where and when (training/opening.py)."""
        return self.path / "starts.jsonl"

    @property
    def preferences(self) -> Path:
        """What people said of two answers of its models (inference/preferences.py)."""
        return self.path / "preferences.jsonl"

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
        return (
            read_json(file, f"delete it, then rlhf-chat eval {typed(self.path)} makes it anew")
            if file.exists()
            else None
        )

    @property
    def lock_file(self) -> Path:
        return self.path / ".lock"

    @property
    def lock_files(self) -> list[Path]:
        """Of the run and of its steps."""
        return [self.lock_file, *self.path.glob(".step*.lock")]

    @property
    def is_in_use(self) -> bool:
        """Whether a command, or a stage, works in it now."""
        return any(map(is_held, self.lock_files))

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
                is_new, kept = not self.config_file.exists(), {*self.path.iterdir()} - {self.error_file, self.log_file}
                try:
                    yield
                except UserError:
                    if is_new and not self.data.exists():
                        for path in ({*self.path.iterdir()} - kept).union(self.lock_files):
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
    def reference_file(self) -> Path:
        """DPO: what its reference says of the pairs."""
        return self.path / "reference.safetensors"

    @property
    def panel_file(self) -> Path:
        """The score of each text that people rated, beside their mean rating and the lexicon's."""
        return self.path / "panel.jsonl"

    @property
    def iteration_file(self) -> Path:
        """Step 3: who did what when in the newest iteration, and who was to."""
        return self.path / "iteration.json"

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
    def best(self) -> Path:
        """With keep=best: the weights of the best evaluation."""
        return self.path / "best"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples_file(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def rollouts_file(self) -> Path:
        """Step 3 with rlhf.rollouts_every: every sample of an iteration."""
        return self.path / "rollouts.jsonl"

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
        command = f"rlhf-chat {self.step.command} {typed(self.path.parent)}"
        return read_json(self.result_file, f"delete it, then {command} ends the step anew from its last checkpoint")

    @contextmanager
    def locked(self, wait_seconds: float = 30) -> Iterator[None]:
        """Hold the step for one training process group; waits for orphans of a killed command to end themselves."""
        file = self.path.with_name(f".{self.path.name}.lock")
        with hold_lock(file, f"{self.path} is still being written by another process", wait_seconds):
            yield


def numbered(directory: Path) -> list[int]:
    """Numbers of the complete checkpoints in it, oldest first."""
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


def write_directory(directory: Path, write: Callable[[Path], None], replaces: bool = True) -> None:
    """Fill a directory beside its place, then move it there; an older one is replaced, or kept. What fails leaves
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
