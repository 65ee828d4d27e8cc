"""The one-command pipeline: prepare, step 1 -> 2 -> 3, compare. What is done is skipped, what is half done resumed."""

import time
from pathlib import Path
from typing import Any

from applications.launch import run_stage_script
from applications.report_table import comparison_table
from inference.errors import UserError
from training.config import RunConfig
from training.data.rows import read_rows, require_rows
from training.metrics import Display, duration
from training.run_directory import STEP_NAMES, RunDirectory
from training.versions import versions

TITLES = {1: "Step 1 of 3: supervised fine-tuning", 2: "Step 2 of 3: reward model", 3: "Step 3 of 3: PPO"}
DOUBTFUL_ACCURACY = 0.55
CHANGEABLE = {
    "micro_batch_tokens",
    "generation_batch",
    "gradient_checkpointing",
    "checkpoint_every",
    "keep_checkpoints",
    "reward_url",
    "reward_timeout",
    "reward_retries",
}
"""Settings (last part of the key) that a run may go on with differently: memory and disk, not what is computed; and
where the same scores come from.
So may all of rlhf.fusion."""


def needed_steps(config: RunConfig, steps: list[int]) -> list[int]:
    """`steps` without the reward model where nothing reads one, unless it was asked for alone."""
    return steps if steps == [2] else [step for step in steps if step in config.steps_needed]


def open_run(path: Path, config: RunConfig | None) -> tuple[RunDirectory, RunConfig]:
    """The run at `path` with its settings; a new one is made from `config`. Raises UserError where they disagree."""
    run = RunDirectory(path)
    if not run.config_file.exists():
        if config is None:
            raise UserError(f"{path} is not a run directory; start a run with rlhf-chat run --model NAME.")
        if path.exists() and (not path.is_dir() or set(path.iterdir()) - {run.lock_file, run.error_file, run.log_file}):
            raise UserError(f"{path} exists and is not a run directory; choose another place with --name.")
        try:
            run.write_config(config, versions())
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); choose another place with --name.") from None
        return run, config
    stored = run.read_config()
    if config is None or config == stored:
        return run, stored
    changed = differences(stored.model_dump(), config.model_dump())
    refused = [
        f"{key}: {old!r} there, {new!r} now"
        for key, (old, new) in changed.items()
        if key.rpartition(".")[2] not in CHANGEABLE and not key.startswith("rlhf.fusion.")
    ]
    if refused:
        raise UserError(
            f"{path} was made with other settings ({', '.join(refused[:3])}); choose another --name, or give only "
            f"the run directory to go on with its own settings."
        )
    with run.locked():
        run.write_config(config, versions())
    return run, config


def differences(old: dict, new: dict, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ -> both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key, value in old.items():
        if isinstance(value, dict) and isinstance(new[key], dict):
            found |= differences(value, {**dict.fromkeys(value), **new[key]}, f"{prefix}{key}.")
        elif value != new[key]:
            found[prefix + key] = (value, new[key])
    return found


def run_pipeline(run: RunDirectory, config: RunConfig, steps: list[int]) -> None:
    """Run the steps in order inside the locked run directory, then compare SFT and RLHF."""
    display = Display()
    with run.locked():
        begun = time.monotonic()
        if config.announce:
            display.say(config.announce)
        if 2 not in config.steps_needed and steps != [2]:
            display.say("Step 2 of 3 is left out: no reward model is used (rlhf.reward_weights.model=0)")
        if not all(run.step(step).is_finished for step in steps):
            display.say("Preparing models and data")
            run_stage_script("preparation", run, 1)
            display.say(f"Prepared in {duration(time.monotonic() - begun)}")
            for step in steps:
                require_rows(run.data, step)
        training_seconds = 0.0
        for step in steps:
            training_seconds += run_step(run, config, step, display)
        if 3 in steps and config.evaluation.prompts:
            compare(run, display)
        display.say(f"Training took {duration(training_seconds)}, everything {duration(time.monotonic() - begun)}.")
        if 3 in steps or 1 in steps:
            display.say(f"Talk to it: rlhf-chat chat {run.path}")


def run_step(run: RunDirectory, config: RunConfig, step: int, display: Display) -> float:
    """One step, unless it is finished; returns the seconds it took now."""
    directory = run.step(step)
    if directory.is_finished:
        display.say(f"{TITLES[step]}: done already")
        return 0.0
    if step == 3:
        warn_of_doubtful_reward(run, display)
    display.say(TITLES[step])
    begun = time.monotonic()
    run_stage_script(STEP_NAMES[step], run, config.processes)
    seconds = time.monotonic() - begun
    display.say(f"{TITLES[step]}: {duration(seconds)}, model in {directory.model}")
    return seconds


def warn_of_doubtful_reward(run: RunDirectory, display: Display) -> None:
    """The gate before PPO: a reward model that ranks little better than a coin teaches nothing good."""
    reward = run.step(2)
    accuracy = reward.read_result().get("eval/accuracy") if reward.is_finished else None
    if accuracy is not None and accuracy < DOUBTFUL_ACCURACY:
        display.say(
            f"Warning: the reward model ranks only {accuracy:.0%} of held-out pairs right. PPO will follow noise: "
            f"train step 2 longer or on more pairs first (docs/step2_reward.md)."
        )


def compare(run: RunDirectory, display: Display) -> None:
    """Answers of SFT and RLHF to held-out prompts, measured; the table is printed."""
    if not read_rows(run.data / "prompts_eval.jsonl"):
        display.say("No prompts are held out, so SFT and RLHF are not compared: more rows, or a larger data.held_out.")
        return
    if not run.evaluation_file.exists():
        display.say("Comparing SFT and RLHF on held-out prompts")
        run_stage_script("evaluation", run, 1)
    display.say(comparison_table(run))
