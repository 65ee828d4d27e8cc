"""What the commands do: options -> settings -> pipeline."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from applications.settings import AUTO, as_settings, given_of, resolve_settings
from inference.errors import UserError
from training.config import RunConfig
from training.launchers import SLURM, started_by
from training.merging import merge
from training.run_directory import RunDirectory
from training.steps import STEPS, Step


@dataclass(frozen=True)
class TrainingOptions:
    """What was typed for a command that trains; `flags` are the settings that have an option of their own."""

    flags: Mapping[str, object]
    model: str | None = None
    parent: Path | None = None  # --from
    goes_on: bool | None = None
    name: str | None = None
    config: list[Path] | None = None
    overrides: list[str] | None = None
    steps: str | None = None
    trusts: bool = False


def pipeline_command(options: TrainingOptions, dry_run: bool) -> None:
    """`rlhf-chat run`."""
    path, settings = asked_for(options)
    asked = settings or RunDirectory(path).read_config()
    plan = options.flags["plan"]
    if plan and not any(step.draws_samples for step in asked.steps):
        raise UserError(f"--plan places the calls of step 3, which method {asked.method} does not have: leave it out.")
    if plan == AUTO:
        asked = settings = planned(asked, path, measures=not dry_run)
    steps = parse_steps(options.steps, asked)
    if dry_run:
        print_dry_run(asked, steps, path, options.trusts)
    else:
        execute(path, settings, steps, options.trusts)


def asked_for(options: TrainingOptions) -> tuple[Path, RunConfig | None]:
    """The run's directory and settings; None: it keeps its own."""
    if options.parent is not None:
        return from_parent(options, run_path(options.name, None) if options.name else None)
    if options.goes_on is not None:
        raise UserError("--fork and --go-on say what becomes of another run: name it with --from RUN.")
    if options.model is None and options.config is None and options.name is None:
        raise UserError("Say what to train: rlhf-chat run --model smollm2-135m (rlhf-chat run --help lists more).")
    path = run_path(options.name, options.model)
    run = RunDirectory(path)
    return path, resolve_settings(options.model, options.config, options.overrides, options.flags, run)


def from_parent(options: TrainingOptions, path: Path | None) -> tuple[Path, RunConfig]:
    """Directory and settings of a fork or a next round, which is said. A seed is that of the steps that are chosen."""
    from applications.from_run import from_run

    assert options.parent is not None
    if options.model is not None:
        raise UserError(
            f"--from {options.parent} says what to begin with: leave --model out (another one: --set "
            f"model={options.model})."
        )
    given = as_settings(given_of(options.flags))
    if options.steps and "seed" in given:
        base = RunDirectory(options.parent).read_config()
        chosen = parse_steps(options.steps, base.model_copy(update={"method": given.get("method", base.method)}))
        seed = given.pop("seed")
        given = merge(given, {step.command: {"seed": seed} for step in chosen})
    files, overrides = options.config or [], options.overrides or []
    path, settings, sentence = from_run(options.parent, path, files, overrides, given, options.goes_on)
    print(sentence, file=sys.stderr)
    return path, settings


def run_path(name: str | None, model: str | None) -> Path:
    """runs/NAME, or the path that `name` is. Raises UserError where neither is a place for a run."""
    if name in (".", "..") or (name and not name.isprintable()):
        raise UserError(f"{name!a} is no name for a run: give one such as --name demo, or a path.")
    if name and len(Path(name).parts) > 1:
        return Path(name)
    return Path("runs") / (name or Path(os.path.abspath(model or "run")).name or "run")


def step_command(step: Step, path: Path, options: TrainingOptions) -> None:
    """`rlhf-chat sft | reward | rlhf | dpo`, in the run directory `path`."""
    flags = dict(options.flags)
    model = options.model or flags.get("sft_model")
    if step.method and (options.parent or model or options.config):
        flags["method"] = step.method  # a run that begins so goes on so
    settings: RunConfig | None
    if options.parent is not None:
        _, settings = from_parent(replace(options, flags=flags, goes_on=False, steps=step.command), path)
    else:
        named = str(model) if model else None
        settings = resolve_settings(named, options.config, options.overrides, flags, RunDirectory(path))
    if flags.get("plan") == AUTO:
        settings = planned(settings or RunDirectory(path).read_config(), path, measures=True)
    execute(path, settings, [step], options.trusts)


def planned(settings: RunConfig, path: Path, measures: bool) -> RunConfig:
    """With the best plan for this machine (`--plan auto`)."""
    from applications.plan import with_auto_plan

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
    numbers = range(1, len(config.steps) + 1)
    try:
        names = {step.command: number for number, step in enumerate(config.steps, 1)}
        chosen = sorted({names.get(part.strip()) or int(part) for part in text.split(",")})
    except ValueError:
        chosen = []
    if not chosen or not set(chosen) <= set(numbers):
        several = ",".join(map(str, numbers))
        raise UserError(f"--steps takes some of {several} separated by commas, not '{text}' (method {config.method}).")
    return [config.steps[number - 1] for number in chosen]
