"""The `rlhf-chat` command. Nothing heavy is imported before a command needs it."""

import signal
import sys
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from applications.data_commands import data_app
from applications.help_pages import Command, Group
from applications.options import (
    Config,
    Data,
    Debug,
    Fusion,
    Json,
    Model,
    Processes,
    RewardModel,
    RunPath,
    Seed,
    Set,
    Trust,
)
from training.steps import COMPARED, METHODS, PPO, REWARD, SFT, STEPS, WRITING, Step
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

EXIT_INTERRUPTED = 130
SFTModel = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="A finished SFT model, instead of step 1. Default: the run's own."),
]
FOLLOWS = " or ".join(
    f"{method} ({', then '.join(step.title for step in steps[1:])})" for method, steps in METHODS.items()
)
OWN_MODELS = ", ".join(step.command for step in WRITING)


@app.callback()
def rlhf_chat(
    version: Annotated[bool, typer.Option("--version", help="Print the version; beside any command.")] = False,
) -> None:
    """Train a chat model from human feedback: SFT -> reward model -> PPO -> chat, or SFT -> DPO -> chat."""


@command()
def run(
    model: Model = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The run is runs/NAME, or a path with a / in it; default: MODEL's name."),
    ] = None,
    data: Data = None,
    reward_model: RewardModel = None,
    method: Annotated[
        str | None, typer.Option(metavar="METHOD", help=f"What follows step 1: {FOLLOWS}. Default: ppo, or the run's.")
    ] = None,
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
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """The whole pipeline in one command. Run it again to go on where it stopped.

    rlhf-chat run --model smollm2-135m --name demo

    rlhf-chat run --model opt-13b --dry-run

    rlhf-chat run --model smollm2-135m --name direct --method dpo
    """
    from applications.commands import pipeline_command

    pipeline_command(
        model, name, data, reward_model, steps, dry_run, config, set_, seed, processes, fusion, method, trust
    )


@command()
def sft(
    run_directory: RunPath,
    model: Model = None,
    data: Data = None,
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
    from applications.commands import step_command

    step_command(SFT, run_directory, model, data, config, set_, seed, processes, trust)


@command()
def reward(
    run_directory: RunPath,
    model: Model = None,
    reward_model: RewardModel = None,
    data: Data = None,
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
    from applications.commands import step_command

    step_command(REWARD, run_directory, model, data, config, set_, seed, processes, trust, reward_model=reward_model)


def add_other_method(step: Step) -> None:
    """The command of a step that takes the place of the reward model and PPO."""

    def function(
        run_directory: RunPath,
        sft_model: SFTModel = None,
        model: Model = None,
        data: Data = None,
        config: Config = None,
        set_: Set = None,
        seed: Seed = None,
        processes: Processes = None,
        trust: Trust = False,
        debug: Debug = False,
    ) -> None:
        from applications.commands import step_command

        step_command(step, run_directory, model, data, config, set_, seed, processes, trust, sft_model=sft_model)

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
    data: Data = None,
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    processes: Processes = None,
    fusion: Fusion = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Step 3, PPO, in a run directory; with --sft-model and --reward-model in a new one.

    rlhf-chat rlhf runs/demo

    rlhf-chat rlhf runs/mine --sft-model my/sft --reward-model my/reward
    """
    from applications.commands import step_command

    step_command(
        PPO,
        run_directory,
        model,
        data,
        config,
        set_,
        seed,
        processes,
        trust,
        sft_model=sft_model,
        trained_reward_model=reward_model,
        fusion=fusion,
    )


@command()
def chat(
    target: Annotated[Path, typer.Argument(metavar="RUN|MODEL", help="A run directory or a model directory.")],
    compare: Annotated[bool, typer.Option("--compare", help="SFT and RLHF (or DPO) side by side.")] = False,
    temperature: Annotated[
        float, typer.Option(metavar="NUMBER", min=0.0, help="How freely words are drawn; 0: always the likeliest.")
    ] = 0.7,
    top_p: Annotated[
        float,
        typer.Option(metavar="NUMBER", min=0.0, max=1.0, help="Draw from the likeliest that make up this share."),
    ] = 0.95,
    top_k: Annotated[int, typer.Option(metavar="N", min=0, help="Draw from the likeliest N; 0 is off.")] = 0,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")] = 256,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same answers.")] = 0,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A message that tells the model how to behave. Default: none.")
    ] = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Talk to a trained model, here or in a pipe.

    rlhf-chat chat runs/demo --compare

    echo "How was your day?" | rlhf-chat chat runs/demo
    """
    from applications.chat import chat_command
    from training.trust import require_reading

    require_reading(target, trust)
    chat_command(target, compare, temperature, top_p, top_k, max_tokens, seed, system)


@command(name="eval")
def evaluate(
    run_directory: RunPath,
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help=f"What is measured: base, {OWN_MODELS}, a run, a model directory, preset or hub id. Default: "
            "the newest.",
        ),
    ] = "",
    against: Annotated[
        str,
        typer.Option(metavar="MODEL", help="What it is measured against. Default: sft, or base where --model is sft."),
    ] = "",
    judge: Annotated[
        str,
        typer.Option(
            metavar="JUDGE",
            help="Who says which answer is better: true (the known rule), learned (the run's reward model), reward "
            "(its reward function and address too), or a reward model. Default: true where it is known, else learned.",
        ),
    ] = "",
    prompts: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            show_default=False,
            help="Held-out prompts to answer. Default: evaluation.prompts (200).",
        ),
    ] = 0,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Another seed draws other answers. Default: the run's.")
    ] = None,
    json_: Json = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Measure a model against another one: win rate, reward, KL, perplexity, accuracy of the reward model.

    rlhf-chat eval runs/demo

    rlhf-chat eval runs/demo --model runs/other --against base --judge learned
    """
    from applications.evaluate import evaluate

    evaluate(run_directory, model, against, judge, prompts, seed, json_, trust)


@command()
def report(
    run_directory: RunPath,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The file to write. Default: report.html in the run.")
    ] = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """One HTML page of a run: curves, times, answers, settings. `rlhf-chat run` writes it too.

    rlhf-chat report runs/demo

    rlhf-chat report runs/demo --out demo.html
    """
    from applications.report.page import write_report
    from training.run_directory import RunDirectory
    from training.trust import require_reading

    require_reading(run_directory, trust)
    print(write_report(RunDirectory(run_directory), out))


@command()
def export(
    run_directory: RunPath,
    out: Annotated[Path, typer.Option(metavar="DIRECTORY", help="The directory to make; it must be new or empty.")],
    what: Annotated[
        str, typer.Option(metavar="KIND", help="merged (whole weights), or adapter (what LoRA trained, alone).")
    ] = "merged",
    dtype: Annotated[
        str, typer.Option(metavar="FORMAT", help="Of numbers: fp32, bf16 or fp16. Default: as the run saved it.")
    ] = "",
    step: Annotated[
        str,
        typer.Option(
            metavar="STEP",
            help=f"Whose model: {', '.join(each.command for each in STEPS)}. Default: the newest that can chat.",
        ),
    ] = "",
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """A model of a run, ready to load elsewhere or to upload, with a model card.

    rlhf-chat export runs/demo --out my-model --dtype bf16

    rlhf-chat export runs/demo --out my-adapter --what adapter

    rlhf-chat export runs/demo --out my-reward --step reward
    """
    from applications.export import export
    from training.trust import require_reading

    require_reading(run_directory, trust)
    export(run_directory, out, what, dtype, step)


@command()
def serve(
    target: Annotated[
        Path,
        typer.Argument(metavar="RUN|MODEL", help="A run directory (its models: sft and rlhf) or a model directory."),
    ],
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; beyond this machine a token is needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0 is a free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            envvar="RLHF_CHAT_TOKEN",
            help="The API key that clients must send. Default: none on this machine alone, else one is made up.",
        ),
    ] = None,
    slots: Annotated[
        int, typer.Option(metavar="N", min=1, help="Answers of a model that are written at the same time.")
    ] = 8,
    queue: Annotated[
        int, typer.Option(metavar="N", min=0, help="Answers of a model that wait; beyond it clients hear 429 (busy).")
    ] = 128,
    context: Annotated[
        int, typer.Option(metavar="N", min=2, help="Tokens of a prompt and its answer; at most the model's.")
    ] = 2048,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")] = 1024,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Serve trained models: the OpenAI protocol, and a page that shows SFT and RLHF side by side.

    rlhf-chat serve runs/demo

    rlhf-chat serve runs/demo --host 0.0.0.0 --port 8080
    """
    from applications.serve import serve_command
    from training.trust import require_reading

    require_reading(target, trust)
    serve_command(target, host, port, token, slots, queue, context, max_tokens)


@command()
def plan(
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="The model to train: a preset, its hub id, or a model directory.")
    ],
    reward_model: RewardModel = None,
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Machines of the cluster.")] = 1,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="GPUs of each machine. Default: 8, or as many as were profiled."),
    ] = None,
    gpu: Annotated[
        str,
        typer.Option(
            metavar="GPU",
            help="a100-40g, a100-80g, a800-80g, h100, h200, v100, l40s, rtx-4090, this-machine (see rlhf-chat "
            "profile), or a profile's YAML file.",
        ),
    ] = "a100-80g",
    network: Annotated[float, typer.Option(metavar="NUMBER", min=0.1, help="Gbit/s of each machine's network.")] = 200,
    price: Annotated[
        float | None, typer.Option(metavar="NUMBER", min=0.0, help="Of one GPU for one hour. Default: no cost is told.")
    ] = None,
    config: Config = None,
    set_: Set = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the search: the same seed gives the same plan.")] = 0,
    effort: Annotated[
        float, typer.Option(metavar="NUMBER", min=0.0, help="How long to search: 2 takes twice the steps of 1.")
    ] = 1.0,
    json_: Json = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the best plan to this YAML file. Default: none.")
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Do not search: tell the cost of the plan in this YAML file. Default: none."),
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw who does what when, to this file. Default: none.")
    ] = None,
    debug: Debug = False,
) -> None:
    """The best execution plan for a model and a cluster, beside two common ones. Nothing is started.

    rlhf-chat plan --model opt-13b --reward-model opt-350m --nodes 2 --price 2.0

    rlhf-chat plan --model opt-125m --gpu this-machine
    """
    from applications.plan import plan_command

    plan_command(
        model,
        reward_model,
        nodes,
        gpus_per_node,
        gpu,
        network,
        price,
        config,
        set_,
        seed,
        effort,
        json_,
        out,
        check,
        svg,
    )


@command()
def profile(
    processes: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Processes that share the machine. Default: as many as it has GPUs."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The YAML file to write. Default: in the cache, where plan looks for it."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure this machine, for `plan --gpu this-machine`: arithmetic, memory, links, and what a launch costs.

    rlhf-chat profile

    rlhf-chat profile --processes 2 --out mine.yaml
    """
    from applications.profile import profile_command

    profile_command(processes, out)


@command()
def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Check this model: a directory, run, preset or hub id. Default: only the machine."
        ),
    ] = None,
    tp: Annotated[
        int, typer.Option(metavar="N", min=1, help="Check it cut into N parts, a process each (tensor-parallel).")
    ] = 1,
    dtype: Annotated[str, typer.Option(metavar="FORMAT", help="Of numbers: fp32, bf16, fp16 or auto.")] = "auto",
    hub: Annotated[bool, typer.Option("--hub", help="Also ask whether the model hub can be reached.")] = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Is this machine fit? With --model: does the model generate what plain transformers gives?

    rlhf-chat doctor

    rlhf-chat doctor --model runs/demo --tp 2
    """
    from applications.commands import doctor_command
    from training.trust import require_reading

    if model is not None:
        require_reading(Path(model).expanduser(), trust)
    raise typer.Exit(doctor_command(model, tp, dtype, hub))


def main() -> None:
    """The console script: errors of the user become one sentence and exit code 2."""
    from inference.disk import file_sentence
    from inference.errors import UserError
    from inference.streams import guard_output, printable

    guard_output(ends=True)
    if "--version" in sys.argv[1:]:
        from importlib.metadata import version

        print(f"rlhf-chat {version('rlhf-chat')}")
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
            trains = sys.argv[1:2] and sys.argv[1] in ("run", *(step.command for step in STEPS))
            goes_on = "; the same command goes on" if trains else ""
            print(f"\nrlhf-chat: stopped{goes_on}.", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    """Once: what has begun to end is not told again."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated("Ended by SIGTERM.")


if __name__ == "__main__":
    main()
