"""A rank does not outlive the process that started it."""

import os
import threading
import time

PARENT_VARIABLE = "RLHF_CHAT_PARENT"


def end_with_parent(poll_seconds: float = 0.5) -> None:
    """End this process soon after its parent, or the command that started the run, is gone.

    Called before any heavy import. A thread, not a signal: kill -9 leaves no handler to run, and polling works on
    every Unix. `os._exit` because a rank may be blocked in a collective that will never finish.
    """
    parent = os.getppid()
    command = int(os.environ.get(PARENT_VARIABLE, 0))

    def watch() -> None:
        while True:
            if os.getppid() != parent or (command and not is_alive(command)):
                os._exit(70)
            time.sleep(poll_seconds)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True
