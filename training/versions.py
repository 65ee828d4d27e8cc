"""Versions of what ran, for config.yaml and reports."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("rlhf-chat", "torch", "deepspeed", "transformers", "peft", "accelerate", "datasets", "tokenizers")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
