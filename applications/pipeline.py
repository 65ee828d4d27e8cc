"""The one-command pipeline: prepare, step 1 -> 2 -> 3 (or 1 -> DPO), compare.

What is done is skipped, what is half done resumed.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from applications.commands import TrainingOptions, asked_for, left_out, needed_steps
from applications.evaluate import first_sft, over_first_file, rounds_table
from applications.fit import Machine
from applications.from_run import next_command
from applications.launch import run_stage_script
from applications.report_table import comparison_table, panel_line, reward_accuracy_line
from inference.errors import typed
from rlhf_chat import HOME
from training.config import RunConfig
from training.data.rows import read_rows
from training.formulas.tables import own_files
from training.inputs import CODE, changed_inputs, code_files, local_model, models_of
from training.launchers import outlive_terminal
from training.metrics import WARNING, Display, duration, size
from training.opening import open_run
from training.run_directory import RunDirectory
from training.steps import METHODS, Step
from training.trust import of_training, record_file


def run_pipeline(run: RunDirectory, config: RunConfig, steps: list[Step]) -> None:
    """Run the steps in order in the run directory, which is locked, then compare SFT with RLHF or DPO."""
    outlive_terminal()
    display = Display(log=run.log_file)
    begun = time.monotonic()
    if config.announce:
        display.say(config.announce)
    changed = changed_inputs(run, config)
    for sentence in changed:
        display.say(f"{WARNING}{sentence}")
    if changed and config.round_of:
        display.say(f"A new round on what is there now: {next_command(Path(config.round_of))}")
    for step in METHODS[config.method]:
        if step not in steps and (why := left_out(config, step)):
            display.say(f"Step {step.number} is left out: {why}")
    if not all(run.step(step).is_finished for step in steps):
        look_at_processes(config.processes, display)
        display.say("Preparing models and data")
        run_stage_script("preparation", run, 1, [step.command for step in steps if not run.step(step).is_finished])
        display.say(f"Prepared in {duration(time.monotonic() - begun)}")
    training_seconds = 0.0
    for step in steps:
        training_seconds += run_step(run, config, step, display)
    for step in steps:
        if step.compared_with and config.evaluation.prompts:
            compare(run, config, step, display)
    from applications.report.page import write_report  # draws: a second to import

    display.say(f"Report with curves and answers: {write_report(run)}")
    display.say(f"Training took {duration(training_seconds)}, everything {duration(time.monotonic() - begun)}.")
    if not all(step.leaves_scorer for step in steps):
        display.say(f"Talk to it: rlhf-chat chat {typed(run.path)}")


def look_at_processes(processes: int, display: Display) -> None:
    """Raise UserError where so many cannot be; more than there are cores only cost time, so that is said."""
    machine = Machine.here()
    machine.require_room(processes)
    if not machine.gpus and processes > machine.cores:
        display.say(
            f"Warning: {processes} processes share {machine.cores} core{'s' * (machine.cores > 1)} and wait for each "
            f"other; --processes {machine.cores} is faster."
        )


def run_step(run: RunDirectory, config: RunConfig, step: Step, display: Display) -> float:
    """One step, unless it is finished; returns the seconds it took now."""
    directory, title = run.step(step), title_of(step, config)
    if directory.is_finished:
        display.say(f"{title}: done already")
        return 0.0
    display.say(title)
    begun = time.monotonic()
    run_stage_script(step.folder, run, config.processes)
    seconds = time.monotonic() - begun
    display.say(f"{title}: {duration(seconds)}, model in {directory.model}")
    if step.leaves_scorer and (accuracy := reward_accuracy_line(directory.read_result())):
        display.say(accuracy)
    if step.leaves_scorer and (panel := directory.read_result().get("panel")):
        display.say(panel_line(panel))
    return seconds


def title_of(step: Step, config: RunConfig) -> str:
    """`Step 2 of 3: reward model`; a step that the run's method leaves out is not counted."""
    if step in config.steps:
        return f"Step {config.steps.index(step) + 1} of {len(config.steps)}: {step.title}"
    return f"Step {step.label}: {step.title}"


def compare(run: RunDirectory, config: RunConfig, step: Step, display: Display) -> None:
    """Answers of the step's model and the earlier one to held-out prompts, measured; the table is printed."""
    assert step.compared_with is not None
    both = f"{step.compared_with.name} and {step.name}"
    if not read_rows(run.data / "prompts_eval.jsonl"):
        display.say(f"No prompts are held out, so {both} are not compared: more rows, or a larger data.held_out.")
        return
    if not run.comparison_of(step)[0].exists():
        display.say(f"Comparing {both} on held-out prompts")
        arguments = ["--model", step.command, "--against", step.compared_with.command]
        if step.draws_samples and not config.rlhf.has_reward_model and config.evaluation.true_score == "none":
            arguments += ["--judge", "reward"]  # nothing else judges, and it has just been asked
        run_stage_script("evaluation", run, 1, arguments)
    display.say(comparison_table(run, step=step))
    first, file = first_sft(run), over_first_file(run, step)
    if first is not None and not file.exists():
        display.say(f"Comparing {step.name} and the SFT model of the first round on held-out prompts")
        file.parent.mkdir(exist_ok=True)
        arguments = ["--model", step.command, "--against", str(first), "--to", str(file)]
        run_stage_script("evaluation", run, 1, arguments)
    if table := rounds_table(run):
        display.say(table)


def prepare_command(options: TrainingOptions, as_json: bool) -> None:
    """Make the run, or complete it, and print what lies where and what a machine that trains it has to see."""
    path, settings = asked_for(options)
    run = RunDirectory(path)
    with run.locked():
        opened = open_run(run, settings, options.trusts)
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
    paths = [
        run.path.resolve(),
        *(directory for _, directory in models),
        *(file.resolve() for _, file in code_files(config, *CODE)),
    ]
    if config.round_of:
        paths.append(Path(config.round_of).resolve())
    paths += [HOME, *(Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix))]
    return {
        "run": str(run.path.resolve()),
        "models": [{"source": source, **part(directory)} for source, directory in models],
        "rows": part(run.data),
        "tokens": part(run.tokens),
        "needs": [str(path) for path in outermost(paths)],
        "not_prepared": list(not_prepared(run, config)),
    }


def part(directory: Path) -> dict[str, Any]:
    files = [file for file in directory.rglob("*") if file.is_file()]
    return {"path": str(directory.resolve()), "files": len(files), "bytes": sum(file.stat().st_size for file in files)}


def outermost(paths: list[Path]) -> Iterator[Path]:
    """Yield each path once, and none that lies in another."""
    for path in dict.fromkeys(paths):
        if not any(path != other and path.is_relative_to(other) for other in paths):
            yield path


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
        yield f"Where {record_file()} cannot be seen, the command asks whether you trust the run: give it --trust."


def lines(run: RunDirectory, prepared: Mapping[str, Any]) -> Iterator[str]:
    """What the terminal shows."""
    yield f"Prepared {run.path}. It has, or begins with:"
    parts = [(f"model {model['source']}", model) for model in prepared["models"]]
    parts += [("rows", prepared["rows"]), ("tokens of rows", prepared["tokens"])]
    for what, values in parts:
        if values["files"]:
            yield f"  {what}: {size(values['bytes'])} in {values['path']}"
    yield "A machine that trains it has to see"
    yield from (f"  {path}" for path in prepared["needs"])
    yield from prepared["not_prepared"]
    name = typed(run.path)
    yield f"There: rlhf-chat run --name {name if '/' in name else f'./{name}'}  (or the stage scripts with {name})"
