"""What `rlhf-chat chat TARGET` talks to: models of a run directory, or one model. Imports nothing heavy."""

import json
import sys
from pathlib import Path

from inference.errors import UserError
from inference.model_files import refuse_pointers

CHAT_STEPS = {  # label: (directory, command)
    "SFT": ("step1_sft", "sft"),
    "DPO": ("step2_dpo", "dpo"),
    "RLHF": ("step3_rlhf", "rlhf"),
}


def find_chat_models(target: Path, compare: bool) -> list[tuple[str, Path]]:
    """Labels and model directories: a run's last finished step, or SFT and what followed it to `compare`, or one model.

    Says on stderr when neither step 3 nor DPO of a run is finished yet. Raises UserError where there is nothing to
    talk to.
    """
    if not target.exists():
        raise UserError(f"{target} does not exist; give a run directory such as runs/demo, or a model directory.")
    if (target / "config.yaml").is_file():
        return find_both_models(target) if compare else [find_newest_model(target)]
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
    for label in ("RLHF", "DPO"):
        if is_finished(run, label):
            return label, model_directory(run, label)
    if is_finished(run, "SFT"):
        label = label_after_sft(run)
        step = "Step 2 (DPO)" if label == "DPO" else "Step 3"
        print(
            f"{step} of {run} is not finished yet, so this is the SFT model "
            f"(continue with rlhf-chat {CHAT_STEPS[label][1]} {run}).",
            file=sys.stderr,
        )
        return "SFT", model_directory(run, "SFT")
    raise UserError(
        f"{run} has no finished model to talk to; train one with rlhf-chat run --name {run.resolve().name}."
    )


def find_both_models(run: Path) -> list[tuple[str, Path]]:
    """SFT and what followed it: RLHF or DPO, or both."""
    finished = [label for label in CHAT_STEPS if is_finished(run, label)]
    if "SFT" not in finished or finished == ["SFT"]:
        step, command = CHAT_STEPS[label_after_sft(run) if finished == ["SFT"] else "SFT"]
        raise UserError(f"To compare, {run} needs {step}, which is not finished; run rlhf-chat {command} {run}.")
    return [(label, model_directory(run, label)) for label in finished]


def label_after_sft(run: Path) -> str:
    """What the run makes of the SFT model: DPO where that has begun."""
    return "DPO" if model_directory(run, "DPO").parent.is_dir() else "RLHF"


def model_directory(run: Path, label: str) -> Path:
    return run / CHAT_STEPS[label][0] / "model"


def is_finished(run: Path, label: str) -> bool:
    """A step writes result.json last."""
    directory = model_directory(run, label)
    return directory.is_dir() and (directory.parent / "result.json").is_file()


def refuse_reward_model(directory: Path) -> None:
    """Raise UserError for a model that scores texts instead of writing them."""
    refuse_pointers(directory)
    try:
        names = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    except (ValueError, OSError, AttributeError) as error:
        raise UserError(f"{directory / 'config.json'} cannot be read ({error}); copy the model again.") from None
    if any("SequenceClassification" in name for name in names):
        raise UserError(
            f"{directory} is a reward model ({names[0]}), which scores and does not chat; give step 1's or 3's."
        )
