"""The `rlhf-chat` command. Nothing heavy is imported before a command needs it."""

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from applications.data_commands import data_app
from applications.options import Config, Data, Debug, Fusion, Model, Processes, RewardModel, RunPath, Seed, Set
from training.steps import COMPARED, METHODS, PPO, REWARD, SFT, STEPS, WRITING, Step
from training.termination import EXIT_TERMINATED, StageFailed, Terminated

app = typer.Typer(
    name="rlhf-chat",
    help="Train a chat model from human feedback: SFT -> reward model -> PPO -> chat, or SFT -> DPO -> chat.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(data_app, name="data")

EXIT_INTERRUPTED = 130
SFTModel = Annotated[str | None, typer.Option(help="A finished SFT model, instead of step 1 of the run.")]
OWN_MODELS = ", ".join(step.command for step in WRITING)


@app.command()
def run(
    model: Model = None,
    name: Annotated[str | None, typer.Option(help="The run is runs/NAME; default: the model's name.")] = None,
    data: Data = None,
    reward_model: RewardModel = None,
    method: Annotated[str | None, typer.Option(help=f"What follows SFT: {' or '.join(METHODS)}.")] = None,
    steps: Annotated[str | None, typer.Option(help="Which of the steps 1,2,3 (of dpo: 1,2); default: all.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Print models, batches, memory and commands; touch nothing.")] = False,
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    processes: Processes = None,
    fusion: Fusion = None,
    debug: Debug = False,
) -> None:
    """The whole pipeline in one command. Run it again to go on where it stopped.

    rlhf-chat run --model smollm2-135m --name demo

    rlhf-chat run --model opt-13b --dry-run

    rlhf-chat run --model smollm2-135m --name direct --method dpo
    """
    from applications.commands import pipeline_command

    pipeline_command(model, name, data, reward_model, steps, dry_run, config, set_, seed, processes, fusion, method)


@app.command()
def sft(
    run_directory: RunPath,
    model: Model = None,
    data: Data = None,
    config: Config = None,
    set_: Set = None,
    processes: Processes = None,
    debug: Debug = False,
) -> None:
    """Step 1, supervised fine-tuning, in a run directory; with --model in a new one.

    rlhf-chat sft runs/demo

    rlhf-chat sft runs/mine --model opt-125m --data mine.jsonl
    """
    from applications.commands import step_command

    step_command(SFT, run_directory, model, None, data, config, set_, processes)


@app.command()
def reward(
    run_directory: RunPath,
    model: Model = None,
    reward_model: RewardModel = None,
    data: Data = None,
    config: Config = None,
    set_: Set = None,
    processes: Processes = None,
    debug: Debug = False,
) -> None:
    """Step 2, the reward model, in a run directory; with --model in a new one.

    rlhf-chat reward runs/demo

    rlhf-chat reward runs/mine --model opt-125m --data pairs.jsonl
    """
    from applications.commands import step_command

    step_command(REWARD, run_directory, model, reward_model, data, config, set_, processes)


def add_other_method(step: Step) -> None:
    """The command of a step that takes the place of the reward model and PPO."""

    def command(
        run_directory: RunPath,
        sft_model: SFTModel = None,
        model: Model = None,
        data: Data = None,
        config: Config = None,
        set_: Set = None,
        processes: Processes = None,
        debug: Debug = False,
    ) -> None:
        from applications.commands import step_command

        step_command(step, run_directory, model or sft_model, None, data, config, set_, processes, sft_model)

    command.__doc__ = f"""{step.name} ({step.title}) instead of steps 2 and 3; with --sft-model in a new run directory.

    rlhf-chat {step.command} runs/demo

    rlhf-chat {step.command} runs/mine --sft-model my/sft --data {step.rows.name}.jsonl
    """
    app.command(name=step.command)(command)


for other in COMPARED:
    if not other.draws_samples:
        add_other_method(other)


@app.command()
def rlhf(
    run_directory: RunPath,
    actor: SFTModel = None,
    reward: Annotated[str | None, typer.Option(help="A finished reward model, instead of step 2 of the run.")] = None,
    model: Model = None,
    data: Data = None,
    config: Config = None,
    set_: Set = None,
    processes: Processes = None,
    fusion: Fusion = None,
    debug: Debug = False,
) -> None:
    """Step 3, PPO, in a run directory; with --actor and --reward in a new one.

    rlhf-chat rlhf runs/demo

    rlhf-chat rlhf runs/mine --actor my/sft --reward my/reward --data prompts.jsonl
    """
    from applications.commands import step_command

    step_command(PPO, run_directory, model or actor, None, data, config, set_, processes, actor, reward, fusion)


@app.command()
def chat(
    target: Annotated[Path, typer.Argument(help="A run directory or a model directory.")],
    compare: Annotated[bool, typer.Option(help="SFT and RLHF side by side.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.95,
    top_k: Annotated[int, typer.Option(min=0, help="0 is off.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="The same seed gives the same answers.")] = 0,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    debug: Debug = False,
) -> None:
    """Talk to a trained model, here or in a pipe.

    rlhf-chat chat runs/demo --compare

    echo "How was your day?" | rlhf-chat chat runs/demo
    """
    from applications.chat import chat_command

    chat_command(target, compare, temperature, top_p, top_k, max_tokens, seed, system)


@app.command(name="eval")
def evaluate(
    run_directory: RunPath,
    model: Annotated[
        str, typer.Option(help=f"base, {OWN_MODELS}, a run, model directory, preset or hub id; default: the newest.")
    ] = "",
    against: Annotated[str, typer.Option(help="The same; default: sft, or base where --model is sft.")] = "",
    judge: Annotated[str, typer.Option(help="true, learned, or a reward model; default: true where it is known.")] = "",
    prompts: Annotated[int, typer.Option(min=0, help="Held-out prompts; 0: evaluation.prompts.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print everything as data.")] = False,
    debug: Debug = False,
) -> None:
    """Measure a model against another one: win rate, reward, KL, perplexity, accuracy of the reward model.

    rlhf-chat eval runs/demo

    rlhf-chat eval runs/demo --model runs/other --against base --judge learned
    """
    from applications.evaluate import evaluate

    evaluate(run_directory, model, against, judge, prompts, json_)


@app.command()
def report(
    run_directory: RunPath,
    out: Annotated[Path | None, typer.Option(help="The file to write; default: report.html in the run.")] = None,
    debug: Debug = False,
) -> None:
    """One HTML page of a run: curves, times, answers, settings. `rlhf-chat run` writes it too.

    rlhf-chat report runs/demo

    rlhf-chat report runs/demo --out demo.html
    """
    from applications.report.page import write_report
    from training.run_directory import RunDirectory

    print(write_report(RunDirectory(run_directory), out))


@app.command()
def export(
    run_directory: RunPath,
    to: Annotated[Path, typer.Option(help="The directory to make; it must be new or empty.")],
    what: Annotated[str, typer.Option(help="merged (whole weights) or adapter (LoRA).")] = "merged",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; default: as the run saved it.")] = "",
    step: Annotated[
        str, typer.Option(help=f"{', '.join(each.command for each in STEPS)}; default: the newest that writes.")
    ] = "",
    debug: Debug = False,
) -> None:
    """A model of a run, ready to load elsewhere or to upload, with a model card.

    rlhf-chat export runs/demo --to my-model --dtype bf16

    rlhf-chat export runs/demo --to my-adapter --what adapter

    rlhf-chat export runs/demo --to my-reward --step reward
    """
    from applications.export import export

    export(run_directory, to, what, dtype, step)


@app.command()
def serve(
    target: Annotated[Path, typer.Argument(help="A run directory (its models: sft and rlhf) or a model directory.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond this machine a token is needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is a free one.")] = 8000,
    token: Annotated[
        str | None, typer.Option(envvar="RLHF_CHAT_TOKEN", help="API key to ask for; made up where one is needed.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Answers of a model drawn at the same time.")] = 8,
    queue: Annotated[int, typer.Option(min=0, help="Answers of a model that wait; beyond it clients hear 429.")] = 128,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a prompt and its answer; at most the model's.")] = 2048,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    debug: Debug = False,
) -> None:
    """Serve trained models: the OpenAI protocol, and a page that shows SFT and RLHF side by side.

    rlhf-chat serve runs/demo

    rlhf-chat serve runs/demo --host 0.0.0.0 --port 8080
    """
    from applications.serve import serve_command

    serve_command(target, host, port, token, slots, queue, context, max_tokens)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="The actor: a preset, hub id of a preset, or model directory.")],
    reward_model: RewardModel = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs of each; 8, or as many as profiled.")] = None,
    gpu: Annotated[
        str,
        typer.Option(
            help="a100-40g, a100-80g, a800-80g, h100, h200, v100, l40s, rtx-4090, this-machine (see `profile`), or a "
            "profile's YAML file."
        ),
    ] = "a100-80g",
    network: Annotated[float, typer.Option(min=0.1, help="Gbit/s of each node's network.")] = 200,
    price: Annotated[float | None, typer.Option(min=0.0, help="Of one GPU for one hour.")] = None,
    config: Config = None,
    set_: Set = None,
    seed: Annotated[int, typer.Option(help="Of the search: the same seed gives the same plan.")] = 0,
    effort: Annotated[float, typer.Option(min=0.0, help="Multiplies the steps of the search.")] = 1.0,
    json_: Annotated[bool, typer.Option("--json", help="Print everything as data.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the best plan to this YAML file.")] = None,
    check: Annotated[Path | None, typer.Option(help="Cost the plan of this YAML file instead of searching.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write the Gantt picture to this file.")] = None,
    debug: Debug = False,
) -> None:
    """The best execution plan for a model and a cluster, beside two common ones. Nothing is started.

    rlhf-chat plan --model opt-13b --reward-model opt-350m --nodes 2 --gpus-per-node 8 --gpu a100-80g --price 2.0

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


@app.command()
def profile(
    processes: Annotated[
        int | None, typer.Option(min=1, help="Ranks that share the machine; default: its GPUs.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write to this YAML file instead of the cache.")] = None,
    debug: Debug = False,
) -> None:
    """Measure this machine for `plan --gpu this-machine`: rates of arithmetic, memory and links, and launch costs.

    rlhf-chat profile

    rlhf-chat profile --processes 2 --out mine.yaml
    """
    from applications.profile import profile_command

    profile_command(processes, out)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(help="Check this model: a directory, run, preset or hub id.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel degree to check, a process each.")] = 1,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16 or auto.")] = "auto",
    hub: Annotated[bool, typer.Option("--hub", help="Also ask whether the hub can be reached.")] = False,
    debug: Debug = False,
) -> None:
    """Is this machine fit? With --model: does the model generate what plain transformers gives?

    rlhf-chat doctor

    rlhf-chat doctor --model runs/demo --tp 2
    """
    from applications.commands import doctor_command

    raise typer.Exit(doctor_command(model, tp, dtype, hub))


def main() -> None:
    """The console script: errors of the user become one sentence and exit code 2."""
    from inference.disk import file_sentence
    from inference.errors import UserError
    from inference.streams import guard_output

    guard_output(ends=True)
    before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        for argument in sys.argv:
            if not argument.isascii() and argument.encode(errors="replace").decode() != argument:
                raise UserError(f"'{argument}' is not UTF-8 text; where it names a file, give that another name.")
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
