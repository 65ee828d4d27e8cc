"""Those commands of `rlhf-chat` that live with many runs: `runs`, `compare`, `clean`."""

from pathlib import Path
from typing import Annotated

import typer

from applications.command_line import Debug, Json, Trust


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
