"""Starting stage scripts: one process, several on this machine, or the command line for a cluster's launcher."""

import gc
import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, reduction
from pathlib import Path
from typing import Any, TextIO

from inference.errors import EXIT_USER_ERROR, UserError, typed
from rlhf_chat import HOME
from training.error_report import room_for_report
from training.launchers import PARENT_VARIABLE
from training.opening import COMMAND_VARIABLE
from training.run_directory import RunDirectory
from training.steps import STEPS
from training.termination import EXIT_TERMINATED, StageFailed, Terminated, grace

OF_FIRST_ENGINE = "deepspeed.runtime.zero.muon.muon_optimizer"
"""DeepSpeed imports it with the first engine, and with it torch's compiler, which takes seconds."""
LIBRARIES = [
    "rlhf_chat",
    "training.stage_script",
    "training.hybrid_engine.zero_engine",
    "training.step3_rlhf.ppo",
    OF_FIRST_ENGINE,
]


def can_fork() -> bool:
    """Whether scripts may be forked: an accelerator that a library has looked at does not survive it."""
    import torch

    return sys.platform == "linux" and not torch.accelerator.is_available()


def warm_context() -> Any:
    """Where forks come from: a server that imports the libraries, or this process if it is a fork of one."""
    if multiprocessing.parent_process() is not None and set(LIBRARIES) <= sys.modules.keys():
        return multiprocessing.get_context("fork")
    return fork_server(LIBRARIES)


def fork_server(modules: list[str]) -> Any:
    """The context of a server that has imported `modules`; it starts with the first process."""
    os.environ["PYTHONSAFEPATH"] = "1"  # the server imports nothing of the working directory's
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(modules)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is sent to all at once must not end it before them
    forkserver.ensure_running()
    signal.signal(signal.SIGTERM, before)
    return context


class ForkedScript:
    """A running script, with the methods of subprocess.Popen that its callers use."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], progress: TextIO | None, log: TextIO):
        """`command` is the script's path and its arguments. Its output goes to `progress` (stdout), errors to `log`."""
        streams = Stream(progress.fileno() if progress is not None else 1), Stream(log.fileno())
        self._process = warm_context().Process(target=run_script, args=(list(command), dict(environment), *streams))
        self._process.start()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or minus the signal that ended it. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked script", timeout or 0.0)
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


class Stream:
    """An open file that a forked process has too."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {"copy": reduction.DupFd(self.descriptor)}  # pickled on the way to the server alone

    def become(self, descriptor: int) -> None:
        os.dup2(self.copy.detach() if hasattr(self, "copy") else self.descriptor, descriptor)


def run_script(command: list[str], environment: dict[str, str], progress: Stream, log: Stream) -> None:
    """Do in the forked process what the interpreter would do with `command`."""
    from training.private_surfaces import run_exit_functions

    gc.freeze()  # a collection would copy every page of the libraries' objects
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    progress.become(1)
    log.become(2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        run_exit_functions()
        sys.stdout.flush()


SCRIPTS = {
    "preparation": "preparation/main.py",
    **{step.folder: f"{step.folder}/main.py" for step in STEPS},
    "evaluation": "evaluation/main.py",
}
OF_LAUNCHERS = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
}
LAUNCHER_SECONDS = 6
"""How long a launcher may take to end, beyond the grace of its ranks."""
_OF_RANK = re.compile(r"rank +: (\d+) \(local_rank: \d+\)\s+exitcode +: (-?\d+) ")
_ERROR_LINE = re.compile(r"(?:\[rank\d+\]: )?((?:\w+\.)*\w*Error\b.*)")
STEP_OF_SCRIPT = {step.folder: step for step in STEPS}


def stage_command(script: str, run: Path, processes: int, arguments: Sequence[str] = ()) -> list[str]:
    """The command line that runs a stage script in `processes` processes on this machine."""
    file = HOME / "training" / SCRIPTS[script]
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
        with open(log_file, "a", encoding="utf-8") as log:  # warnings and tracebacks of libraries and launchers
            begin = log.tell()
            command = stage_command(script, run.path, processes, arguments)
            process = start(command, processes == 1 and can_fork(), progress, log)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            stop(process)
            raise
        except Terminated:
            raise Terminated(end_in_time(process, script, error_file)) from None
    if code == 0 and has_result(script, run):
        return
    with open(log_file, "rb") as log_bytes:
        log_bytes.seek(begin)
        said = log_bytes.read().decode(errors="replace")
    error = json.loads(error_file.read_text(encoding="utf-8")) if error_file.exists() else {}
    terminated = error.get("code") == EXIT_TERMINATED
    if terminated and not was_killed(said):  # SIGTERM came to the script alone
        raise Terminated(error["sentence"])
    if error and not terminated:
        raised = UserError(error["sentence"]) if error["code"] == EXIT_USER_ERROR else StageFailed(error["sentence"])
        if "traceback" in error:  # --debug shows it
            raised.add_note(error["traceback"])
        raise raised
    raise StageFailed(failure_sentence(script, run, code, log_file, said))


def start(command: list[str], forks: bool, progress: TextIO | None, log: TextIO) -> subprocess.Popen | ForkedScript:
    """Begin a script, in a fork or in an interpreter of its own."""
    if forks:
        return ForkedScript(command[1:], child_environment(), progress, log)
    return subprocess.Popen(command, env=child_environment(), stdout=progress, stderr=log)


def child_environment() -> dict[str, str]:
    """PYTHONSAFEPATH keeps what lies in the user's working directory out of the imports.

    What another launcher has set around this command (a cluster's job) is not for the processes that it starts.
    """
    ours = {PARENT_VARIABLE: str(os.getpid()), "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false"}
    ours[COMMAND_VARIABLE] = json.dumps(sys.argv)
    ours["PET_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGQUIT"  # not SIGHUP: training outlives its terminal
    ours["PET_LOCAL_ADDR"] = "127.0.0.1"  # torchrun would have this machine's name, which may lead nowhere
    ours["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(round(grace() + LAUNCHER_SECONDS / 2))
    return {**{name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}, **ours}


def run_on_ranks(script: str, arguments: list[str], processes: int, what: str) -> dict[str, Any]:
    """What the first rank of `script` leaves in the JSON file that is its last argument; what it prints is shown.

    Raises UserError with the sentence that a rank left as `error`, or StageFailed.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf-chat-ranks-") as scratch:
        result, log_file = Path(scratch) / "result.json", Path(scratch) / "log.txt"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        with open(log_file, "w", encoding="utf-8") as log:  # warnings and tracebacks of libraries and launchers
            command = [*launcher, script, *arguments, str(result)]
            process = subprocess.Popen(command, env=child_environment(), stderr=log)
        try:
            code = process.wait()
        except BaseException:
            stop(process)
            raise
        ended: dict[str, Any] = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
        if "error" in ended:
            raise UserError(ended["error"])
        if code or not ended:
            reason = last_error(log_file.read_text(errors="replace")) or f"code {code}"
            raise StageFailed(f"The {what} on {processes} processes broke off ({reason}).")
        return ended


def report_files(script: str, run: RunDirectory) -> tuple[Path, Path]:
    """Where a script says why it failed, and its log."""
    if script in STEP_OF_SCRIPT:
        step = run.step(STEP_OF_SCRIPT[script])
        return step.error_file, step.log_file
    return run.error_file, run.log_file


def stop(process: subprocess.Popen | ForkedScript) -> None:
    """End a script or its launcher at once; ranks that outlive it end themselves."""
    process.kill()
    process.wait()


def end_in_time(process: subprocess.Popen | ForkedScript, script: str, error_file: Path) -> str:
    """Let a script, or its launcher's ranks, answer SIGTERM; returns the sentence that it ended with."""
    seconds = grace()
    reaches = f": a checkpoint follows if one is reached within {seconds:g} s" if script in STEP_OF_SCRIPT else ""
    print(f"rlhf-chat: SIGTERM{reaches}.", file=sys.stderr, flush=True)
    process.terminate()
    try:
        process.wait(timeout=seconds + LAUNCHER_SECONDS)
    except subprocess.TimeoutExpired:
        stop(process)
    if error_file.exists():
        return str(json.loads(error_file.read_text(encoding="utf-8"))["sentence"])
    return "Ended by SIGTERM: the same command goes on."


def has_result(script: str, run: RunDirectory) -> bool:
    """Whether it has done its work: a user's code that ends the process (os._exit) may say 0 as well."""
    step = STEP_OF_SCRIPT.get(script)
    return run.step(step).is_finished if step else script != "preparation" or run.data.exists()


def failure_sentence(script: str, run: RunDirectory, code: int, log_file: Path, said: str) -> str:
    """The sentence for a script that left none of its own; `said` is what it wrote to its log."""
    step = STEP_OF_SCRIPT.get(script)
    rank, code = first_dead_rank(said) or (None, code)
    who = script if rank is None else f"rank {rank} of {script}"
    if code < 0:
        how = f"was killed by {signal_name(-code)}"
        if code == -signal.SIGKILL:
            how += ", most often because memory ran out"
            if step:
                how += " (try a smaller micro_batch_tokens, LoRA, a higher zero_stage or fewer --processes)"
    else:
        reason = last_error(said)
        how = f"ended with code {code}" + (f" ({reason})" if reason else "") + " and left no result" * (code == 0)
    goes_on = "try again"
    if step:
        has_checkpoint = any(run.step(step).checkpoints.glob("[0-9]*"))
        again = "goes on from the last checkpoint" if has_checkpoint else "begins the step again"
        goes_on = f"rlhf-chat {step.command} {typed(run.path)} {again}"
    return f"{who} {how}; {goes_on}, and the log is {log_file}."


def first_dead_rank(said: str) -> tuple[int, int] | None:
    """The rank that ended first and its exit code, as torchrun tells; None without torchrun.

    Where one was killed and others failed because they missed it, all within a moment, it is the one that was killed.
    """
    ended = [(int(rank), int(code)) for rank, code in _OF_RANK.findall(said)]
    killed = [(rank, code) for rank, code in ended if code < 0 and code != -signal.SIGTERM]
    first = killed or ended
    return first[-1] if first else None  # the root cause stands last


def was_killed(said: str) -> bool:
    """Whether a rank was, so that the launcher sent SIGTERM to the others."""
    _, code = first_dead_rank(said) or (0, 0)
    return code < 0 and -code != signal.SIGTERM


def signal_name(number: int) -> str:
    """`SIGKILL (signal 9)`."""
    try:
        return f"{signal.Signals(number).name} (signal {number})"
    except ValueError:  # a real-time signal
        return f"signal {number}"


def last_error(said: str) -> str:
    """The last line that begins with the name of an error, the launcher's own apart."""
    errors = [match[1] for line in said.splitlines() if (match := _ERROR_LINE.match(line.strip()))]
    return next((line[:300] for line in reversed(errors) if "ChildFailedError" not in line), "")
