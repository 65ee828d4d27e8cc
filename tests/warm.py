"""Commands and ranks of tests, forked from one process that has the libraries loaded.

An interpreter that imports transformers and DeepSpeed takes 10 seconds of a core, a fork none. What must be seen from a
cold start (import errors, launchers) is started cold: test_readme.py, test_launchers.py, test_survival.py.
"""

import gc
import importlib.util
import inspect
import os
import stat
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch.distributed.elastic.rendezvous import dynamic_rendezvous

from applications.launch import LIBRARIES, ForkedScript, Stream, can_fork, fork_server, run_script

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = [
    *LIBRARIES,
    "applications.commands",
    "torch.distributed.run",
    "applications.report.page",
    "training.step1_sft.sft",
    "training.step2_reward.reward",
    "deepspeed.module_inject.auto_ep_layer",
    "transformers.models.bloom.modeling_bloom",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt",
    "tests.warm",
]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@cache
def context() -> Any:
    """Starts with the first fork that is asked for; each worker of pytest has one."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # the server must not begin to use a GPU
    return fork_server(PRELOADED)


def fork_all(
    functions: list[Callable[[], object]], environments: list[dict[str, str]], cwd: Path, stdin: str, timeout: float
) -> list[Done]:
    """Call each function in a process of its own, all at once; what each printed, and its exit code."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "in").write_text(stdin)
        started = []
        for number, (function, environment) in enumerate(zip(functions, environments, strict=True)):
            files = [str(Path(scratch) / name) for name in ("in", f"{number}.out", f"{number}.err")]
            process = context().Process(target=run, args=(function, {**os.environ, **environment}, str(cwd), files))
            process.start()
            started.append((process, files))
        done = []
        for process, (_, out, err) in started:
            process.join(timeout)
            if process.exitcode is None:
                for other, _ in started:
                    other.kill()
                raise TimeoutError(f"not over after {timeout} s: {text_of(out)[-1000:]}{text_of(err)}")
            done.append(Done(process.exitcode, text_of(out), text_of(err)))
        return done


def text_of(file: str) -> str:
    return Path(file).read_text(encoding="utf-8")


def run(function: Callable[[], object], environment: dict[str, str], cwd: str, files: list[str]) -> None:
    """In the forked process."""
    gc.freeze()
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, name in enumerate(files):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        descriptor = os.open(name, flags)
        os.dup2(descriptor, number)
        os.close(descriptor)
    try:
        with open(0, encoding="utf-8", closefd=False) as sys.stdin:  # multiprocessing has put an empty one there
            function()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


@dataclass(frozen=True)
class Command:
    """`rlhf-chat` with its arguments."""

    arguments: tuple[str, ...]
    umask: int = 0o022

    def __call__(self) -> None:
        from applications.cli import main

        os.umask(self.umask)
        fork_python()
        sys.argv = ["rlhf-chat", *self.arguments]
        main()


@dataclass(frozen=True)
class Python:
    """`python` with its arguments."""

    arguments: tuple[str, ...]

    def __call__(self) -> None:
        fork_python()
        start_python(list(self.arguments), dict(os.environ), Stream(1), Stream(2))


class Forked(ForkedScript):
    """A command at work, as the leader of a session; what it says is appended to a file."""

    def __init__(self, function: Callable[[], object], log_file: Path, **environment: str):
        streams = [os.devnull, str(log_file), str(log_file)]
        arguments = (function, {**os.environ, **environment}, os.getcwd(), streams)
        self._process = context().Process(target=run, args=arguments)
        self._process.start()
        self.pid = self._process.pid


def fork_python() -> None:
    """From now on what this process starts with `python` is a fork of it: torchrun's agent, and in there the ranks."""
    if not can_fork():
        return
    start_cold = subprocess.Popen._execute_child
    signature = inspect.signature(start_cold)

    def execute_child(popen: subprocess.Popen, *given: Any) -> None:
        told = signature.bind(popen, *given).arguments
        program, *arguments = told["args"]
        is_piped = {told["p2cwrite"], told["c2pread"], told["errread"]} != {-1}
        if program != sys.executable or is_piped or told["cwd"]:
            return start_cold(popen, *given)
        popen.pid = os.fork()
        if popen.pid:
            popen._child_created = True
            return None
        if told["start_new_session"]:
            os.setsid()
        close_sockets()
        streams = (
            Stream(own if own != -1 else of_parent) for own, of_parent in ((told["c2pwrite"], 1), (told["errwrite"], 2))
        )
        os._exit(exit_code(lambda: start_python(arguments, dict(told["env"] or os.environ), *streams)))

    subprocess.Popen._execute_child = execute_child


def close_sockets() -> None:
    """Those of the parent, which would stay open here after its death."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.close(descriptor)


def start_python(arguments: list[str], environment: dict[str, str], output: Stream, log: Stream) -> None:
    """What an interpreter does: a sitecustomize.py, then the script or module."""
    # an agent of torchrun names its own methods in events: each time it looks through all modules, here thousands
    dynamic_rendezvous.get_method_name = lambda depth=0: "a method"
    for finalizer in weakref.finalize._registry:
        finalizer.atexit = False  # temporary directories of the parent
    os.environ.clear()
    os.environ.update(environment)
    for place in filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)):
        if (custom := Path(place) / "sitecustomize.py").exists():
            exec(custom.read_text(), {"__name__": "sitecustomize"})
    arguments = [argument for argument in arguments if argument != "-u"]
    if arguments[0] == "-m":
        arguments = [importlib.util.find_spec(arguments[1]).origin, *arguments[2:]]
    run_script(arguments, environment, output, log)


def exit_code(function: Callable[[], object]) -> int:
    """With which an interpreter would end."""
    try:
        function()
        return 0
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stderr.flush()
