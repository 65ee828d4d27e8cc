"""Disks of a few kilobytes, so that a full disk is a real one."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[Callable[[int], None]]:
    """Mount one at `place`; gives the function that makes it larger. Skips the test where mounting is not allowed."""
    place.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", place], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a file system can be mounted by root alone")

    def make_room(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}k", place], check=True)

    try:
        yield make_room
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
