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
from training.steps import REWARD, STEPS, Step


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
        from applications.plan import with_auto_plan

        asked = settings = with_auto_plan(asked, RunDirectory(path), measures=not dry_run)
    steps = needed_steps(asked, parse_steps(options.steps, asked))
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
    """runs/NAME, or the path that `name` is. Raises UserError where neither can be a run."""
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
    run = RunDirectory(path)
    if options.parent is not None:
        _, settings = from_parent(replace(options, flags=flags, goes_on=False, steps=step.command), path)
    else:
        named = str(model) if model else None
        settings = resolve_settings(named, options.config, options.overrides, flags, run)
    asked = settings or run.read_config()
    if flags.get("plan") == AUTO:
        from applications.plan import with_auto_plan

        settings = with_auto_plan(asked, run, measures=True)
    execute(path, settings, [step], options.trusts)


def execute(path: Path, settings: RunConfig | None, steps: list[Step], trusts: bool) -> None:
    from applications.fit import check_fits
    from applications.pipeline import run_pipeline
    from training.distributed import require_loopback
    from training.fork import Fork
    from training.opening import open_run

    run = RunDirectory(path)
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
    from training.fork import Fork
    from training.trust import of_parents, require_reading, require_yes

    run = RunDirectory(path)
    if settings.fork_of:  # what is in the parent is compared
        if run.config_file.exists():
            require_yes(path, of_parents(run, run.read_config()), trusts)
        require_reading(Path(settings.fork_of), trusts)
    if fork := Fork.of(run, settings):
        print("\n".join(fork.lines(steps)))
        steps = fork.trained(steps)
    if steps or fork is None:
        print(dry_run(settings, steps, path))


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


def needed_steps(config: RunConfig, steps: list[Step]) -> list[Step]:
    """`steps` without those whose model is given or, of the reward model, not used; what was asked for alone stays."""
    return [step for step in steps if not left_out(config, step)] or steps


def left_out(config: RunConfig, step: Step) -> str:
    """Why a step is not needed; empty where it is."""
    if given := config.given_model(step):
        return f"{given} is used instead"
    is_unused = step is REWARD and not config.rlhf.has_reward_model
    return "no reward model is used (rlhf.reward_weights.model=0)" if is_unused else ""
