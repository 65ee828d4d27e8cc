"""Write the locks: each package of requirements.txt and of what these need, with the hashes of all its files, in the
versions of the environment that runs this (`make lock`). build.txt is installed first: DeepSpeed is built with it.
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
        pins = [
            f"{each.name}=={each.version.partition('+')[0]}\n" for each in distributions() if each.name != "rlhf-chat"
        ]
        installed.write_text("".join(pins), encoding="utf-8")
        options = "--universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-config --quiet"
        uv = [sys.executable, "-m", "uv", "pip", "compile", *options.split()]
        found = subprocess.run(
            [*uv, "--constraints", installed, requirements], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    return {block.partition("==")[0]: block.rstrip("\n") for block in re.split(r"\n(?=\S)", found)}


def cpu_build(torch: str) -> list[str]:
    """PyTorch's builds for a CPU: on Linux those of an index of its own, elsewhere `torch`, which is one."""
    version = torch.split()[0] + "+cpu"
    lines = (line.split() for line in (LOCKS / "torch-cpu.sha256").read_text(encoding="utf-8").splitlines())
    hashes = [f"--hash=sha256:{digest}" for digest, name in lines if name.startswith(version.replace("==", "-") + "-")]
    if not hashes:
        raise SystemExit(
            f"locks/torch-cpu.sha256 has no hash of {version}: add its Linux files, as PyTorch's index names them."
        )
    elsewhere = torch.replace(" ", " ; sys_platform != 'linux' ", 1)
    return [" \\\n    ".join([f"{version} ; sys_platform == 'linux'", *hashes]), elsewhere]


def main() -> None:
    common = resolve(LOCKS.parent / "requirements.txt")
    torch = common.pop("torch")
    cuda = [common.pop(name) for name in list(common) if CUDA.fullmatch(name)]
    files = {
        "build": [common.pop("setuptools")],
        "common": ["-r build.txt", *common.values()],
        "cpu": ["-r common.txt", *cpu_build(torch)],
        "cuda": ["-r common.txt", torch, *cuda],
    }
    for name, blocks in files.items():
        (LOCKS / f"{name}.txt").write_text("\n".join([*blocks, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
