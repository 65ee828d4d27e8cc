"""The options that several commands have."""

import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from training.steps import METHODS

Model = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The pretrained model to begin with: a preset (tiny, smollm2-135m, opt-1.3b, ...), a model of the "
        "Hugging Face hub (owner/name) or a directory. Default: the run's own.",
    ),
]
From = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="RUN",
        help="Instead of --model: begin as RUN did, and train only what other settings, data or seeds change "
        "(docs/runs.md). Default: none.",
    ),
]
GoOn = Annotated[
    bool | None,
    typer.Option(
        "--go-on/--fork",
        help="With --from: go on from RUN's newest model, on --data or on the preferences collected for it "
        "(docs/preferences.md); or fork RUN. Default: go on with new preferences alone, else fork.",
    ),
]
Name = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The run is runs/NAME, or a path with a / in it; default: MODEL's name, or after --from RUN RUN-fork, or "
        "with --go-on RUN-round2, RUN-round3 ...",
    ),
]
FOLLOWS = " or ".join(
    f"{method} ({', then '.join(step.title for step in steps[1:])})" for method, steps in METHODS.items()
)
Method = Annotated[
    str | None, typer.Option(metavar="METHOD", help=f"What follows step 1: {FOLLOWS}. Default: ppo, or the run's.")
]
RewardModel = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="What step 2 makes the reward model of, and PPO's critic starts as. Default: the preset's choice, else "
        "the same as --model.",
    ),
]
SFTModel = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="A finished SFT model, instead of step 1. Default: the run's own."),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SOURCE",
        help="Your data (docs/data.md): a file, a directory, or a data set of the hub (owner/name). Several are mixed, "
        "SOURCE=2 counts twice. Default: chitchat, dialogues that come with rlhf-chat.",
    ),
]
EvalData = Annotated[
    list[str] | None,
    typer.Option(
        "--eval-data",
        metavar="SOURCE",
        help="Data for evaluation alone, given as --data is; no question of it is trained on. Default: a share of the "
        "data is held out.",
    ),
]
Config = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="A YAML file with settings; of several, the later one wins. Default: none."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="One setting, such as --set sft.epochs=2; may be given several times. docs/configuration.md lists all, "
        "with their defaults.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Where all random numbers start: the same seed gives the same run. Default: 1, or the run's."
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(metavar="N", help="Processes that train together on this machine, one a GPU. Default: 1."),
]
PlanFile = Annotated[
    str | None,
    typer.Option(
        "--plan",
        metavar="FILE|auto",
        help="Where step 3 runs each call, as `plan --out` writes it; auto searches the best plan for this machine. "
        "Default: all ranks run all.",
    ),
]
Fusion = Annotated[
    str | None,
    typer.Option(
        metavar="MODE",
        help="Only changes PPO's speed, with several processes: inter scores finished answers while others are still "
        "being written, intra weaves the training of actor and critic where a plan has both in stages, both does "
        "both, none neither, auto takes the faster ways. Default: auto.",
    ),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/demo.")]
Json = Annotated[bool, typer.Option("--json", help="Print everything as JSON, for programs.")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Yes to the code and addresses that a run from elsewhere names, so that nobody asks (docs/safety.md).",
    ),
]
Debug = Annotated[
    bool, typer.Option("--debug", help="On an error also print where in the code it arose, for a bug report.")
]


RENAMED = {"rlhf": {"--actor": "--sft-model", "--reward": "--reward-model"}, "export": {"--to": "--out"}}
"""Command -> its options' old names, which are read for one more version."""
COUNTS = {"samples": {"--worst", "--best", "--longest"}}
"""Command -> its options whose number may be left out."""
USUAL_COUNT = "5"


HYPHEN = "\u2011"
"""Stands for one while lines are broken, which would cut `--dry-run` in two."""


def whole_words(page: Any) -> Any:
    """The page as wide as the terminal; a name that takes more than a third of it stands over what is said of it."""
    page.width = max(min(shutil.get_terminal_size().columns, 100) - 1, 30)
    write_dl, write_text, getvalue = page.write_dl, page.write_text, page.getvalue
    page.write_dl = lambda rows: write_dl([(name, unbroken(said)) for name, said in rows], col_max=page.width // 3)
    page.write_text = lambda text: write_text(unbroken(text))
    page.getvalue = lambda: getvalue().replace(HYPHEN, "-")
    return page


def unbroken(text: str) -> str:
    return text.replace("-", HYPHEN)


class Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = [self.present_name(argument) for argument in args]
        counts = COUNTS.get(self.name or "", set())
        for index in reversed([index for index, argument in enumerate(given) if argument in counts]):
            if not "".join(given[index + 1 : index + 2]).isdigit():
                given.insert(index + 1, USUAL_COUNT)
        return super().parse_args(ctx, given)

    def present_name(self, argument: str) -> str:
        """The argument, or the option's name of today, with a note."""
        option, equals, value = argument.partition("=")
        new = RENAMED.get(self.name or "", {}).get(option)
        if new is None:
            return argument
        print(f"rlhf-chat: {option} is called {new} now; the next version will not know the old name.", file=sys.stderr)
        return new + equals + value

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, whole_words(formatter))


class Group(TyperGroup):
    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, whole_words(formatter))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Each with the first paragraph of its own page."""
        with formatter.section("Commands"):
            rows = [(name, (command.help or "").split("\n\n")[0]) for name, command in self.commands.items()]
            formatter.write_dl(rows)
