"""The one-command pipeline: prepare, step 1 -> 2 -> 3 (or 1 -> DPO), compare.

What is done is skipped, what is half done resumed.
"""

import time

from applications.fit import Machine
from applications.launch import run_stage_script
from applications.report.page import write_report
from applications.report_table import comparison_table, reward_accuracy_line
from training.config import DPO_STEP, RunConfig
from training.data.rows import read_rows, require_rows
from training.distributed import require_gpus
from training.inputs import changed_inputs
from training.metrics import Display, duration
from training.run_directory import COMPARED, STEP_NAMES, RunDirectory, place_of

TITLES = {1: "supervised fine-tuning", 2: "reward model", 3: "PPO", DPO_STEP: "direct preference optimisation"}


def needed_steps(config: RunConfig, steps: list[int]) -> list[int]:
    """`steps` without the reward model where nothing reads one, unless it was asked for alone."""
    return steps if config.rlhf.has_reward_model or steps == [2] else [step for step in steps if step != 2]


def run_pipeline(run: RunDirectory, config: RunConfig, steps: list[int]) -> None:
    """Run the steps in order in the run directory, which is locked, then compare SFT with RLHF or DPO."""
    display = Display()
    begun = time.monotonic()
    if config.announce:
        display.say(config.announce)
    for sentence in changed_inputs(run, config):
        display.say(sentence)
    if config.method == "ppo" and not config.rlhf.has_reward_model and steps != [2]:
        display.say("Step 2 of 3 is left out: no reward model is used (rlhf.reward_weights.model=0)")
    if not all(run.step(step).is_finished for step in steps):
        look_at_processes(config.processes, display)
        display.say("Preparing models and data")
        run_stage_script("preparation", run, 1)
        display.say(f"Prepared in {duration(time.monotonic() - begun)}")
        for step in steps:
            require_rows(run.data, step)
    training_seconds = 0.0
    for step in steps:
        training_seconds += run_step(run, config, step, display)
    for step in COMPARED.keys() & set(steps):
        if config.evaluation.prompts:
            compare(run, step, display)
    display.say(f"Report with curves and answers: {write_report(run)}")
    display.say(f"Training took {duration(training_seconds)}, everything {duration(time.monotonic() - begun)}.")
    if steps != [2]:
        display.say(f"Talk to it: rlhf-chat chat {run.path}")


def look_at_processes(processes: int, display: Display) -> None:
    """Raise UserError where there are GPUs but too few; more processes than cores only cost time, so that is said."""
    require_gpus(processes)
    machine = Machine.here()
    if not machine.gpus and processes > machine.cores:
        display.say(
            f"Warning: {processes} processes share {machine.cores} core{'s' * (machine.cores > 1)} and wait for each "
            f"other; --processes {machine.cores} is faster."
        )


def run_step(run: RunDirectory, config: RunConfig, step: int, display: Display) -> float:
    """One step, unless it is finished; returns the seconds it took now."""
    directory, title = run.step(step), title_of(step, config)
    if directory.is_finished:
        display.say(f"{title}: done already")
        return 0.0
    display.say(title)
    begun = time.monotonic()
    run_stage_script(STEP_NAMES[step], run, config.processes)
    seconds = time.monotonic() - begun
    display.say(f"{title}: {duration(seconds)}, model in {directory.model}")
    if step == 2 and (accuracy := reward_accuracy_line(directory.read_result())):
        display.say(accuracy)
    return seconds


def title_of(step: int, config: RunConfig) -> str:
    """`Step 2 of 3: reward model`; a step that the run's method leaves out has no place in it."""
    if step in config.steps:
        return f"Step {config.steps.index(step) + 1} of {len(config.steps)}: {TITLES[step]}"
    return f"Step {place_of(step)}: {TITLES[step]}"


def compare(run: RunDirectory, step: int, display: Display) -> None:
    """Answers of SFT and of the step's model to held-out prompts, measured; the table is printed."""
    both = f"SFT and {COMPARED[step].upper()}"
    if not read_rows(run.data / "prompts_eval.jsonl"):
        display.say(f"No prompts are held out, so {both} are not compared: more rows, or a larger data.held_out.")
        return
    if not run.comparison_of(step)[0].exists():
        display.say(f"Comparing {both} on held-out prompts")
        arguments = ["--model", COMPARED[step], "--against", "sft"]
        run_stage_script("evaluation", run, 1, arguments)
    display.say(comparison_table(run, step=step))
