"""The process of `rlhf-chat`: its output and signals, how it ends, and what an error prints."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from applications.cli import app
from inference.disk import file_sentence
from inference.errors import UserError
from inference.streams import guard_output, printable
from training.launchers import PARENT_VARIABLE, begin_script
from training.steps import STEPS
from training.termination import EXIT_TERMINATED, StageFailed, Terminated

EXIT_INTERRUPTED = 130


def main() -> None:
    """The console script: errors of the user become one sentence and exit code 2."""
    if PARENT_VARIABLE in os.environ:
        begin_script()
    guard_output(ends=True)
    if "--version" in sys.argv[1:]:
        print(f"rlhf-chat {version_with_commit()}")
        return
    before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        for argument in sys.argv:
            if not argument.isascii() and argument.encode(errors="replace").decode() != argument:
                raise UserError(f"'{argument}' is not UTF-8 text; where it names a file, give that another name.")
            if printable(argument) != argument:
                raise UserError(f"{argument!a} holds control characters; give it without them.")
        try:
            app()
        except SystemExit:
            sys.stdout.flush()  # here, where a full disk is a sentence
            raise
    except (UserError, StageFailed) as error:
        if "--debug" in sys.argv:
            raise
        print(f"rlhf-chat: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except OSError as error:
        sentence = file_sentence(error)
        if sentence is None or "--debug" in sys.argv:
            raise
        print(f"rlhf-chat: {sentence}", file=sys.stderr)
        sys.exit(2)
    except Terminated as terminated:
        print(f"rlhf-chat: {terminated}", file=sys.stderr)
        sys.exit(EXIT_TERMINATED)
    except SystemExit as ended:
        if ended.code == EXIT_INTERRUPTED:  # what typer makes of Ctrl-C
            trains = sys.argv[1:2] and sys.argv[1] in ("run", "prepare", *(step.command for step in STEPS))
            goes_on = "; the same command goes on" if trains else ""
            print(f"\nrlhf-chat: stopped{goes_on}.", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    """Once: what has begun to end is not told again."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated("Ended by SIGTERM.")


def version_with_commit() -> str:
    """The version, and where the code is a checkout its commit: `0.1.0+g0ac077a81234`, `.changed` if files differ."""
    from importlib.metadata import version

    from training.opening import checkout

    commit, changed = checkout(Path(__file__).parents[1] / "training")
    return version("rlhf-chat") + (f"+g{commit[:12]}" if commit else "") + (".changed" if changed else "")
