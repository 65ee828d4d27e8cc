"""What people prefer: two answers whose sides are drawn at random, and the file of preferences, which loses none."""

import errno
import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from inference.chat_template import Message
from inference.disk import hold_lock, write_text, writing
from inference.errors import UserError
from inference.streams import printable, to_stderr

Winner = Literal["a", "b", "tie", "both bad"]
WINNERS: tuple[Winner, ...] = get_args(Winner)
DRAWS = 3
"""Two answers that are equal are drawn again, this many times in all."""
EQUAL = f"Both answers were the same, or one was empty, {DRAWS} times: say something else."
LONGEST_NAME = 80
LOCK_SECONDS = 30.0


@with_config(ConfigDict(strict=True))
@dataclass(frozen=True)
class Preference:
    """One person's preference between two answers to one message; `a` was shown first or left, `b` second or right."""

    id: str
    time: str
    """UTC, as in 2026-01-31T12:00:00.000Z."""
    by: str
    prompt: list[Message]
    response_a: str
    response_b: str
    winner: Winner
    model_a: str
    """`RUN/step` as in `demo/rlhf`, or the name of a model directory."""
    model_b: str
    seed_a: int
    seed_b: int
    temperature: float
    max_tokens: int

    @classmethod
    def of(cls, line: str) -> "Preference":
        """Fields that are not known are left out. Raises ValueError with the reason where it is no preference."""
        try:
            return _reader().validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field_name = ".".join(map(str, first["loc"]))
            raise ValueError(f"{field_name}: {first['msg']}" if field_name else first["msg"]) from None

    @property
    def pair(self) -> Hashable:
        """The two answers to the message, whichever side each stood on."""
        return _judged_on(self.prompt, self.response_a, self.response_b)

    @property
    def line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


def _judged_on(prompt: list[Message], *texts: str) -> Hashable:
    return tuple((message["role"], message["content"]) for message in prompt), *sorted(texts)


@cache
def _reader() -> TypeAdapter[Preference]:
    return TypeAdapter(Preference)


@dataclass(frozen=True)
class Answer:
    model: str
    text: str
    seed: int


@dataclass(frozen=True)
class BlindPair:
    """Two answers to one message, to be shown without the names of their models."""

    prompt: list[Message]
    left: Answer
    """Shown left, or first: `a` of the preference."""
    right: Answer
    temperature: float
    max_tokens: int
    id: str = field(default_factory=lambda: secrets.token_hex(8))

    @classmethod
    def of(cls, prompt: list[Message], one: Answer, other: Answer, temperature: float, max_tokens: int) -> "BlindPair":
        """The side of each is drawn at random."""
        left, right = (one, other) if secrets.randbelow(2) else (other, one)
        return cls(prompt, left, right, temperature, max_tokens)

    @classmethod
    def again(cls, preference: Preference, redrawn: bool = False) -> "BlindPair":
        """What was judged, on the same sides, or on sides that are drawn again for another person."""
        left = Answer(preference.model_a, preference.response_a, preference.seed_a)
        right = Answer(preference.model_b, preference.response_b, preference.seed_b)
        make = cls.of if redrawn else cls
        return make(preference.prompt, left, right, preference.temperature, preference.max_tokens)

    @property
    def pair(self) -> Hashable:
        """Equals that of each preference between the two."""
        return _judged_on(self.prompt, self.left.text, self.right.text)

    @property
    def teaches_nothing(self) -> bool:
        """Nobody can say which of the two is better, or one of them is empty."""
        texts = {self.left.text.strip(), self.right.text.strip()}
        return len(texts) < 2 or "" in texts

    def judged(self, winner: Winner, by: str) -> Preference:
        """The preference of a person, now. Raises UserError for a name that cannot be."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        left, right = self.left, self.right
        return Preference(
            self.id,
            now,
            checked_name(by),
            self.prompt,
            left.text,
            right.text,
            winner,
            left.model,
            right.model,
            left.seed,
            right.seed,
            self.temperature,
            self.max_tokens,
        )


def blank_pairs(
    prompt: list[Message], models: Sequence[str], temperature: float, max_tokens: int
) -> Iterator[BlindPair]:
    """Pairs without texts, to be answered one after the other until two answers differ; sides and seeds are drawn.

    `models` has the labels of both.
    """
    for _ in range(DRAWS):
        one, other = (Answer(model, "", new_seed()) for model in models)
        yield BlindPair.of(prompt, one, other, temperature, max_tokens)


def new_seed() -> int:
    return secrets.randbelow(10**9)  # small enough to be copied by hand


def checked_name(name: str) -> str:
    """A person's name in one line, without blanks around it. Raises UserError where it is none."""
    name = " ".join(name.split())
    if not name or len(name) > LONGEST_NAME or printable(name) != name:
        raise UserError(f"Say who judges: a name of 1 to {LONGEST_NAME} characters that can be printed.")
    return name


def unjudged(known: Sequence[Preference], by: str, other: str | None = None) -> list[Preference]:
    """The newest preference of `other`, or of anybody else, on each pair that a person has not judged; of their own, on
    each that they have judged once."""
    theirs = {given.pair: given for given in known if (given.by != by if other is None else given.by == other)}
    own = Counter(given.pair for given in known if given.by == by)
    return [preference for pair, preference in theirs.items() if own[pair] <= (by == other)]


class PreferenceFile:
    """JSON lines, one a preference, that any number of threads and processes may write at the same time."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, preference: Preference) -> None:
        """Return when it is on the disk. The file appears with the first one.

        Raises UserError where the disk refuses or the file is of another kind; what was there stays.
        """
        line = (preference.line + "\n").encode(errors="replace")  # half of a surrogate pair is no character
        with self._locked() as path:
            self.require_own()
            is_new = not path.exists()
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                end = self._heal(file)
                try:
                    if os.write(file, line) < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(file)
                except OSError:
                    with suppress(OSError):
                        os.ftruncate(file, end)
                    raise
            finally:
                os.close(file)
            if is_new:
                directory = os.open(path.parent, os.O_RDONLY)
                try:
                    os.fsync(directory)  # brings the new name to the disk
                finally:
                    os.close(directory)

    def undo(self, by: str) -> Preference | None:
        """Take away the newest preference of a person and return it; None where there is none.

        Raises UserError where the disk refuses or the file is damaged.
        """
        by = checked_name(by)
        with self._locked() as path:
            lines = list(self._lines())
            newest = next((index for index in reversed(range(len(lines))) if lines[index][1].by == by), None)
            if newest is None:
                return None
            _, preference = lines.pop(newest)
            write_text(path, "".join(f"{line}\n" for line, _ in lines), keeps_rights=True)
            return preference

    def read(self) -> list[Preference]:
        """All preferences in their order; a last line that was cut off is not one.

        Raises UserError with the number of a line that is damaged.
        """
        return [preference for _, preference in self._lines()]

    def read_or_say(self, say: Callable[[str], object] = to_stderr) -> list[Preference]:
        """All; none where the file is damaged, which is said: who does more than collect goes on without."""
        try:
            return self.read()
        except UserError as error:
            say(f"Warning: {error} Until then no preference of it counts here.")
            return []

    def require_own(self) -> None:
        """Raise UserError where what is there begins with something other than a preference."""
        next(self._lines(), None)

    def _lines(self) -> Iterator[tuple[str, Preference]]:
        """Each line as it stands there, without its end."""
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.strip() or (not line.endswith(b"\n") and _is_cut(line)):
                        continue
                    try:
                        text = line.removesuffix(b"\n").decode()
                        preference = Preference.of(text)
                    except ValueError as error:
                        raise UserError(
                            f"{self.path} is no file of preferences (line 1: {error}); choose another file, or mend "
                            "that line."
                            if number == 1
                            else f"{self.path}, line {number}, is no preference ({error}); mend that line or delete it."
                        ) from None
                    yield text, preference
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror}); set that right.") from error

    @contextmanager
    def _locked(self) -> Iterator[Path]:
        """Yields the file itself where `path` is a link."""
        file = Path(os.path.realpath(self.path))
        lock = file.with_name(f".{file.name}.lock")
        busy = f"{self.path} is being written by another process"
        with (
            writing("the preference", self.path, "then judge it again"),
            hold_lock(lock, busy, LOCK_SECONDS, again_seconds=0.002),
        ):
            yield file

    def _heal(self, file: int) -> int:
        """Cut off what a kill or a full disk left of a last line, or end it if it is whole; returns the file's size.

        Raises UserError where the last line is neither.
        """
        size = os.lseek(file, 0, os.SEEK_END)
        start = size
        while start and b"\n" not in (tail := os.pread(file, size, start := max(0, start - 2**16))):
            pass
        if not size or (last := tail.rpartition(b"\n")[2]) == b"":
            return size
        if _is_cut(last):
            os.ftruncate(file, size - len(last))
            return size - len(last)
        try:
            Preference.of(last.decode())
        except ValueError as error:
            raise UserError(
                f"The last line of {self.path} is no preference, nor the beginning of one ({error}); mend it, delete "
                "it, or choose another file."
            ) from None
        os.write(file, b"\n")
        return size + 1


def _is_cut(last: bytes) -> bool:
    """Whether a last line is the beginning of one of ours, or the zeros that a crash of the machine leaves."""
    text = last.rstrip(b"\0")
    match = re.match(rb'\{"id": "([^"]*)', text)
    begins = b'{"id": "' + (match[1] if match else b"") + b'", "time": "'
    if not begins.startswith(text) and not text.startswith(begins):
        return False
    try:
        json.loads(text)
    except ValueError:
        return True
    return False
