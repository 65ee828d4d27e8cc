"""Files that a process on another node has written: a shared file system may show them late."""

import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from inference.errors import UserError

PATIENCE = 120.0
"""Seconds; NFS keeps for up to 60 that a file is not there."""


def wait_until_seen(path: Path, seconds: float = PATIENCE) -> None:
    """Return once `path` is there. Raises UserError after so many seconds."""
    ends, pause = time.monotonic() + seconds, 0.01
    while not path.exists():
        if time.monotonic() > ends:
            raise UserError(
                f"{socket.gethostname()} does not see {path}, which the first process sees: the run directory must lie "
                f"on a file system that all nodes share."
            )
        with suppress(OSError):
            os.listdir(path.parent)  # makes a client of NFS ask anew
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
