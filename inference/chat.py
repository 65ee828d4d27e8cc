"""Talking in the terminal, or through a pipe: each line is a turn, each answer is written as it is drawn.

In a pipe nothing but the answers goes to the output. Two models answer the same turns, each with its own history.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import zip_longest
from math import inf
from typing import TextIO, get_type_hints

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from inference.chat_model import ChatModel
from inference.chat_template import Message
from inference.console import PrintableConsole
from inference.errors import UserError
from inference.generation.sampler import SamplingSettings
from inference.streams import printable, unguarded

HELP = """\
/reset               forget the conversation
/retry               draw the last answer again
/system TEXT         set the system message and start over (without TEXT: no system message)
/set NAME=VALUE ...  change temperature, top_p, top_k, max_tokens or min_tokens (without arguments: show them)
/quit                leave (so does Ctrl-D)
"""
COLUMN_WIDTH = 40
"""Answers stand side by side where each gets at least this many characters."""


def chat(
    models: list[tuple[str, ChatModel]],
    settings: SamplingSettings,
    seed: int,
    system: str | None = None,
    source: TextIO | None = None,
    sink: TextIO | None = None,
) -> None:
    """Talk until the input ends. `models` are labels and models; `source` and `sink` default to stdin and stdout.

    Raises UserError for settings that cannot be, and in a pipe for a conversation that the chat template refuses.
    """
    check_settings(settings)
    source, sink = source or sys.stdin, sink or sys.stdout
    if reconfigure := getattr(source, "reconfigure", None):
        reconfigure(errors="replace")  # bytes that are not text must not end the chat
    session = Session(models, settings, seed, system)
    try:
        if source.isatty() and sink.isatty():
            Terminal(session, source, sink).run()
        else:
            answer_lines(session, source, sink)
    except KeyboardInterrupt:
        pass


class Session:
    """The conversation with each model, and all that decides the next answer."""

    def __init__(
        self, models: list[tuple[str, ChatModel]], settings: SamplingSettings, seed: int, system: str | None = None
    ):
        self.labels = [label for label, _ in models]
        self.models = [model for _, model in models]
        self.settings = settings
        self.seed = seed
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Forget the conversation; the same turns then get the same answers again."""
        start: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        self.histories: list[list[Message]] = [list(start) for _ in self.models]
        self.turn = 0
        """Answers drawn so far, retries included."""
        self.news: list[str] = []
        """Says what the newest answer's prompts leave out of the conversation, unless the answer before did."""
        self._notes = [""]

    def answer(self, text: str) -> Iterator[list[str]]:
        """Yield the next piece of each model's answer ("" from one that has ended) until all have ended.

        The histories grow with the pieces, so an interrupted answer stays as far as it came.
        """
        asked: list[list[Message]] = [[*history, {"role": "user", "content": text}] for history in self.histories]
        notes = [model.prompt(messages, self.settings).note for model, messages in zip(self.models, asked, strict=True)]
        self.news, self._notes = list(dict.fromkeys(note for note in notes if note not in self._notes)), ["", *notes]
        streams = [
            model.reply(messages, self.settings, self.seed, self.turn)
            for model, messages in zip(self.models, asked, strict=True)
        ]
        self.turn += 1
        answers: list[Message] = [{"role": "assistant", "content": ""} for _ in self.models]
        for pieces in zip_longest(*streams, fillvalue=""):
            for answer, piece in zip(answers, pieces, strict=True):
                answer["content"] += piece
            self.histories = [[*messages, answer] for messages, answer in zip(asked, answers, strict=True)]
            yield list(pieces)
        self.histories = [[*messages, answer] for messages, answer in zip(asked, answers, strict=True)]

    @property
    def last_answers(self) -> list[tuple[str, str]]:
        """Label and text of each model's newest answer."""
        return [(label, history[-1]["content"]) for label, history in zip(self.labels, self.histories, strict=True)]

    def take_back(self) -> str | None:
        """Remove the last turn and return what the user said in it; None where there is none."""
        if not any(message["role"] == "user" for message in self.histories[0]):
            return None
        text = self.histories[0][-2]["content"]
        self.histories = [history[:-2] for history in self.histories]
        return text


def answer_lines(session: Session, source: TextIO, sink: TextIO) -> None:
    """Each line of `source` is a turn; only the answers are written, with their labels if there are several.

    What is no terminal gets each character of them.
    """
    sink = sink if sink.isatty() else unguarded(sink)
    for line in source:
        if not (text := line.strip()):
            continue
        if len(session.models) == 1:
            for (piece,) in session.answer(text):
                sink.write(piece)
                sink.flush()
            sink.write("\n")
        else:
            for _ in session.answer(text):
                pass
            sink.writelines(f"{label}: {answer}\n" for label, answer in session.last_answers)
        sink.flush()
        for note in session.news:
            print(note, file=sys.stderr)


class Terminal:
    """The interactive loop: a prompt, commands, answers as they are drawn."""

    def __init__(self, session: Session, source: TextIO, sink: TextIO):
        self.session = session
        self.source = source
        self.sink = sink
        self.console = PrintableConsole(file=sink, highlight=False)

    def run(self) -> None:
        labels = zip(self.session.labels, self.session.models, strict=True)
        self.write("Talking to " + " and ".join(f"{label} ({model.description})" for label, model in labels) + "\n")
        self.write("/quit or Ctrl-D ends the chat, Ctrl-C stops an answer, /help lists the commands.\n")
        while (line := read_line(self.source, self.sink)) is not None:
            try:
                if line in ("/quit", "/exit"):
                    return
                if line.startswith("/"):
                    self.obey(line)
                elif line:
                    self.show_answer(line)
            except UserError as error:
                self.write(f"{error}\n")

    def obey(self, line: str) -> None:
        """Carry out a command. Raises UserError for one that does not exist or has a wrong value."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        match name:
            case "/help":
                self.write(HELP)
            case "/reset":
                self.session.reset()
                self.write("The conversation is forgotten.\n")
            case "/retry":
                text = self.session.take_back()
                if text is None:
                    raise UserError("There is no answer to draw again yet; say something first.")
                self.show_answer(text)
            case "/system":
                self.session.system = argument or None
                self.session.reset()
                self.write(f"The {'system message is set' if argument else 'system message is gone'}; starting over.\n")
            case "/set":
                self.session.settings = change_settings(self.session.settings, argument)
                values = asdict(self.session.settings)
                self.write(" ".join(f"{key}={value}" for key, value in values.items()) + "\n")
            case _:
                raise UserError(f"There is no command {name}; /help lists the commands.")

    def show_answer(self, text: str) -> None:
        """Show the answer, or those of all models together; Ctrl-C stops it, and what has come stays."""
        show: Callable[[str], None] = self._show_one if len(self.session.models) == 1 else self._show_all
        try:
            show(text)
        except KeyboardInterrupt:
            self.write("\n(stopped)\n")
        for note in self.session.news:
            self.write(f"({note})\n")

    def _show_one(self, text: str) -> None:
        for (piece,) in self.session.answer(text):
            self.write(piece)
        self.write("\n")

    def _show_all(self, text: str) -> None:
        answers = [""] * len(self.session.models)
        try:
            with Live(console=self.console, transient=True) as live:  # cuts what is higher than the window,
                for pieces in self.session.answer(text):
                    answers = [answer + piece for answer, piece in zip(answers, pieces, strict=True)]
                    live.update(arrange(self.session.labels, answers, self.console.width))
        finally:
            if any(answers):  # so the whole comes at the end
                self.console.print(arrange(self.session.labels, answers, self.console.width))

    def write(self, text: str) -> None:
        write(self.sink, text)


def arrange(labels: Sequence[str], answers: Sequence[str], width: int) -> RenderableType:
    """Answers under their labels: in columns if the terminal is wide enough, else one under the other."""
    if width < COLUMN_WIDTH * len(labels):
        return Group(*(Text(f"{label}\n{answer}\n") for label, answer in zip(labels, answers, strict=True)))
    table = Table(expand=True, show_edge=False)
    for label in labels:
        table.add_column(Text(label), ratio=1)
    table.add_row(*(Text(answer) for answer in answers))
    return table


def read_line(source: TextIO, sink: TextIO) -> str | None:
    """What was typed, without blanks around it; None at Ctrl-D or Ctrl-C."""
    try:
        if source is sys.stdin and sink is sys.stdout:
            with suppress(ImportError):  # not on every system; with it input() edits lines and remembers them
                import readline  # noqa: F401
            return input("> ").strip()
        write(sink, "> ")
        if line := source.readline():
            return line.strip()
    except (KeyboardInterrupt, EOFError):
        pass
    write(sink, "\n")
    return None


def write(sink: TextIO, text: str) -> None:
    sink.write(printable(text))
    sink.flush()


def change_settings(settings: SamplingSettings, assignments: str) -> SamplingSettings:
    """`settings` with `temperature=0.7 top_k=5` laid over them. Raises UserError, and then nothing is changed."""
    kinds = get_type_hints(SamplingSettings)
    for assignment in assignments.split():
        name, equals, value = assignment.partition("=")
        if name not in kinds or not equals:
            raise UserError(f"/set takes NAME=VALUE with a NAME of {', '.join(kinds)}; not '{assignment}'.")
        try:
            settings = replace(settings, **{name: kinds[name](value)})
        except ValueError:
            kind = "a whole number" if kinds[name] is int else "a number"
            raise UserError(f"{name} takes {kind}, not '{value}'.") from None
    check_settings(settings)
    return settings


def check_settings(settings: SamplingSettings) -> None:
    """Raise UserError for a value that cannot be."""
    rules = {
        "max_tokens": (settings.max_tokens >= 1, "1 or more"),
        "temperature": (0 <= settings.temperature < inf, "0 (always the likeliest token) or more"),
        "top_p": (0 < settings.top_p <= 1, "more than 0 and at most 1 (off)"),
        "top_k": (settings.top_k >= 0, "0 (off) or more"),
        "min_tokens": (settings.min_tokens >= 0, "0 (off) or more"),
    }
    for name, (is_right, range_) in rules.items():
        if not is_right:
            raise UserError(f"{name} must be {range_}, not {getattr(settings, name)}.")
