"""Write build.txt, cpu.txt and cuda.txt: each package of requirements.txt and of what these need, with the hashes of all
its files, in the versions of the environment that runs this (`make lock`).
"""

import re
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

LOCKS = Path(__file__).parent
CUDA = re.compile(r"(nvidia|cuda)-.*|triton")


def resolve(requirements: Path) -> dict[str, str]:
    """Ask the index through uv; each name comes with its block, from `name==version` to its last hash."""
    with tempfile.TemporaryDirectory() as directory:
        installed = Path(directory, "installed.txt")
        pins = [f"{each.name}=={each.version.partition('+')[0]}\n" for each in distributions() if each.name != "rlhf-chat"]
        installed.write_text("".join(pins), encoding="utf-8")
        options = "--universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-config --quiet"
        uv = [sys.executable, "-m", "uv", "pip", "compile", *options.split()]
        found = subprocess.run(
            [*uv, "--constraints", installed, requirements], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    return {block.partition("==")[0]: block.rstrip("\n") for block in re.split(r"\n(?=\S)", found)}


def cpu_builds(version: str) -> list[str]:
    """Hashes of PyTorch's CPU builds of `version`, which are on an index of their own."""
    lines = (line.split() for line in (LOCKS / "torch-cpu.sha256").read_text(encoding="utf-8").splitlines())
    return [digest for digest, name in lines if name.startswith(f"torch-{version}+cpu-")]


def main() -> None:
    blocks = resolve(LOCKS.parent / "requirements.txt")
    version = re.match(r"torch==(\S+)", blocks["torch"])[1]
    blocks["torch"] = " \\\n    --hash=sha256:".join([blocks["torch"], *cpu_builds(version)])
    build = {"setuptools": blocks.pop("setuptools")}
    cuda = {name: blocks.pop(name) for name in list(blocks) if CUDA.fullmatch(name)}
    for name, before, inside in (("build", [], build), ("cpu", ["-r build.txt"], blocks), ("cuda", ["-r cpu.txt"], cuda)):
        (LOCKS / f"{name}.txt").write_text("\n".join([*before, *inside.values(), ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
