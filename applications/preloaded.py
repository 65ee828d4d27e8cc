"""Scripts of one run fork from one process that has imported the libraries, so each of them starts at once."""

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, reduction
from typing import Any, TextIO

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
    """Where forks come from: a server that imports the libraries, or this process if it is a fork of such a one."""
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
    """In the forked process: what the interpreter would do with `command`."""
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
