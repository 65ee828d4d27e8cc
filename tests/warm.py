"""Commands and ranks of tests, forked from one process that has the libraries loaded.

An interpreter that imports transformers and DeepSpeed takes 10 seconds of a core, a fork none. What must be seen from a
cold start (import errors, launchers) is started cold: test_readme.py, test_launchers.py.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from applications.forking import LIBRARIES, fork_server

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = [
    *LIBRARIES,
    "applications.commands",
    "applications.report.page",
    "transformers.models.llama.modeling_llama",
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
                raise TimeoutError(
                    f"not over after {timeout} s: {Path(out).read_text()[-1000:]}{Path(err).read_text()}"
                )
            done.append(Done(process.exitcode, Path(out).read_text(), Path(err).read_text()))
        return done


def run(function: Callable[[], object], environment: dict[str, str], cwd: str, files: list[str]) -> None:
    """In the forked process."""
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

    def __call__(self) -> None:
        from applications.cli import main

        sys.argv = ["rlhf-chat", *self.arguments]
        main()
