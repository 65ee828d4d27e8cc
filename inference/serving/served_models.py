"""Which models `rlhf-chat serve TARGET` serves, and under which names. Imports nothing heavy."""

from pathlib import Path

from inference.chat_target import chat_steps, command_of, find_chat_models, find_newest_model, is_finished


def find_served_models(target: Path) -> dict[str, Path]:
    """`sft` and `rlhf` of a run as far as they are finished; of a step's directory its model; or a model's directory
    under its name. Raises UserError where there is nothing to serve."""
    if (target / "config.yaml").is_file():
        folders = [target / folder for folder in chat_steps(target).values()]
        found = {command_of(folder.name): folder / "model" for folder in folders if is_finished(folder)}
        if "rlhf" not in found:
            find_newest_model(target)  # says so, or raises
        return found
    place = target.resolve()
    step = place.parent if place.name == "model" else place
    is_of_run = step.name in chat_steps(step.parent).values()
    if is_of_run and step == place and (target / "model").is_dir():
        target = target / "model"
    ((_, directory),) = find_chat_models(target, compare=False)
    return {command_of(step.name) if is_of_run else step.name: directory}
