"""Checkpoints that appear whole or not at all; the newest few are kept."""

import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from inference.disk import writing
from inference.errors import UserError
from training.distributed import Ranks
from training.launchers import processes_option
from training.run_directory import numbered, publish_directory, read_json, remove_directory, write_json
from training.shared_files import wait_until_seen

STATE_FILE = "state.json"
MISFITS = ("PytorchStreamReader", "loading state_dict", "size of tensor", "shape", "Invalid magic number")
"""What RuntimeErrors of torch and DeepSpeed say of a file that is damaged or does not fit the model; others are about
memory and peers."""


class Checkpoints:
    """The directory `checkpoints/` of one step."""

    what = "checkpoint"

    def __init__(self, directory: Path, keep: int, ranks: Ranks):
        self.directory = directory
        self.keep = keep
        self.ranks = ranks

    def save(self, number: int, write: Callable[[Path], None], state: dict[str, Any]) -> None:
        """All ranks call `write(directory)`; then the checkpoint gets its name, and old ones go."""
        temporary = self.directory / f".{number}.tmp"
        older = self.gone_on_from.numbers()[-1:]
        goes_on = f"then the same command goes on from {f'checkpoint {older[0]}' if older else 'the start of the step'}"
        try:
            with writing(f"{self.what} {number}", self.directory, goes_on):
                self._write(number, temporary, write, state)
        except UserError:
            if self.ranks.size == 1:  # other ranks may still be writing; `newest` removes it at the next start
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _write(self, number: int, temporary: Path, write: Callable[[Path], None], state: dict[str, Any]) -> None:
        if self.ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.ranks.see(temporary)
        write(temporary)
        self.ranks.barrier("saving a checkpoint")  # those of other roles may still be writing
        found = {str(f.relative_to(temporary)): f.stat().st_size for f in temporary.rglob("*") if f.is_file()}
        of_ranks = self.ranks.gather(found, "saving a checkpoint")  # each sees what it has written
        if self.ranks.is_first:
            files = {name: size for of_rank in of_ranks for name, size in of_rank.items()}
            for name in files:
                wait_until_seen(temporary / name)
            write_json(temporary / STATE_FILE, {**state, "number": number, "ranks": self.ranks.size, "files": files})
            publish_directory(temporary, self.directory / str(number))
            for old in self.superfluous():
                remove_directory(self.directory / str(old))
        self.ranks.barrier("saving a checkpoint")

    @property
    def gone_on_from(self) -> "Checkpoints":
        """Those that a run goes on from when one cannot be written."""
        return self

    def superfluous(self) -> list[int]:
        """Numbers of those that go."""
        return self.numbers()[: -self.keep]

    def numbers(self) -> list[int]:
        """Numbers of the complete checkpoints, oldest first."""
        return numbered(self.directory)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Directory and state of the newest checkpoint, its files checked; None where there is none.

        What an earlier process left half written is removed.
        """
        if self.ranks.is_first:
            for pattern in (".*.tmp", ".*.old"):
                for left_over in self.directory.glob(pattern):
                    shutil.rmtree(left_over, ignore_errors=True)
        numbers = self.ranks.tell(self.numbers(), "a look at the checkpoints")
        if not numbers:
            return None
        directory = self.directory / str(numbers[-1])
        self.ranks.see(directory / STATE_FILE)
        way_out = self._way_out(directory)
        try:
            state = read_json(directory / STATE_FILE, way_out)
        except (OSError, UserError):
            state = {}
        if not {"number", "ranks", "files"} <= state.keys():
            raise UserError(f"The checkpoint {directory} is damaged ({STATE_FILE} cannot be read); {way_out}.")
        self.ranks.see(*(directory / name for name in state["files"]))
        for name, size in state["files"].items():
            file = directory / name
            if not file.is_file() or file.stat().st_size != size:
                raise UserError(f"The checkpoint {directory} is damaged ({name} is missing or cut); {way_out}.")
        by_deepspeed = any(name.endswith(".pt") for name in state["files"])
        if by_deepspeed and state["ranks"] != self.ranks.size:
            raise UserError(
                f"The checkpoint {directory} was written by {state['ranks']} processes in DeepSpeed's form (by an "
                f"earlier version, or with the optimiser on NVMe) and cannot go on with {self.ranks.size}; use "
                f"{processes_option(state['ranks'])}, or {way_out}."
            )
        return directory, state

    def reading(self, directory: Path) -> AbstractContextManager[None]:
        """Around the loading of the checkpoint `directory`: what is damaged or foreign in it becomes a UserError."""
        return reading(directory, self._way_out(directory))

    def _way_out(self, directory: Path) -> str:
        return f"delete {directory} to go on from {'the one before' if len(self.numbers()) > 1 else 'the start'}"


@contextmanager
def reading(directory: Path, way_out: str) -> Iterator[None]:
    """Around the loading of a checkpoint: what is damaged or foreign in it becomes a UserError with the way out."""

    def damaged(error: Exception) -> UserError:
        reason = f"{type(error).__name__} {str(error).strip()}".strip().splitlines()[0][:200].rstrip(".")
        return UserError(f"The checkpoint {directory} is damaged or of another model ({reason}); {way_out}.")

    try:
        yield
    except (OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise damaged(error) from error
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(error))
        if wanted is None:
            raise damaged(error) from error
        raise UserError(
            f"The checkpoint {directory} would run {wanted[1]}, which none of rlhf-chat asks for, so it was not "
            f"read: {way_out}, and go on only with runs of people you trust."
        ) from error
    except RuntimeError as error:
        if not any(text in str(error) for text in MISFITS):
            raise
        raise damaged(error) from error
