"""`rlhf-chat plan`, `profile` and `doctor`: about machines, before anything is trained on them."""

from pathlib import Path
from typing import Annotated

import typer

from applications.command_line import Command, Config, Debug, Group, Json, Model, RewardModel, Set, Trust
from inference.errors import UserError


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
    everything: Annotated[
        bool,
        typer.Option("--everything", help="Also search plans that cannot be run yet: with pipelines, for example."),
    ] = False,
    debug: Debug = False,
) -> None:
    """The best execution plan for a model and a cluster, beside two common ones. Nothing is started.

    rlhf-chat plan --model opt-13b --reward-model opt-350m --nodes 2 --price 2.0

    rlhf-chat plan --model opt-125m --gpu this-machine
    """
    from applications.plan import plan_command
    from applications.plan_request import make_request

    request = make_request(model, reward_model, nodes, gpus_per_node, gpu, network, price, config, set_)
    plan_command(request, seed, effort, json_, out, check, svg, everything)


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
    if model is None:
        if tp != 1 or dtype != "auto":
            raise UserError("--tp and --dtype say how to check a model: give it with --model.")
        from applications.machine_report import report_on_machine

        is_fit = report_on_machine(hub)
    else:
        from training.trust import require_reading

        require_reading(Path(model).expanduser(), trust)
        if hub:
            raise UserError("--hub belongs to the report on the machine: leave --model out.")
        from applications.doctor import check_model

        is_fit = check_model(model, tp, dtype)
    raise typer.Exit(0 if is_fit else 1)


def runs(
    directory: Annotated[Path, typer.Argument(metavar="[DIRECTORY]", help="Where the runs are.")] = Path("runs"),
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """What runs there are: step, state, when it was begun, time, size, result; what was written last comes first.

    rlhf-chat runs

    rlhf-chat runs /scratch/ann --json
    """
    from applications.runs import runs_command

    runs_command(directory, json_)


Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, or directories of runs.")]


def compare(
    runs: Runs,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page with the curves of all. Default: none.")
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print everything as CSV, a row a run.")] = False,
    json_: Json = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Runs side by side: the settings that differ, results with their intervals, runs of several seeds together.

    rlhf-chat compare runs/demo runs/b

    rlhf-chat compare runs/kl* --out kl.html
    """
    from applications.compare import compare_command

    compare_command(runs, out, csv, json_, trust)


def clean(
    runs: Runs,
    all_: Annotated[
        bool, typer.Option("--all", help="Also the newest checkpoints, without which no step goes on or grows.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Delete without a question; else a terminal asks, and a pipe only says.")
    ] = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Free what runs can do without: older checkpoints, tokens, leftovers; never a model, never of a run in use.

    rlhf-chat clean runs/demo

    rlhf-chat clean runs --all --yes
    """
    from applications.clean import clean_command

    clean_command(runs, all_, yes, trust)


data_app = typer.Typer(
    cls=Group,
    help="Look at data before anything is trained on it (docs/data.md).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
DataTarget = Annotated[
    str, typer.Argument(metavar="DATA|RUN", help="Data (a file, directory, hub id, chitchat), or a run directory.")
]


@data_app.command("show", cls=Command)
def data_show(
    target: DataTarget,
    model: Model = None,
    kind: Annotated[
        str | None, typer.Option(metavar="KIND", help="Only sft, pairs or prompts. Default: all three.")
    ] = None,
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="How many rows of each kind.")] = 3,
    set_: Set = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Rows as the model sees them: its template, special tokens and cuts, with the trained tokens in colour.

    rlhf-chat data show mine.jsonl --model smollm2-135m

    rlhf-chat data show runs/demo --kind pairs --rows 10
    """
    from applications.data import show_command

    show_command(target, model, kind, rows, set_, trust)


@data_app.command("lint", cls=Command)
def data_lint(
    target: DataTarget,
    model: Model = None,
    json_: Json = False,
    set_: Set = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """What is doubtful about data: bad rows, duplicates, length bias, cuts, the tokenizer. Exit code 1 for errors.

    rlhf-chat data lint mine.jsonl --model opt-125m

    rlhf-chat data lint Dahoas/rm-static --model opt-125m --set data.limit=5000 --json
    """
    from applications.data import lint_command

    raise typer.Exit(lint_command(target, model, json_, set_, trust))
