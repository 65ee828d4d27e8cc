"""The tests that a change touches, for `make quick`.

They are those in files that changed since the branch left main, or that import or name one that did, at once or by a
helper of the tests; the pages, and a run of `tiny`. Files that take a minute are left to `make test`, unless they
changed themselves.
"""

import ast
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from tests.conftest import LONGEST

ROOT = Path(__file__).resolve().parent.parent
ALWAYS = ["tests/test_docs.py", "tests/test_pipeline.py::test_one_command_leaves_everything"]


def changed_files() -> set[str]:
    """Paths from the root, also of files that git does not know yet."""

    def git(*arguments: str) -> list[str]:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.split()

    (base,) = git("merge-base", "main", "HEAD") or ["HEAD"]
    return {*git("diff", "--name-only", base), *git("ls-files", "--others", "--exclude-standard")}


def touched(changed: set[str]) -> list[str]:
    """Arguments for pytest."""
    files = {str(file.relative_to(ROOT)): file.read_text() for file in (ROOT / "tests").rglob("*.py")}
    found = {file for file in files if file in changed or reads(files[file], changed)}
    while more := {file for file in files if file not in found and reads(files[file], found & files.keys())}:
        found |= more
    tests = {file for file in found if Path(file).name.startswith("test_")}
    return sorted(file for file in tests if file in changed or Path(file).stem not in LONGEST) + ALWAYS


def reads(code: str, files: Iterable[str]) -> bool:
    """Whether it imports a Python file of `files`, or has the name of another one in it."""
    python = {file for file in files if file.endswith(".py")}
    modules = {file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in python}
    others = {Path(file).name for file in files if file not in python}
    return not modules.isdisjoint(imports(code)) or any(name in code for name in others)


@cache
def imports(code: str) -> set[str]:
    """Modules, and what is taken from them, which may be modules."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


if __name__ == "__main__":
    print(*touched(changed_files()))
