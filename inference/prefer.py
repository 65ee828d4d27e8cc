"""Two answers to one message, in the terminal or through a pipe, and what somebody thinks of them.

In a pipe the lines are a message and a preference in turn. An empty message takes the next suggestion.
"""

import os
import sys
import termios
import tty
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TextIO

from rich.live import Live

from inference.chat import arrange, check_settings, read_line, write
from inference.chat_model import ChatModel
from inference.chat_template import Message
from inference.console import PrintableConsole
from inference.errors import UserError
from inference.generation.sampler import SamplingSettings
from inference.preferences import EQUAL, Answer, BlindPair, Preference, PreferenceFile, Winner, blank_pairs
from inference.streams import unguarded

WINNERS_BY_KEY: dict[str, Winner] = {"1": "a", "2": "b", "=": "tie", "0": "both bad"}
KEYS = "1 or 2 is better, = about the same, 0 both bad, u undo, s skip, q quit"
SHOWN = {"1": "1", "2": "2", "=": "about the same", "0": "both bad", "u": "undo", "s": "skip", "q": "quit"}
"""What is shown when a key was pressed."""
COMMANDS = "/undo takes your newest preference back, /quit leaves (so does Ctrl-D)"
LABELS = ("1", "2")
CTRL_D = "\x04"

Show = Callable[[BlindPair], object]


class Interview:
    """A person who says messages and judges pairs; each preference is in the file when the next pair is shown."""

    def __init__(self, file: PreferenceFile, by: str, source: TextIO | None = None, sink: TextIO | None = None):
        """`source` and `sink` default to stdin and stdout."""
        self.file, self.by = file, by
        self.source, self.sink = source or sys.stdin, sink or sys.stdout
        if reconfigure := getattr(self.source, "reconfigure", None):
            reconfigure(errors="replace")  # bytes that are not text must not end it
        self.is_terminal = self.source.isatty() and self.sink.isatty()
        self.has_keys = self.is_terminal and self.source is sys.stdin and self.sink is sys.stdout
        self.console = PrintableConsole(file=self.sink, highlight=False)
        self.lines = 0  # read so far from a pipe
        self.collected = 0

    def collect(self, pairs: Iterable[BlindPair]) -> int:
        """Ask which of each two is better, until pairs, input or the person's patience end; how many were judged."""
        try:
            for pair in pairs:
                self.judge(pair)
        except (EOFError, KeyboardInterrupt):
            self.tell("")
        return self.collected

    def judge(self, pair: BlindPair) -> None:
        """Ask until there is a preference; one that is taken back is asked for again, before this one.

        Raises EOFError where the person quits or the input ends.
        """
        waiting = [pair]
        while waiting:
            self.show(waiting[-1])
            key = self.read_key()
            if key == "q":
                raise EOFError
            if key == "u":
                waiting += self.taken_back()
                continue
            if key in WINNERS_BY_KEY:
                try:
                    self.file.add(waiting[-1].judged(WINNERS_BY_KEY[key], self.by))
                except UserError as error:
                    self.refused(error)
                    continue
                self.collected += 1
            waiting.pop()
            if waiting:
                self.show_prompt(waiting[-1].prompt)

    def taken_back(self) -> list[BlindPair]:
        """The pair of the person's newest preference, which is gone from the file; none where there is none."""
        try:
            undone = self.file.undo(self.by)
        except UserError as error:
            self.refused(error)
            return []
        if undone is None:
            self.tell("There is nothing to take back.")
            return []
        self.collected -= 1
        self.show_prompt(undone.prompt)
        return [BlindPair.again(undone)]

    def say(self) -> str | None:
        """The next message; None at the end."""
        if self.is_terminal:
            return read_line(self.source, self.sink)
        self.lines += 1
        line = self.source.readline()
        return line.strip() if line else None

    def read_key(self) -> str:
        """One of SHOWN's keys. Raises EOFError at the end of the input, and in a pipe UserError for another line."""
        while True:
            with single_keys(self.source) if self.has_keys else nullcontext(self.source.readline) as read:
                if self.is_terminal:
                    write(self.sink, f"{KEYS}: ")
                key = read()
            self.lines += 1
            if key in ("", CTRL_D):
                raise EOFError
            key = key.strip().lower()
            if self.has_keys:
                write(self.sink, f"{SHOWN.get(key, '')}\n")
            if key in SHOWN:
                return key
            if not self.is_terminal:
                raise UserError(f"Line {self.lines} of the input is {key[:20]!a} and no preference: {KEYS}.")

    @contextmanager
    def watching(self) -> Iterator[Show]:
        """Inside, answers are shown as they grow."""
        if not self.is_terminal:
            yield lambda pair: None
            return
        with Live(console=self.console, transient=True) as live:
            yield lambda pair: live.update(arrange(LABELS, texts(pair), self.console.width))

    def show(self, pair: BlindPair) -> None:
        if self.is_terminal:
            self.console.print(arrange(LABELS, texts(pair), self.console.width))
        else:
            sink = unguarded(self.sink)
            sink.writelines(f"{label}: {text}\n" for label, text in zip(LABELS, texts(pair), strict=True))
            sink.flush()

    def show_prompt(self, prompt: Sequence[Message]) -> None:
        for message in prompt:
            write(self.sink, f"{message['role']}: {message['content']}\n")

    def refused(self, error: UserError) -> None:
        """Say why in a terminal, where the person goes on; raise it in a pipe."""
        if not self.is_terminal:
            raise error
        self.tell(str(error))

    def tell(self, sentence: str) -> None:
        if self.is_terminal:
            write(self.sink, f"{sentence}\n")
        elif sentence:
            print(sentence, file=sys.stderr)


@contextmanager
def single_keys(terminal: TextIO) -> Iterator[Callable[[], str]]:
    """Inside, what is yielded waits for the next key. Keys that were pressed before count for nothing."""
    descriptor = terminal.fileno()
    settings = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield lambda: os.read(descriptor, 32).decode(errors="replace")
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, settings)


def texts(pair: BlindPair) -> tuple[str, str]:
    return pair.left.text, pair.right.text


class ModelPair:
    """Two models, or one twice, under the labels that go into the file."""

    def __init__(self, models: Sequence[tuple[str, ChatModel]], settings: SamplingSettings):
        check_settings(settings)
        self.labels, self.models, self.settings = [label for label, _ in models], dict(models), settings

    def pair(self, prompt: list[Message], show: Show = lambda pair: None) -> BlindPair:
        """`show` gets the pair as it grows. Raises UserError where the answers are equal each time."""
        for pair in blank_pairs(prompt, self.labels, self.settings.temperature, self.settings.max_tokens):
            for answer in self.growing(prompt, pair.left):
                pair = replace(pair, left=answer)
                show(pair)
            for answer in self.growing(prompt, pair.right):
                pair = replace(pair, right=answer)
                show(pair)
            if not pair.teaches_nothing:
                return pair
        raise UserError(EQUAL)

    def growing(self, prompt: list[Message], answer: Answer) -> Iterator[Answer]:
        for piece in self.models[answer.model].reply(prompt, self.settings, answer.seed, 0):
            answer = replace(answer, text=answer.text + piece)
            yield answer


def drawn(interview: Interview, models: ModelPair, suggestions: Iterator[list[Message]]) -> Iterator[BlindPair]:
    """Answers to what the person says, or to the next suggestion. In a pipe raises UserError where none is left, and
    where the answers are always equal; in a terminal that is said."""
    while (text := interview.say()) is not None:
        if interview.is_terminal and text in ("/quit", "/exit"):
            return
        if interview.is_terminal and text == "/undo":
            yield from interview.taken_back()
            continue
        try:
            if interview.is_terminal and text.startswith("/"):
                raise UserError(f"There is no command {text.split()[0]}; {COMMANDS}.")
            prompt = [Message(role="user", content=text)] if text else next(suggestions, None)
            if prompt is None:
                raise UserError("There is no message left to suggest: type one.")
            if not text:
                interview.show_prompt(prompt)
            with interview.watching() as show:
                pair = models.pair(prompt, show)
        except KeyboardInterrupt:
            interview.tell("(stopped)")
        except UserError as error:
            interview.refused(error)
        else:
            yield pair


def again(interview: Interview, before: Iterable[Preference]) -> Iterator[BlindPair]:
    """The same answers once more, their sides drawn again."""
    for preference in before:
        interview.show_prompt(preference.prompt)
        yield BlindPair.again(preference, redrawn=True)
