"""Those commands of `rlhf-chat` that live with many runs: `runs`, `compare`."""

from pathlib import Path
from typing import Annotated

import typer

from applications.options import Debug, Json, Trust


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


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, or directories of runs.")],
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
