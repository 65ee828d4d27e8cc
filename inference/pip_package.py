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


BUILD_BACKEND = """\
from pathlib import Path

class __legacy__:
    def prepare_metadata_for_build_wheel(directory, settings=None):
        folder = Path(directory, "{name}-{version}.dist-info")
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        return folder.name
"""
"""Stands in for setuptools, which pip asks for the metadata of a source distribution, and executes nothing of it."""


def download(package: PipPackage, directory: Path) -> Path:
    """The package's file, now in `directory`. It is pip that loads it, so pip's settings (index, proxy, wheels) count.

    pip verifies the checksum before it looks into the file, of which nothing is executed (a source distribution has to
    be one of setuptools). Raises UserError where pip cannot load it or the checksum is wrong, OSError where the disk is
    full.
    """
    wanted = directory / "requirements.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-r", str(wanted)]
    environment = dict(os.environ)
    if package.is_source:
        name, _, version = package.requirement.partition("==")
        stand_in = directory / "stand_in" / "setuptools"
        stand_in.mkdir(parents=True)
        (stand_in / "__init__.py").touch()
        (stand_in / "build_meta.py").write_text(BUILD_BACKEND.format(name=name, version=version), encoding="utf-8")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(stand_in.parent), os.environ.get("PYTHONPATH"))))
        command += ["--no-build-isolation", "--use-pep517", "--no-binary", name]
    command += ["-d", str(directory)]
    result = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        stdin=subprocess.DEVNULL,
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
