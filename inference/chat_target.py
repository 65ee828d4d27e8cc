"""What `rlhf-chat chat TARGET` talks to: models of a run directory, or one model. Imports nothing heavy."""

import json
import re
import sys
from pathlib import Path

from inference.errors import UserError, copied_again, typed
from inference.model_files import refuse_pointers

USUAL = ("step1_sft", "step3_rlhf")
SCORER = "step2_reward"
"""Folders of a run; others are those of methods that take the place of the last step (step2_dpo)."""


def chat_steps(run: Path) -> dict[str, str]:
    """Names of the models that the run has or is to have, first to last, and the folders of their steps."""
    begun = {path.name for path in run.glob("step*") if re.fullmatch(r"step\d+_[a-z0-9]+", path.name)} - {SCORER}
    return {command_of(folder).upper(): folder for folder in sorted({*USUAL, *begun})}


def command_of(folder: str) -> str:
    """`step3_rlhf` -> `rlhf`, which makes it and names its model."""
    return folder.partition("_")[2]


def find_chat_models(target: Path, compare: bool, before: tuple[str, Path] | None = None) -> list[tuple[str, Path]]:
    """Labels and model directories: a run's last finished step, or SFT and what followed it to `compare`, or one model.
    `before` is what the run was given for SFT.

    Says on stderr when nothing after SFT is finished yet. Raises UserError where there is nothing to talk to.
    """
    if not target.exists():
        raise UserError(f"{target} does not exist; give a run directory such as runs/demo, or a model directory.")
    if (target / "config.yaml").is_file():
        return find_both_models(target, before) if compare else [find_newest_model(target)]
    if not (target / "config.json").is_file():
        if (target / "model" / "config.json").is_file():
            raise UserError(f"{target} holds its model one level down; use {target / 'model'}.")
        raise UserError(
            f"{target} is neither a run directory (no config.yaml) nor a model (no config.json); "
            "train a model with rlhf-chat run, or give a Hugging Face model directory."
        )
    if compare:
        raise UserError(
            f"{target} is one model; to compare SFT with RLHF or DPO, give the run directory that holds both."
        )
    refuse_reward_model(target)
    return [(target.resolve().name, target)]


def find_newest_model(run: Path) -> tuple[str, Path]:
    steps = chat_steps(run)
    finished = [name for name, folder in steps.items() if is_finished(run / folder)]
    if not finished:
        raise UserError(
            f"{run} has no finished model to talk to; train one with rlhf-chat run --name {typed(run.resolve().name)}."
        )
    if finished == ["SFT"]:
        folder = folder_after_sft(steps)
        number, command = folder.removeprefix("step").partition("_")[0], command_of(folder)
        print(
            f"Step {number}{'' if folder in USUAL else f' ({command.upper()})'} of {run} is not finished yet, so this "
            f"is the SFT model (continue with rlhf-chat {command} {typed(run)}).",
            file=sys.stderr,
        )
    return finished[-1], run / steps[finished[-1]] / "model"


def find_both_models(run: Path, before: tuple[str, Path] | None) -> list[tuple[str, Path]]:
    """SFT, or what the run was given for it, and what followed: RLHF or DPO, or both."""
    steps = chat_steps(run)
    finished = [name for name, folder in steps.items() if is_finished(run / folder)]
    has_first = before is not None or "SFT" in finished
    if not has_first or finished in ([], ["SFT"]):
        missing = folder_after_sft(steps) if has_first else steps["SFT"]
        command = f"rlhf-chat {command_of(missing)} {typed(run)}"
        raise UserError(f"To compare, {run} needs {missing}, which is not finished; run {command}.")
    first = [] if before is None else [before]
    return first + [(name, run / steps[name] / "model") for name in finished]


def folder_after_sft(steps: dict[str, str]) -> str:
    """What the run makes of the SFT model: where another method has begun, that one's."""
    return next((folder for folder in steps.values() if folder not in USUAL), USUAL[-1])


def is_finished(step: Path) -> bool:
    """A step writes result.json last."""
    return (step / "model").is_dir() and (step / "result.json").is_file()


def refuse_reward_model(directory: Path) -> None:
    """Raise UserError for a model that scores texts instead of writing them."""
    refuse_pointers(directory)
    try:
        names = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    except (ValueError, OSError, AttributeError) as error:
        raise UserError(f"{directory / 'config.json'} cannot be read ({error}); {copied_again(error)}.") from None
    if any("SequenceClassification" in name for name in names):
        raise UserError(
            f"{directory} is a reward model ({names[0]}), which scores and does not chat; give step 1's or 3's."
        )
