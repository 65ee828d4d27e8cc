"""`rlhf-chat doctor` without a model: what this machine has, what is missing, and what to do about it.

Each check is one line that can be pasted into a bug report. Packages are imported inside the checks, because a package
that cannot be imported is one of the things to find.
"""

import importlib
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any, Literal

from inference.model_store import cache_directory
from inference.streams import redacted
from training.run_directory import PACKAGES, processor, versions

State = Literal["ok", "warning", "impossible"]
GIB = 2**30
LITTLE_MEMORY, LITTLE_DISK = 4 * GIB, 5 * GIB
HEAVY = ("torch", "transformers", "training.hybrid_engine.deepspeed_setup")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
SECONDS = 5.0  # for anything that waits for another process or machine


@dataclass(frozen=True)
class Check:
    """A line: `warning`: something does not work; `impossible`: no run works; the text says the way out."""

    name: str
    state: State
    text: str

    def __str__(self) -> str:
        return f"{self.name:<18}{self.state:<12}{self.text}"


def report_on_machine(ask_hub: bool = False) -> bool:
    """Print each check and a verdict; returns whether runs are possible. Only `ask_hub` uses the network."""
    checks = []
    for check in machine_checks(ask_hub):
        print(check, flush=True)
        checks.append(check)
    print(verdict(checks))
    return all(check.state != "impossible" for check in checks)


def verdict(checks: list[Check]) -> str:
    impossible = [check.name for check in checks if check.state == "impossible"]
    warnings = [check.name for check in checks if check.state == "warning"]
    if impossible:
        return f"Verdict: runs are not possible here: see {', '.join(impossible)}."
    if warnings:
        return f"Verdict: runs are possible; mind the warning{'s' * (len(warnings) > 1)}: {', '.join(warnings)}."
    return "Verdict: runs are possible, nothing is missing."


def machine_checks(ask_hub: bool) -> Iterator[Check]:
    yield check_system()
    yield check_versions()
    imports = check_imports()
    yield imports
    yield check_cpu()
    if imports.state == "ok":  # they ask torch
        yield check_memory()
        yield check_gpus()
        yield check_compiler()
    yield check_cache()
    yield check_working_directory()
    yield check_loopback()
    if ask_hub:
        yield check_hub()


def check_system() -> Check:
    text = f"{platform.platform()}, Python {platform.python_version()} ({platform.machine()})"
    if platform.system() != "Linux":
        return Check("system", "warning", f"{text}: tested on Linux only; elsewhere expect gaps, or use a container")
    return Check("system", "ok", text)


def check_versions() -> Check:
    """Installed packages against the ranges that this project asks for."""
    installed = versions()
    text = ", ".join(f"{package} {installed[package]}" for package in PACKAGES)
    if wrong := wrong_packages():
        return Check("versions", "impossible", f"{text}: {'; '.join(wrong)}: pip install -e . in the project")
    return Check("versions", "ok", text)


def wrong_packages() -> list[str]:
    """`torch 1.0, needed >=2.6` for each required package that is missing or has another version."""
    from importlib.metadata import version

    from packaging.requirements import Requirement

    try:
        needed = [Requirement(line) for line in requires("rlhf-chat") or []]
    except PackageNotFoundError:  # started from its folder without being installed
        return []
    wrong = []
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            installed = "is not installed"
        if installed == "is not installed" or not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed}, needed {requirement.specifier}")
    return wrong


def check_imports() -> Check:
    for module in HEAVY:
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken package raises anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            name = module.rpartition(".")[2].removesuffix("_setup")
            return Check("imports", "impossible", f"{name} cannot be imported ({reason}): reinstall it with pip")
    return Check("imports", "ok", "torch, transformers and deepspeed can be imported")


def check_cpu() -> Check:
    model, all_flags = processor()
    flags = [flag for flag in CPU_FLAGS if flag in all_flags]
    text = f"{os.cpu_count()} cores, {model}, flags {' '.join(flags) or 'unknown'}"
    is_fast = {"avx512_bf16", "amx_bf16", "bf16"} & set(flags)
    return Check("cpu", "ok", f"{text}: bf16 is {'fast' if is_fast else 'not faster than fp32 here (use fp32)'}")


def check_memory() -> Check:
    from applications.fit import Machine
    from training.metrics import size

    memory = Machine.here().memory
    if memory < LITTLE_MEMORY:
        return Check("memory", "warning", f"{size(memory)}: little; try --model tiny, and --dry-run before a run")
    return Check("memory", "ok", size(memory))


def check_gpus() -> Check:
    import torch

    from applications.fit import Machine
    from training.metrics import size

    listed = gpus_of_driver()
    if torch.cuda.is_available():
        gpus = "; ".join(f"{name}, {size(memory)}" for name, memory in Machine.here().gpus)
        driver = listed[0].rpartition(", ")[2] if listed else "unknown"
        return Check("gpus", "ok", f"{gpus}; driver {driver}, torch built for CUDA {torch.version.cuda}")
    if listed:
        build = torch.version.cuda or "no CUDA"
        text = f"{'; '.join(listed)}: torch (built for {build}) cannot use them; install a torch build for this driver"
        return Check("gpus", "warning", f"{text}, or a newer driver")
    return Check("gpus", "ok", "none: runs use the CPU, for models of up to some hundred million parameters")


def gpus_of_driver() -> list[str]:
    """`name, memory, driver version` of each GPU that NVIDIA's driver knows."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    pipes: Any = {"capture_output": True, "text": True, "errors": "replace"}
    try:
        done = subprocess.run(command, **pipes, timeout=4 * SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def check_compiler() -> Check:
    """DeepSpeed compiles its CPU optimiser when GPU runs offload to main memory; nothing else is compiled."""
    import torch

    missing = [] if shutil.which(os.environ.get("CXX", "g++")) else ["g++"]
    if not shutil.which("ninja") and importlib.util.find_spec("ninja") is None:
        missing.append("ninja")
    if torch.cuda.is_available():
        from torch.utils.cpp_extension import CUDA_HOME

        missing += [] if CUDA_HOME else ["the CUDA toolkit (CUDA_HOME)"]
        if missing:
            text = f"no {', no '.join(missing)}: offload=optimizer cannot be used; install it, or run without offload"
            return Check("compiler", "warning", text)
    has = f"no {', no '.join(missing)}" if missing else "g++ and ninja"
    return Check("compiler", "ok", f"{has} (needed for offload on GPUs only)")


def check_cache() -> Check:
    cache = cache_directory()
    if complaint := unwritable(cache):
        return Check("cache", "impossible", f"{cache} cannot be written ({complaint}): set RLHF_CHAT_CACHE elsewhere")
    return on_disk("cache", cache, "set RLHF_CHAT_CACHE and HF_HOME to a larger disk")


def check_working_directory() -> Check:
    here = Path.cwd()
    if complaint := unwritable(here):
        return Check("working directory", "warning", f"{here} cannot be written ({complaint}): give --name /DIR/NAME")
    return on_disk("working directory", here, "runs need room for models and checkpoints: change to a larger disk")


def on_disk(name: str, directory: Path, way_out: str) -> Check:
    free = shutil.disk_usage(nearest_existing(directory)).free
    text = f"{directory}, {free / GIB:.1f} GiB free"
    return Check(name, "warning", f"{text}: {way_out}") if free < LITTLE_DISK else Check(name, "ok", text)


def nearest_existing(path: Path) -> Path:
    """The path itself or the first of its parents that is there."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def unwritable(directory: Path) -> str:
    """Why no file can be made in `directory` (or in the nearest of its parents that is there); empty if one can."""
    try:
        with tempfile.TemporaryFile(dir=nearest_existing(directory)):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def check_loopback() -> Check:
    """Several processes meet at a port of this machine, and gloo looks the machine's own name up."""
    try:
        meet()
    except OSError as error:
        text = f"no connection over 127.0.0.1 ({error}): several processes cannot meet; allow loopback connections"
        return Check("loopback", "warning", text)
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        text = f"the machine's name {name} has no address: for several processes add it to /etc/hosts"
        return Check("loopback", "warning", f"{text}, or set GLOO_SOCKET_IFNAME=lo")
    return Check("loopback", "ok", "processes on this machine can meet")


def meet() -> None:
    """Open a port, connect to it, send a byte. Raises OSError."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=SECONDS) as client,
    ):
        server.settimeout(SECONDS)
        client.sendall(b"x")
        with server.accept()[0] as connection:
            connection.settimeout(SECONDS)
            if connection.recv(1) != b"x":
                raise OSError("a byte was sent and did not arrive")


def check_hub() -> Check:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return Check("hub", "warning", "HF_HUB_OFFLINE is set, so the hub is not asked: unset it to load models")
    address = redacted(constants.ENDPOINT)
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of the hub's HTTP library
        text = f"{address} cannot be reached ({type(error).__name__}): check network and proxy (HTTPS_PROXY), "
        return Check("hub", "warning", f"{text}set HF_ENDPOINT to a mirror, or use --model DIR")
    return Check("hub", "ok", f"{address} answers")
