"""Commands that train nothing: `chat`, `prefer`, `eval`, `report`, `settings`, `export`, `serve`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from applications.command_line import Debug, Json, RunPath, Trust
from training.steps import STEPS, WRITING

OWN_MODELS = ", ".join(step.command for step in WRITING)


def chat(
    target: Annotated[
        Path,
        typer.Argument(metavar="RUN|MODEL", help="A run, a checkpoint (runs/demo@12), or a model directory."),
    ],
    compare: Annotated[
        bool, typer.Option("--compare", help="SFT (or what the run began with) and RLHF (or DPO) side by side.")
    ] = False,
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
    chat_command(target, compare, temperature, top_p, top_k, max_tokens, seed, system, trust)


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
        Path | None, typer.Option(metavar="FILE", help="Where preferences go. Default: preferences.jsonl in the run.")
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
            "(its reward function and address too), people (their preferences; asks no model), or a "
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

    rlhf-chat eval runs/demo@12 --against runs/demo@8
    """
    from applications.evaluate import evaluate

    evaluate(run_directory, model, against, judge, prompts, seed, json_, trust, eval_data or [])


HowMany = partial(typer.Option, metavar="[N]", min=0, show_default=False)


def samples(
    run_directory: RunPath,
    iteration: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Which one. Default: the newest that was written.")
    ] = None,
    worst: Annotated[int, HowMany(help="The N (5) with the lowest reward.")] = 0,
    best: Annotated[int, HowMany(help="The N (5) with the highest reward.")] = 0,
    longest: Annotated[int, HowMany(help="The N (5) with most tokens. Default: all samples.")] = 0,
    json_: Json = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """What the policy said in an iteration of step 3 (written with --set rlhf.rollouts_every=1), and its rewards.

    rlhf-chat samples runs/demo --iteration 7 --worst 5

    rlhf-chat samples runs/demo --best 3 --longest 3 --json
    """
    from applications.chat import samples_command
    from training.trust import require_reading

    require_reading(run_directory, trust)
    samples_command(run_directory, iteration, worst, best, longest, json_)


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


def settings(
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY]...", help="Settings, or groups of them such as rlhf.kl. Default: all."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|RUN",
            help="Whose values: a model as `run` takes it, a run, or a YAML file. Default: none.",
        ),
    ] = None,
    json_: Json = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """What settings mean, their defaults, and their values for a model or in a run.

    rlhf-chat settings rlhf.kl --model smollm2-135m

    rlhf-chat settings sft.epochs --model runs/demo
    """
    from applications.settings import settings_command
    from training.trust import require_reading

    if model is not None:
        require_reading(Path(model).expanduser(), trust)
    settings_command(keys or [], model, json_)


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

    rlhf-chat export runs/demo@12 --out my-adapter --what adapter

    rlhf-chat export runs/demo --out my-reward --step reward
    """
    from applications.export import export
    from training.trust import require_reading

    require_reading(run_directory, trust)
    export(run_directory, out, what, dtype, step, trust)


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
            help="Where preferences go. Default: preferences.jsonl in the run, of a model nowhere.",
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
