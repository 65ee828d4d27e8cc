"""A script does not outlive the process that started it, and does not end with the terminal that shows it."""

import os
import signal
import threading
import time

from inference.streams import guard_output

PARENT_VARIABLE = "RLHF_CHAT_PARENT"


def begin_script(poll_seconds: float = 0.5) -> None:
    """Guard the output, and end this process soon after the launcher or the command that started it is gone.

    Called before any heavy import. A thread, not a signal: kill -9 leaves no handler to run, and polling works on
    every Unix. `os._exit` because a rank may be blocked in a collective that will never finish. A script started by
    hand goes on without its shell.
    """
    from training.launchers import started_by  # which imports this module

    outlive_terminal()
    parent = os.getppid()
    command = int(os.environ.get(PARENT_VARIABLE, 0))
    if not command and "LOCAL_RANK" not in os.environ and started_by() is None:
        return

    def watch() -> None:
        while True:
            if os.getppid() != parent or (command and not is_alive(command)):
                os._exit(70)
            time.sleep(poll_seconds)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def outlive_terminal() -> None:
    """Training goes on where the connection of who started it is lost, or the reader of its output gone."""
    guard_output()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True
