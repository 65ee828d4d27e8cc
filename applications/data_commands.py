"""`rlhf-chat data show` and `rlhf-chat data lint`."""

from typing import Annotated

import typer

from applications.command_line import Command, Debug, Group, Json, Model, Set, Trust

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
