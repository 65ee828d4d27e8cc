"""How a stage ends without success. SIGTERM, as schedulers send it before they kill: a sentence at once, a checkpoint
within the grace, then the end."""

import math
import os
import signal
import sys
import threading
from collections.abc import Callable

from inference.errors import UserError
from training.launchers import PARENT_VARIABLE, started_by

EXIT_TERMINATED = 128 + signal.SIGTERM
GRACE_VARIABLE = "RLHF_CHAT_GRACE"
GRACE = 25.0  # seconds; Slurm and Kubernetes wait for 30 until they kill


class StageFailed(Exception):
    """A stage ended without success and the user's input is not to blame: it was killed, or the run diverged."""


class Terminated(BaseException):
    """SIGTERM has ended the work; the sentence says from where it goes on. Nothing that catches errors catches it."""


def grace() -> float:
    """Return the seconds from SIGTERM to the end. Raises UserError where the variable holds no such number."""
    text = os.environ.get(GRACE_VARIABLE) or str(GRACE)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(f"{GRACE_VARIABLE}={text} must be seconds, as in {GRACE_VARIABLE}=25.")
    return seconds


class Termination:
    """What this process does about SIGTERM. A thread answers, as the main one may be inside of a long operation."""

    def __init__(self) -> None:
        self.is_asked = False
        self.unit = ""
        """What a checkpoint follows the end of, once there is such a thing: an optimiser step, an iteration."""
        self.newest: Callable[[], str] = lambda: "the same command goes on"
        self.report: Callable[[str], object] = say

    def answer(self) -> None:
        """Begin to answer; called in the main thread, before any heavy import."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        threading.Thread(target=self._listen, args=(reader,), name="sigterm", daemon=True).start()

    def _listen(self, reader: int) -> None:
        while signal.SIGTERM not in os.read(reader, 64):
            pass
        self.is_asked, seconds = True, grace()
        if self.unit and seconds:
            say(f"SIGTERM: a checkpoint follows if the {self.unit} that runs now ends within {seconds:g} s.")
            threading.Event().wait(seconds)
            self._end(f"the {self.unit} took longer than {seconds:g} s, and ")
        else:
            self._end("")

    def _end(self, why: str) -> None:
        self.report(f"Ended by SIGTERM: {why}{self.newest()}.")
        sys.stdout.flush()
        os._exit(EXIT_TERMINATED)


def say(sentence: str) -> None:
    """Print to stderr once: the command does where there is one, else the first rank."""
    _, values = started_by() or ("", {})
    if PARENT_VARIABLE not in os.environ and int({**values, **os.environ}.get("RANK", 0)) == 0:
        print(sentence, file=sys.stderr, flush=True)


TERMINATION = Termination()  # there is one in a process, as a signal has one handler
