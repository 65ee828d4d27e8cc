"""Which models `rlhf-chat serve TARGET` serves, and under which names. Imports nothing heavy."""

from pathlib import Path

from inference.chat_target import CHAT_STEPS, find_chat_models, find_newest_model, is_finished, model_directory

STEP_MODELS = {step: command for step, command in CHAT_STEPS.values()}  # step1_sft: sft, step3_rlhf: rlhf


def find_served_models(target: Path) -> dict[str, Path]:
    """`sft` and `rlhf` of a run as far as they are finished; of a step's directory its model; or a model's directory
    under its name. Raises UserError where there is nothing to serve."""
    if (target / "config.yaml").is_file():
        found = {label.lower(): model_directory(target, label) for label in CHAT_STEPS if is_finished(target, label)}
        if "rlhf" not in found:
            find_newest_model(target)  # says so, or raises
        return found
    if target.resolve().name in STEP_MODELS and (target / "model").is_dir():
        target = target / "model"
    ((_, directory),) = find_chat_models(target, compare=False)
    place = directory.resolve()
    name = place.parent.name if place.name == "model" else place.name
    return {STEP_MODELS.get(name, name): directory}
