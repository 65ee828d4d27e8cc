"""`rlhf-chat prepare`: what a run fetches and makes of its rows, before it goes to machines without a network."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from applications.commands import asked_for
from applications.launch import run_stage_script
from applications.pipeline import needed_steps
from inference.errors import typed
from rlhf_chat import HOME
from training.config import RunConfig
from training.formulas.tables import own_files
from training.inputs import CODE, changed_inputs, code_files
from training.kept_models import local_model, models_of
from training.metrics import WARNING, Display, size
from training.opening import open_run
from training.run_directory import RunDirectory
from training.trust import record_file
from training.uses import of_training


def prepare_command(
    model: str | None,
    parent: Path | None,
    goes_on: bool | None,
    name: str | None,
    config: list[Path] | None,
    overrides: list[str] | None,
    flags: Mapping[str, object],
    as_json: bool,
    trusts: bool,
) -> None:
    """Make the run, or complete it, and print what lies where and what a machine that trains it has to see."""
    path, settings = asked_for(model, parent, goes_on, name, config, overrides, flags)
    run = RunDirectory(path)
    with run.locked():
        opened = open_run(run, settings, trusts)
        display = Display(quiet=as_json, log=run.log_file)
        for sentence in (changed := changed_inputs(run, opened)):
            display.say(f"{WARNING}{sentence}")
        steps = [step.command for step in needed_steps(opened, opened.steps)]
        progress = sys.stderr if as_json else None
        run_stage_script("preparation", run, 1, [*steps, "--elsewhere"], progress)
        prepared = described(run, opened)
    if as_json:
        print(json.dumps({**prepared, "changed": changed}, indent=2))
    else:
        print("\n".join(lines(run, prepared)))


def described(run: RunDirectory, config: RunConfig) -> dict[str, Any]:
    """The run's parts with their sizes in bytes, and what else a machine that trains it has to see, or reaches."""
    models = [(source, local_model(run, source).resolve()) for source in models_of(config)]
    places = [
        run.path.resolve(),
        *(directory for _, directory in models),
        *(file.resolve() for _, file in code_files(config, *CODE)),
    ]
    if config.round_of:
        places.append(Path(config.round_of).resolve())
    places += [HOME, *(Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix))]
    return {
        "run": str(run.path.resolve()),
        "models": [{"source": source, **part(directory)} for source, directory in models],
        "rows": part(run.data),
        "tokens": part(run.tokens),
        "needs": [str(place) for place in outermost(places)],
        "not_prepared": list(not_prepared(run, config)),
    }


def part(directory: Path) -> dict[str, Any]:
    files = [file for file in directory.rglob("*") if file.is_file()]
    return {"path": str(directory.resolve()), "files": len(files), "bytes": sum(file.stat().st_size for file in files)}


def outermost(places: list[Path]) -> Iterator[Path]:
    """Each once, and none that lies in another."""
    for place in dict.fromkeys(places):
        if not any(place != other and place.is_relative_to(other) for other in places):
            yield place


def not_prepared(run: RunDirectory, config: RunConfig) -> Iterator[str]:
    """What a run does beside reading its own files, a sentence each."""
    rlhf = config.rlhf
    if config.method == "ppo" and rlhf.reward_url and rlhf.reward_weights.url:
        yield f"Step 3 asks {rlhf.reward_url} for rewards, so the machine has to reach it."
    for function in rlhf.asked_functions if config.method == "ppo" else ():
        if function.file:
            yield f"What {function.text} itself opens is not known here."
    for _, path in own_files(config):
        yield f"What {path} itself opens is not known here."
    if config.logging.wandb:
        yield "Metrics go to Weights & Biases: set WANDB_MODE=offline or logging.wandb=false there."
    if of_training(run, config):
        yield f"Where {record_file()} is not to be seen, the command asks whether you trust the run: give it --trust."


def lines(run: RunDirectory, prepared: Mapping[str, Any]) -> Iterator[str]:
    """What the terminal shows."""
    yield f"Prepared {run.path}. It has, or begins with:"
    parts = [(f"model {each['source']}", each) for each in prepared["models"]]
    parts += [("rows", prepared["rows"]), ("tokens of rows", prepared["tokens"])]
    for what, each in parts:
        if each["files"]:
            yield f"  {what}: {size(each['bytes'])} in {each['path']}"
    yield "A machine that trains it has to see"
    yield from (f"  {place}" for place in prepared["needs"])
    yield from prepared["not_prepared"]
    name = typed(run.path)
    yield f"There: rlhf-chat run --name {name if '/' in name else f'./{name}'}  (or the stage scripts with {name})"
