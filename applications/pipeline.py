"""The one-command pipeline: prepare, step 1 -> 2 -> 3 (or 1 -> DPO), compare.

What is done is skipped, what is half done resumed.
"""

import time
from pathlib import Path

from applications.evaluate import first_sft, over_first_file, rounds_table
from applications.fit import Machine
from applications.from_run import next_command
from applications.launch import run_stage_script
from applications.report_table import comparison_table, panel_line, reward_accuracy_line
from inference.errors import typed
from training.config import RunConfig
from training.data.rows import read_rows
from training.inputs import changed_inputs
from training.metrics import WARNING, Display, duration
from training.run_directory import RunDirectory
from training.steps import METHODS, REWARD, Step
from training.watchdog import outlive_terminal


def needed_steps(config: RunConfig, steps: list[Step]) -> list[Step]:
    """`steps` without those whose model is given or, of the reward model, not used; what was asked for alone stays."""
    return [step for step in steps if not left_out(config, step)] or steps


def left_out(config: RunConfig, step: Step) -> str:
    """Why a step is not needed; empty where it is."""
    if given := config.given_model(step):
        return f"{given} is used instead"
    return "no reward model is used (rlhf.reward_weights.model=0)" * (
        step is REWARD and not config.rlhf.has_reward_model
    )


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
    """`Step 2 of 3: reward model`; a step that the run's method leaves out has no place in it."""
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
