"""The options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str | None, typer.Option(help="A preset (opt-13b, smollm2-135m, tiny, ...), hub id or directory.")]
RewardModel = Annotated[str | None, typer.Option(help="Reward model and critic; default: the preset's, or --model.")]
Data = Annotated[
    list[str] | None,
    typer.Option(help="Your data: a file, directory or hub id; several are blended, =2 is a weight (docs/data.md)."),
]
Config = Annotated[list[Path] | None, typer.Option(help="YAML file with settings; may be given several times.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="One setting, e.g. --set rlhf.kl.target=4.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Processes = Annotated[int | None, typer.Option(help="Processes on this machine, one a GPU.")]
Fusion = Annotated[str | None, typer.Option(help="PPO scores samples as they end: none, inter or auto.")]
RunPath = Annotated[Path, typer.Argument(help="A run directory, e.g. runs/demo.")]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Yes to code and addresses in the settings of a run from elsewhere (docs/safety.md)."),
]
Debug = Annotated[bool, typer.Option(help="Show the traceback of an error.")]
