"""The `rlhf-chat` command. Nothing heavy is imported before a command needs it."""

import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from applications.command_line import (
    Command,
    Config,
    Data,
    Debug,
    EvalData,
    From,
    Fusion,
    GoOn,
    Group,
    Json,
    Method,
    Model,
    Name,
    PlanFile,
    Processes,
    RewardModel,
    RunPath,
    Seed,
    Set,
    SFTModel,
    Trust,
)
from applications.model_commands import chat, evaluate, export, prefer, report, samples, serve, settings
from applications.tool_commands import clean, compare, data_app, doctor, plan, profile, runs
from inference.disk import file_sentence
from inference.errors import UserError
from inference.streams import guard_output, printable
from training.launchers import PARENT_VARIABLE, begin_script
from training.steps import COMPARED, PPO, REWARD, SFT, STEPS, Step
from training.termination import EXIT_TERMINATED, StageFailed, Terminated

app = typer.Typer(
    name="rlhf-chat",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog="Begin with: rlhf-chat run --model tiny. All options of a command: rlhf-chat COMMAND --help.",
)
command = partial(app.command, cls=Command)

app.add_typer(data_app, name="data")


@app.callback()
def rlhf_chat(
    version: Annotated[bool, typer.Option("--version", help="Print the version; beside any command.")] = False,
) -> None:
    """Train a chat model from human feedback: SFT -> reward model -> PPO -> chat, or SFT -> DPO -> chat."""


@command()
def run(
    model: Model = None,
    from_: From = None,
    go_on: GoOn = None,
    name: Name = None,
    data: Data = None,
    eval_data: EvalData = None,
    reward_model: RewardModel = None,
    method: Method = None,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="STEPS",
            help="Only some of the steps 1,2,3 (of dpo 1,2), or their names, as sft,reward. Default: all.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, what it takes and whether it fits; start nothing.")
    ] = False,
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    processes: Processes = None,
    fusion: Fusion = None,
    plan: PlanFile = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """The whole pipeline in one command. Run it again to go on where it stopped.

    rlhf-chat run --model smollm2-135m --name demo

    rlhf-chat run --model opt-13b --dry-run

    rlhf-chat run --model smollm2-135m --name direct --method dpo

    rlhf-chat run --from runs/demo --name other --set rlhf.kl.coefficient=0.1

    rlhf-chat run --from runs/demo --go-on
    """
    from applications.commands import TrainingOptions, pipeline_command

    flags: dict[str, object] = {"data": data, "eval_data": eval_data, "seed": seed, "processes": processes}
    flags |= {"reward_model": reward_model, "fusion": fusion, "plan": plan, "method": method}
    pipeline_command(TrainingOptions(flags, model, from_, go_on, name, config, set_, steps, trust), dry_run)


@command()
def prepare(
    model: Model = None,
    from_: From = None,
    go_on: GoOn = None,
    name: Name = None,
    data: Data = None,
    eval_data: EvalData = None,
    reward_model: RewardModel = None,
    method: Method = None,
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    processes: Processes = None,
    json_: Json = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """All of a run that needs the internet, and no training: for machines without it, which then need its directory.

    rlhf-chat prepare --model opt-1.3b --name big

    rlhf-chat run --name big
    """
    from applications.commands import TrainingOptions
    from applications.pipeline import prepare_command

    flags: dict[str, object] = {"data": data, "eval_data": eval_data, "seed": seed, "processes": processes}
    flags |= {"reward_model": reward_model, "method": method}
    prepare_command(TrainingOptions(flags, model, from_, go_on, name, config, set_, trusts=trust), json_)


@command()
def sft(
    run_directory: RunPath,
    model: Model = None,
    from_: From = None,
    data: Data = None,
    eval_data: EvalData = None,
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    processes: Processes = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Step 1, supervised fine-tuning (SFT), in a run directory; with --model in a new one.

    rlhf-chat sft runs/demo

    rlhf-chat sft runs/mine --model opt-125m --data mine.jsonl
    """
    from applications.commands import TrainingOptions, step_command

    flags: dict[str, object] = {"data": data, "eval_data": eval_data, "seed": seed, "processes": processes}
    options = TrainingOptions(flags, model, from_, config=config, overrides=set_, trusts=trust)
    step_command(SFT, run_directory, options)


@command()
def reward(
    run_directory: RunPath,
    model: Model = None,
    from_: From = None,
    reward_model: RewardModel = None,
    data: Data = None,
    eval_data: EvalData = None,
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    processes: Processes = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Step 2, the reward model, in a run directory; with --model in a new one.

    rlhf-chat reward runs/demo

    rlhf-chat reward runs/mine --model opt-125m --data pairs.jsonl
    """
    from applications.commands import TrainingOptions, step_command

    flags: dict[str, object] = {"data": data, "eval_data": eval_data, "seed": seed, "processes": processes}
    flags |= {"reward_model": reward_model}
    options = TrainingOptions(flags, model, from_, config=config, overrides=set_, trusts=trust)
    step_command(REWARD, run_directory, options)


def add_other_method(step: Step) -> None:
    """Add the command of a step that replaces the reward model and PPO."""

    def function(
        run_directory: RunPath,
        sft_model: SFTModel = None,
        model: Model = None,
        from_: From = None,
        data: Data = None,
        eval_data: EvalData = None,
        config: Config = None,
        set_: Set = None,
        seed: Seed = None,
        processes: Processes = None,
        trust: Trust = False,
        debug: Debug = False,
    ) -> None:
        from applications.commands import TrainingOptions, step_command

        flags: dict[str, object] = {"data": data, "eval_data": eval_data, "seed": seed, "processes": processes}
        flags |= {"sft_model": sft_model}
        options = TrainingOptions(flags, model, from_, config=config, overrides=set_, trusts=trust)
        step_command(step, run_directory, options)

    function.__doc__ = f"""{step.name} ({step.title}) instead of steps 2 and 3; with --sft-model in a new run directory.

    rlhf-chat {step.command} runs/demo

    rlhf-chat {step.command} runs/mine --sft-model my/sft --data {step.rows.name}.jsonl
    """
    command(name=step.command)(function)


for other in COMPARED:
    if not other.draws_samples:
        add_other_method(other)


@command()
def rlhf(
    run_directory: RunPath,
    sft_model: SFTModel = None,
    reward_model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A finished reward model, instead of step 2. Default: the run's own."),
    ] = None,
    model: Model = None,
    from_: From = None,
    data: Data = None,
    eval_data: EvalData = None,
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    processes: Processes = None,
    fusion: Fusion = None,
    plan: PlanFile = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Step 3, PPO, in a run directory; with --sft-model and --reward-model, or --from another run, in a new one.

    rlhf-chat rlhf runs/demo

    rlhf-chat rlhf runs/other --from runs/demo --seed 2

    rlhf-chat rlhf runs/mine --sft-model my/sft --reward-model my/reward
    """
    from applications.commands import TrainingOptions, step_command

    flags: dict[str, object] = {"data": data, "eval_data": eval_data, "seed": seed, "processes": processes}
    flags |= {"sft_model": sft_model, "trained_reward_model": reward_model, "fusion": fusion, "plan": plan}
    options = TrainingOptions(flags, model, from_, config=config, overrides=set_, trusts=trust)
    step_command(PPO, run_directory, options)


OTHERS = (runs, compare, clean, chat, prefer, evaluate, samples, report, settings, export, serve, plan, profile, doctor)
for function in OTHERS:
    command("eval" if function is evaluate else None)(function)


EXIT_INTERRUPTED = 130


def main() -> None:
    """The console script: errors of the user become one sentence and exit code 2."""
    if PARENT_VARIABLE in os.environ:
        begin_script()
    guard_output(ends=True)
    if "--version" in sys.argv[1:]:
        print(f"rlhf-chat {version_with_commit()}")
        return
    before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        for argument in sys.argv:
            if not argument.isascii() and argument.encode(errors="replace").decode() != argument:
                raise UserError(f"'{argument}' is not UTF-8 text; where it names a file, give that another name.")
            if printable(argument) != argument:
                raise UserError(f"{argument!a} holds control characters; give it without them.")
        try:
            app()
        except SystemExit:
            sys.stdout.flush()  # here, where a full disk is a sentence
            raise
    except (UserError, StageFailed) as error:
        if "--debug" in sys.argv:
            raise
        print(f"rlhf-chat: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except OSError as error:
        sentence = file_sentence(error)
        if sentence is None or "--debug" in sys.argv:
            raise
        print(f"rlhf-chat: {sentence}", file=sys.stderr)
        sys.exit(2)
    except Terminated as terminated:
        print(f"rlhf-chat: {terminated}", file=sys.stderr)
        sys.exit(EXIT_TERMINATED)
    except SystemExit as ended:
        if ended.code == EXIT_INTERRUPTED:  # what typer makes of Ctrl-C
            trains = sys.argv[1:2] and sys.argv[1] in ("run", "prepare", *(step.command for step in STEPS))
            goes_on = "; the same command goes on" if trains else ""
            print(f"\nrlhf-chat: stopped{goes_on}.", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    """End once: later signals are ignored."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated("Ended by SIGTERM.")


def version_with_commit() -> str:
    """The version, and where the code is a checkout its commit: `0.1.0+g0ac077a81234`, `.changed` if files differ."""
    from importlib.metadata import version

    from training.opening import checkout

    commit, changed = checkout(Path(__file__).parents[1] / "training")
    return version("rlhf-chat") + (f"+g{commit[:12]}" if commit else "") + (".changed" if changed else "")
