"""What the commands do: options -> settings -> pipeline."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from applications.settings import AUTO, as_settings, given_of, resolve_settings
from inference.errors import UserError
from training.config import RunConfig
from training.launchers import SLURM, started_by
from training.merging import merge
from training.run_directory import RunDirectory
from training.steps import STEPS, Step


def pipeline_command(
    model: str | None,
    parent: Path | None,
    goes_on: bool | None,
    name: str | None,
    data: list[str] | None,
    eval_data: list[str] | None,
    reward_model: str | None,
    steps: str | None,
    dry_run: bool,
    config: list[Path] | None,
    overrides: list[str] | None,
    seed: int | None,
    processes: int | None,
    fusion: str | None,
    plan: str | None,
    method: str | None,
    trusts: bool,
) -> None:
    """`rlhf-chat run`."""
    flags = {
        "data": data,
        "eval_data": eval_data,
        "reward_model": reward_model,
        "seed": seed,
        "processes": processes,
        "fusion": fusion,
        "plan": plan,
        "method": method,
    }
    path, settings = asked_for(model, parent, goes_on, name, config, overrides, flags, steps)
    asked = settings or RunDirectory(path).read_config()
    if plan and not any(step.draws_samples for step in asked.steps):
        raise UserError(f"--plan places the calls of step 3, which method {asked.method} does not have: leave it out.")
    if plan == AUTO:
        asked = settings = planned(asked, path, measures=not dry_run)
    chosen = parse_steps(steps, asked)
    if dry_run:
        print_dry_run(asked, chosen, path, trusts)
        return
    execute(path, settings, chosen, trusts)


def asked_for(
    model: str | None,
    parent: Path | None,
    goes_on: bool | None,
    name: str | None,
    config: list[Path] | None,
    overrides: list[str] | None,
    flags: Mapping[str, object],
    steps: str | None = None,
) -> tuple[Path, RunConfig | None]:
    """The run's place and settings; None: it keeps its own."""
    if parent is not None:
        place = run_path(name, None) if name else None
        return from_parent(parent, model, place, config, overrides, flags, goes_on, steps)
    if goes_on is not None:
        raise UserError("--fork and --go-on say what becomes of another run: name it with --from RUN.")
    if model is None and config is None and name is None:
        raise UserError("Say what to train: rlhf-chat run --model smollm2-135m (rlhf-chat run --help lists more).")
    path = run_path(name, model)
    return path, resolve_settings(model, config, overrides, flags, RunDirectory(path))


def from_parent(
    parent: Path,
    model: str | None,
    path: Path | None,
    config: list[Path] | None,
    overrides: list[str] | None,
    flags: Mapping[str, object],
    goes_on: bool | None,
    steps: str | None,
) -> tuple[Path, RunConfig]:
    """Place and settings of a fork or a next round, which is said. A seed is that of the `steps` that are chosen."""
    from applications.from_run import from_run

    if model is not None:
        raise UserError(
            f"--from {parent} says what to begin with: leave --model out (another one: --set model={model})."
        )
    given = as_settings(given_of(flags))
    if steps and "seed" in given:
        base = RunDirectory(parent).read_config()
        chosen = parse_steps(steps, base.model_copy(update={"method": given.get("method", base.method)}))
        seed = given.pop("seed")
        given = merge(given, {step.command: {"seed": seed} for step in chosen})
    path, settings, sentence = from_run(parent, path, config or [], overrides or [], given, goes_on)
    print(sentence, file=sys.stderr)
    return path, settings


def run_path(name: str | None, model: str | None) -> Path:
    """runs/NAME, or the path that `name` is. Raises UserError where neither is a place for a run."""
    if name in (".", "..") or (name and not name.isprintable()):
        raise UserError(f"{name!a} is no name for a run: give one such as --name demo, or a path.")
    if name and len(Path(name).parts) > 1:
        return Path(name)
    return Path("runs") / (name or Path(os.path.abspath(model or "run")).name or "run")


def step_command(
    step: Step,
    run_directory: Path,
    model: str | None,
    data: list[str] | None,
    eval_data: list[str] | None,
    config: list[Path] | None,
    overrides: list[str] | None,
    seed: int | None,
    processes: int | None,
    trusts: bool,
    plan: str | None = None,
    parent: Path | None = None,
    **given: str | None,
) -> None:
    """`rlhf-chat sft | reward | rlhf | dpo`; `plan` and `given` are settings that only some of them have."""
    flags = {"data": data, "eval_data": eval_data, "seed": seed, "processes": processes, "plan": plan, **given}
    if step.method and (parent or model or given.get("sft_model") or config):
        flags["method"] = step.method  # a run that begins so goes on so
    settings: RunConfig | None
    if parent is not None:
        place = run_directory, config, overrides, flags
        _, settings = from_parent(parent, model, *place, goes_on=False, steps=step.command)
    else:
        model = model or given.get("sft_model")
        settings = resolve_settings(model, config, overrides, flags, RunDirectory(run_directory))
    if plan == AUTO:
        settings = planned(settings or RunDirectory(run_directory).read_config(), run_directory, measures=True)
    execute(run_directory, settings, [step], trusts)


def planned(settings: RunConfig, path: Path, measures: bool) -> RunConfig:
    """With the best plan for this machine (`--plan auto`)."""
    from applications.auto_plan import with_auto_plan

    return with_auto_plan(settings, RunDirectory(path), measures)


def execute(path: Path, settings: RunConfig | None, steps: list[Step], trusts: bool) -> None:
    from applications.dry_run import check_fits
    from applications.pipeline import needed_steps, run_pipeline
    from training.distributed import require_loopback
    from training.fork import Fork
    from training.opening import open_run

    run = RunDirectory(path)
    steps = needed_steps(settings or run.read_config(), steps)
    if settings is not None and not run.config_file.exists():
        fork = Fork.of(run, settings)
        if trained := fork.trained(steps) if fork else steps:
            check_fits(settings, trained)
    require_one_command()
    require_loopback()
    with run.locked():
        is_new = not run.config_file.exists()
        config = open_run(run, settings, trusts)
        if not config.fork_of:  # whose earlier steps come with its preparation
            require_earlier_steps(run, config, steps, is_new)
        run_pipeline(run, config, steps)


def require_one_command() -> None:
    """Raise UserError where mpirun started several: it ends all when one finds the run in use. Slurm does not."""
    launcher, started = started_by() or (SLURM, {})
    if launcher != SLURM:
        raise UserError(
            f"{launcher} started {started['WORLD_SIZE']} of this command, which starts its processes itself: give it "
            f"once with --processes {started['WORLD_SIZE']}, or start the stage scripts with mpirun."
        )


def require_earlier_steps(run: RunDirectory, config: RunConfig, steps: list[Step], is_new: bool) -> None:
    """A step whose input is missing is refused before anything is started, with the command that makes it."""
    for earlier in STEPS:
        if earlier not in steps and any(earlier in config.earlier_steps(step) for step in steps):
            if is_new:
                option = "--reward-model" if earlier.leaves_scorer else "--sft-model"
                raise UserError(
                    f"{run.path} would be a new run, and step {steps[0].label} begins with the model of step "
                    f"{earlier.label} ({earlier.title}): give a finished one with {option} MODEL, or train all steps "
                    f"with rlhf-chat run."
                )
            run.require_model(earlier)


def print_dry_run(settings: RunConfig, steps: list[Step], path: Path, trusts: bool) -> None:
    from applications.dry_run import dry_run
    from applications.launch import stage_command
    from applications.pipeline import needed_steps
    from training.fork import Fork
    from training.trust import of_parents, require_reading, require_yes

    steps = needed_steps(settings, steps)
    run = RunDirectory(path)
    if settings.fork_of:  # what is in the parent is compared
        if run.config_file.exists():
            require_yes(path, of_parents(run, run.read_config()), trusts)
        require_reading(Path(settings.fork_of), trusts)
    if fork := Fork.of(run, settings):
        print("\n".join(fork.lines(steps)))
        if not (steps := fork.trained(steps)):
            return
    commands = {step: stage_command(step.folder, path, settings.processes) for step in steps}
    print(dry_run(settings, steps, path, commands))


def doctor_command(model: str | None, tp: int, dtype: str, hub: bool) -> int:
    """`rlhf-chat doctor`; returns the exit code: 0, or 1 where the model or the machine is not fit."""
    if model is None:
        if tp != 1 or dtype != "auto":
            raise UserError("--tp and --dtype say how to check a model: give it with --model.")
        from applications.machine_report import report_on_machine

        return 0 if report_on_machine(hub) else 1
    if hub:
        raise UserError("--hub belongs to the report on the machine: leave --model out.")
    from applications.doctor import check_model

    return 0 if check_model(model, tp, dtype) else 1


def parse_steps(text: str | None, config: RunConfig) -> list[Step]:
    """`1,2` or `sft,reward` -> steps of the run's method, in order and without repeats; all of them where None."""
    if text is None:
        return config.steps
    places = range(1, len(config.steps) + 1)
    try:
        names = {step.command: place for place, step in enumerate(config.steps, 1)}
        chosen = sorted({names.get(part.strip()) or int(part) for part in text.split(",")})
    except ValueError:
        chosen = []
    if not chosen or not set(chosen) <= set(places):
        several = ",".join(map(str, places))
        raise UserError(f"--steps takes some of {several} separated by commas, not '{text}' (method {config.method}).")
    return [config.steps[place - 1] for place in chosen]
