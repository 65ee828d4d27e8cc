"""Starting stage scripts: one process, several on this machine, or the command line for a cluster's launcher."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import training
from inference.errors import EXIT_USER_ERROR, UserError
from training.error_report import room_for_report
from training.run_directory import STEP_COMMANDS, STEP_NAMES, RunDirectory
from training.watchdog import PARENT_VARIABLE

SCRIPTS = {
    "preparation": "preparation.py",
    **{name: f"{name}/main.py" for name in STEP_NAMES.values()},
    "evaluation": "evaluation/main.py",
}
STEP_OF_SCRIPT = {name: number for number, name in STEP_NAMES.items()}


class StageFailed(Exception):
    """A stage ended without success and the user's input is not to blame: it was killed, or the run diverged."""


def stage_command(script: str, run: Path, processes: int, arguments: Sequence[str] = ()) -> list[str]:
    """The command line that runs a stage script in `processes` processes on this machine."""
    file = Path(training.__file__).parent / SCRIPTS[script]
    if processes == 1:
        return [sys.executable, str(file), str(run), *arguments]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, str(file), str(run), *arguments]


def run_stage_script(
    script: str, run: RunDirectory, processes: int, arguments: Sequence[str] = (), progress: TextIO | None = None
) -> None:
    """Run a stage to its end; its progress is shown on stdout, or in `progress`.

    Raises UserError with the stage's own sentence, or StageFailed.
    """
    error_file, log_file = report_files(script, run)
    with room_for_report(error_file):
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with open(log_file, "a") as log:  # warnings and tracebacks of libraries and launchers
            command = stage_command(script, run.path, processes, arguments)
            process = subprocess.Popen(command, env=child_environment(), stdout=progress, stderr=log)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            stop(process)
            raise
    if code == 0:
        return
    if error_file.exists():
        error = json.loads(error_file.read_text())
        raised = UserError(error["sentence"]) if error["code"] == EXIT_USER_ERROR else StageFailed(error["sentence"])
        if "traceback" in error:  # --debug shows it
            raised.add_note(error["traceback"])
        raise raised
    raise StageFailed(failure_sentence(script, run, code, log_file))


def child_environment() -> dict[str, str]:
    """PYTHONSAFEPATH keeps a `training` or `inference` folder of the user's working directory out of the imports."""
    ours = {PARENT_VARIABLE: str(os.getpid()), "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **ours}


def run_on_ranks(script: str, arguments: list[str], processes: int, what: str) -> dict[str, Any]:
    """What the first rank of `script` leaves in the JSON file that is its last argument; what it prints is shown.

    Raises UserError with the sentence that a rank left as `error`, or StageFailed.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf-chat-ranks-") as scratch:
        result, log_file = Path(scratch) / "result.json", Path(scratch) / "log.txt"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        with open(log_file, "w") as log:  # warnings and tracebacks of libraries and launchers
            command = [*launcher, script, *arguments, str(result)]
            process = subprocess.Popen(command, env=child_environment(), stderr=log)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            stop(process)
            raise
        ended: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
        if "error" in ended:
            raise UserError(ended["error"])
        if code or not ended:
            lines = [line.strip() for line in log_file.read_text(errors="replace").splitlines()]
            reason = next((line for line in reversed(lines) if "Error" in line), f"code {code}")
            raise StageFailed(f"The {what} on {processes} processes broke off ({reason[:300]}).")
        return ended


def report_files(script: str, run: RunDirectory) -> tuple[Path, Path]:
    """Where a script says why it failed, and its log."""
    if script in STEP_OF_SCRIPT:
        step = run.step(STEP_OF_SCRIPT[script])
        return step.error_file, step.log_file
    return run.error_file, run.log_file


def stop(process: subprocess.Popen) -> None:
    """End a launcher; ranks that outlive it end themselves."""
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def failure_sentence(script: str, run: RunDirectory, code: int, log_file: Path) -> str:
    step = STEP_OF_SCRIPT.get(script)
    command = f"rlhf-chat {STEP_COMMANDS[step]} {run.path}" if step else "the same command"
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    memory = " Out of memory? Try a smaller micro_batch_tokens, LoRA, or a higher zero_stage." if code == -9 else ""
    return f"{script} {how}; its log is {log_file}. {command} goes on from the last checkpoint.{memory}"
