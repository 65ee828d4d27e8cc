"""Those commands of `rlhf-chat` that live with many runs: `runs`."""

from pathlib import Path
from typing import Annotated

import typer

from applications.options import Debug, Json


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
