"""The lowest versions that pyproject.toml allows, as requirements; `tests/floors.py torch==2.13.0` keeps that one.

What is not ours to bound (the tests' own tools) is as requirements.txt has it.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ("setuptools", "pytest", "pytest-timeout", "pytest-xdist", "psutil", "openai", "httpx", "playwright")


def floors(dependencies: list[str], kept: list[str]) -> list[str]:
    """`name>=1.2,<2` -> `name==1.2`, and what is `kept` in the place of its own."""
    lowest = [re.sub(r">=([^,]+).*", r"==\1", dependency) for dependency in dependencies]
    given = {each.partition("==")[0]: each for each in kept}
    return [given.get(each.partition("==")[0], each) for each in lowest]


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    exact = (ROOT / "requirements.txt").read_text().splitlines()
    tools = [line for line in exact if line.partition("==")[0] in TOOLS]
    print("\n".join(floors(project["dependencies"], sys.argv[1:]) + tools))
