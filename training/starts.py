"""starts.jsonl of a run: what ran each time, where and when. It stays in the run: no export and no card has it."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from inference.disk import writing
from inference.streams import redacted_arguments
from training.config import RunConfig
from training.inputs import CODE, code_of
from training.metrics import read_line
from training.run_directory import RunDirectory
from training.steps import Step
from training.versions import processor, versions

COMMAND_VARIABLE = "RLHF_CHAT_COMMAND_LINE"
"""The command line of the command that starts a script, as JSON."""
GIT_SECONDS = 10.0


def record_start(run: RunDirectory, what: str, config: RunConfig, processes: int) -> None:
    """Append what runs now. `what` is the folder of a step, `preparation` or `evaluation`."""
    import torch  # seconds, and whoever reads the journal does without

    commit, changed = checkout(Path(__file__).parent)
    gpus = [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())]
    values = {
        "number": len(read_starts(run)) + 1,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "what": what,
        "command": shlex.join(redacted_arguments(command_line())),
        "directory": os.getcwd(),
        "host": platform.node(),
        "processes": processes,
        "processor": processor()[0],
        "gpus": gpus,
        "commit": commit,
        "changed_since_commit": changed,
        **{kind: code_of(config, kind) for kind in CODE},
        "versions": versions(),
    }
    line = json.dumps(values, ensure_ascii=False) + "\n"
    with writing("a line of it", run.starts_file), open(run.starts_file, "a", encoding="utf-8") as handle:
        handle.write(line)


def read_starts(run: RunDirectory) -> list[dict[str, Any]]:
    """In order, those of steps that were taken over too (`of`: which run's); runs of before have none. What a crash cut
    short, or is no start, is left out."""
    lines = run.starts_file.read_bytes().splitlines() if run.starts_file.exists() else []
    return [start for line in lines if (start := read_line(line)) is not None and is_start(start)]


def begun_at(run: RunDirectory) -> str:
    """When the run's own first start was; empty where it has none."""
    return next((start["time"] for start in read_starts(run) if "of" not in start), "")


def is_start(values: Mapping[str, Any]) -> bool:
    try:
        return datetime.fromisoformat(values["time"]).tzinfo is not None and isinstance(values["what"], str)
    except (LookupError, TypeError, ValueError):
        return False


def versions_of(run: RunDirectory, step: Step, made_by: Mapping[str, str]) -> Mapping[str, str]:
    """Of what ran the step last; `made_by`, those of the run's making, where nobody wrote it down."""
    starts = [start for start in read_starts(run) if start["what"] == step.folder]
    return starts[-1].get("versions", made_by) if starts else made_by


def command_line() -> list[str]:
    """Of the command that started this script, else of the script itself."""
    given = os.environ.get(COMMAND_VARIABLE)
    return json.loads(given) if given else sys.argv


def checkout(directory: Path) -> tuple[str, bool]:
    """The commit of the code in `directory`, and whether files of it have changed since; '' where git does not keep it.

    An installed package that lies in somebody's checkout, in an environment there, is not kept by it.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=GIT_SECONDS, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "steps.py")
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return "", False
