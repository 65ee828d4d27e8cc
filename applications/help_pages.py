"""How the commands' help pages look, and options under the names that they had before."""

import shutil
import sys
from typing import Any

from typer.core import TyperCommand, TyperGroup

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
        for place in reversed([place for place, argument in enumerate(given) if argument in counts]):
            if not "".join(given[place + 1 : place + 2]).isdigit():
                given.insert(place + 1, USUAL_COUNT)
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
            formatter.write_dl([(name, (each.help or "").split("\n\n")[0]) for name, each in self.commands.items()])
