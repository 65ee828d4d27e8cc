"""The `rlhf-chat` command. Nothing heavy is imported before a command needs it."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from applications.data_commands import data_app
from applications.help_pages import Command, Group
from applications.machine_commands import doctor, plan, profile
from applications.options import (
    Config,
    Data,
    Debug,
    EvalData,
    Fusion,
    Json,
    Model,
    PlanFile,
    Processes,
    RewardModel,
    RunPath,
    Seed,
    Set,
    SFTModel,
    Trust,
)
from training.steps import COMPARED, METHODS, PPO, REWARD, SFT, STEPS, WRITING, Step

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
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RUN",
            help="Instead of --model: go on from RUN's newest model, with its settings, on --data or on the "
            "preferences collected for it (docs/next_round.md). Default: none.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The run is runs/NAME, or a path with a / in it; default: MODEL's name, or after --from RUN "
            "RUN-round2, RUN-round3 ...",
        ),
    ] = None,
    data: Data = None,
    eval_data: EvalData = None,
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
    plan: PlanFile = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """The whole pipeline in one command. Run it again to go on where it stopped.

    rlhf-chat run --model smollm2-135m --name demo

    rlhf-chat run --model opt-13b --dry-run

    rlhf-chat run --model smollm2-135m --name direct --method dpo

    rlhf-chat run --from runs/demo
    """
    from applications.commands import pipeline_command

    pipeline_command(
        model,
        from_,
        name,
        data,
        eval_data,
        reward_model,
        steps,
        dry_run,
        config,
        set_,
        seed,
        processes,
        fusion,
        plan,
        method,
        trust,
    )


@command()
def sft(
    run_directory: RunPath,
    model: Model = None,
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
    from applications.commands import step_command

    step_command(SFT, run_directory, model, data, eval_data, config, set_, seed, processes, trust)


@command()
def reward(
    run_directory: RunPath,
    model: Model = None,
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
    from applications.commands import step_command

    step_command(
        REWARD, run_directory, model, data, eval_data, config, set_, seed, processes, trust, reward_model=reward_model
    )


def add_other_method(step: Step) -> None:
    """The command of a step that takes the place of the reward model and PPO."""

    def function(
        run_directory: RunPath,
        sft_model: SFTModel = None,
        model: Model = None,
        data: Data = None,
        eval_data: EvalData = None,
        config: Config = None,
        set_: Set = None,
        seed: Seed = None,
        processes: Processes = None,
        trust: Trust = False,
        debug: Debug = False,
    ) -> None:
        from applications.commands import step_command

        step_command(
            step, run_directory, model, data, eval_data, config, set_, seed, processes, trust, sft_model=sft_model
        )

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
        eval_data,
        config,
        set_,
        seed,
        processes,
        trust,
        sft_model=sft_model,
        trained_reward_model=reward_model,
        fusion=fusion,
        plan=plan,
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


@command()
def prefer(
    target: Annotated[Path, typer.Argument(metavar="RUN|MODEL", help="A run directory; or a model, with --to.")],
    as_: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Who judges. Default: your name on this machine.")
    ] = None,
    again: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Judge what NAME has judged, for the agreement of two people (or of one, twice). Asks no model. "
            "Default: new answers.",
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help=f"Whose answers: base, {OWN_MODELS}, a run, a model directory, preset or hub id. Default: the newest.",
        ),
    ] = "",
    against: Annotated[
        str,
        typer.Option(metavar="MODEL", help="Another one, to tell which is better. Default: one model answers twice."),
    ] = "",
    temperature: Annotated[
        float | None,
        typer.Option(metavar="NUMBER", min=0.0, help="How freely words are drawn. Default: the run's, or 0.7."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Longest answer, in tokens. Default: the run's, or 256."),
    ] = None,
    to: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where verdicts go. Default: preferences.jsonl in the run.")
    ] = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Say which of two answers is better; a run can learn from it (docs/preferences.md).

    rlhf-chat prefer runs/demo

    rlhf-chat prefer runs/demo --as ben --against sft

    rlhf-chat prefer runs/demo --as ben --again ann
    """
    from applications.prefer import prefer_command

    prefer_command(target, as_, again, model, against, temperature, max_tokens, to, trust)


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
            help="Who says which answer is better: true (the lexicon), learned (the run's reward model), reward "
            "(its reward function and address too), clicks (people, of what they have judged; asks no model), or a "
            "reward model. Default: true where it is known, else learned.",
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
    eval_data: Annotated[
        list[str] | None,
        typer.Option(
            "--eval-data",
            metavar="SOURCE",
            help="Prompts, pairs and demonstrations to measure on. Default: what the run holds out.",
        ),
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

    evaluate(run_directory, model, against, judge, prompts, seed, json_, trust, eval_data or [])


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
    against: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help=f"Whose answers are judged beside the newest's: base, {OWN_MODELS}, a run, a model. Default: its own.",
        ),
    ] = "",
    preferences: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where verdicts of people go. Default: preferences.jsonl in the run, of a model nowhere.",
        ),
    ] = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Serve trained models: the OpenAI protocol, a page that shows SFT and RLHF side by side, and one to judge answers.

    rlhf-chat serve runs/demo

    rlhf-chat serve runs/demo --host 0.0.0.0 --port 8080
    """
    from applications.serve import serve_command
    from training.trust import require_reading

    require_reading(target, trust)
    serve_command(target, host, port, token, slots, queue, context, max_tokens, against, preferences, trust)


for function in (plan, profile, doctor):
    command()(function)
