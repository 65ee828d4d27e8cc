"""Checkpoints that appear whole or not at all; the newest few are kept."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inference.errors import UserError
from training.distributed import Ranks
from training.run_directory import publish_directory, write_json

STATE_FILE = "state.json"


class Checkpoints:
    """The directory `checkpoints/` of one step."""

    def __init__(self, directory: Path, keep: int, ranks: Ranks):
        self.directory = directory
        self.keep = keep
        self.ranks = ranks

    def save(self, number: int, write: Callable[[Path], None], state: dict[str, Any]) -> None:
        """All ranks call `write(directory)`; then the checkpoint gets its name, and old ones go."""
        temporary = self.directory / f".{number}.tmp"
        if self.ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.ranks.barrier()
        write(temporary)
        self.ranks.barrier()
        if self.ranks.is_first:
            files = {str(f.relative_to(temporary)): f.stat().st_size for f in temporary.rglob("*") if f.is_file()}
            write_json(temporary / STATE_FILE, {**state, "number": number, "ranks": self.ranks.size, "files": files})
            publish_directory(temporary, self.directory / str(number))
            for old in self.numbers()[: -self.keep]:
                remove_directory(self.directory / str(old))
        self.ranks.barrier()

    def numbers(self) -> list[int]:
        """Numbers of the complete checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.directory.iterdir() if entry.name.isdigit())

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Directory and state of the newest checkpoint, its files checked; None where there is none."""
        numbers = self.numbers()
        if not numbers:
            return None
        directory = self.directory / str(numbers[-1])
        way_out = f"delete {directory} to go on from {'the one before' if len(numbers) > 1 else 'the start'}"
        try:
            state = json.loads((directory / STATE_FILE).read_text())
        except (OSError, ValueError):
            raise UserError(
                f"The checkpoint {directory} is damaged ({STATE_FILE} cannot be read); {way_out}."
            ) from None
        for name, size in state["files"].items():
            file = directory / name
            if not file.is_file() or file.stat().st_size != size:
                raise UserError(f"The checkpoint {directory} is damaged ({name} is missing or cut); {way_out}.")
        if state["ranks"] != self.ranks.size:
            raise UserError(
                f"The checkpoint {directory} was written by {state['ranks']} processes and cannot go on with "
                f"{self.ranks.size}; use --processes {state['ranks']}, or {way_out}."
            )
        return directory, state


def remove_directory(directory: Path) -> None:
    """Delete a checkpoint so that a crash halfway leaves nothing that looks like one."""
    doomed = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
