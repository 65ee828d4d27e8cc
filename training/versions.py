"""What ran, and on which processor: for config.yaml, reports and profiles."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("rlhf-chat", "torch", "deepspeed", "transformers", "peft", "accelerate", "datasets", "tokenizers")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def processor() -> tuple[str, list[str]]:
    """The processor's name, and its flags where the system tells them."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()]
    except OSError:  # not Linux
        return platform.processor() or platform.machine(), []
    values = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    flags = values.get("flags") or values.get("Features") or ""  # on x86, on ARM
    return values.get("model name") or platform.machine(), flags.split()
