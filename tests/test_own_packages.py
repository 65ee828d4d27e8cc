"""A user's own packages called as ours: on PYTHONPATH and in the working directory, under each way to start."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

from rlhf_chat import HOME, PACKAGES
from tests.pages import ROOT

NOT_OURS = "raise SystemExit('the wrong package')"


@pytest.fixture
def theirs(tmp_path) -> Path:
    """Packages of the three names, and one of another."""
    for name in (*PACKAGES, "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("" if name == "other" else NOT_OURS)
    return tmp_path


def python(theirs: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """In their directory; it comes first on PYTHONPATH too."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(theirs), str(ROOT)])}
    environment.pop("PYTHONSAFEPATH", None)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=theirs, env=environment, capture_output=True, text=True, timeout=60)


PROGRAM = """
import sys
before = list(sys.path)
import rlhf_chat
import json, multiprocessing
import applications, inference.errors, other, training.steps

def found():
    return [sys.modules[name].__file__ for name in ("applications", "inference.errors", "training.steps")]

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(json.dumps([found(), pool.apply(found), other.__file__, before == sys.path]))
"""


def test_the_three_are_ours_and_nothing_else_changes(theirs):
    (theirs / "program.py").write_text(PROGRAM)
    here, spawned, other, is_same_path = json.loads(python(theirs, "program.py").stdout)
    ours = [str(HOME / name) for name in ("applications/__init__.py", "inference/errors.py", "training/steps.py")]
    assert here == spawned == ours and other == str(theirs / "other" / "__init__.py") and is_same_path


def test_the_command_starts_beside_them(theirs):
    done = python(theirs, "-m", "rlhf_chat", "sft", "--help")
    assert done.returncode == 0 and "supervised fine-tuning" in done.stdout, done.stderr


def test_what_is_installed_starts_through_the_public_package():
    """The metadata of a wheel, and of an editable installation."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = find_packages(str(ROOT), **project["tool"]["setuptools"]["packages"]["find"])
    assert {*PACKAGES, "rlhf_chat"} <= set(packages)
    assert project["project"]["scripts"] == {"rlhf-chat": "rlhf_chat:main"}


def test_each_script_imports_it_before_ours():
    scripts = [file for name in PACKAGES for file in (HOME / name).rglob("*.py") if "__main__" in file.read_text()]
    started = {file: first_of_ours(file) for file in scripts if file.name in ("main.py", "doctor.py", "profile.py")}
    assert len(started) == 8 and set(started.values()) == {"rlhf_chat"}, started


def first_of_ours(file: Path) -> str:
    imports = [node for node in ast.parse(file.read_bytes()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [node.names[0].name if isinstance(node, ast.Import) else str(node.module) for node in imports]
    return next(root for name in names if (root := name.partition(".")[0]) in (*PACKAGES, "rlhf_chat"))


@pytest.mark.parametrize("kind", ["package", "module"])
def test_a_name_that_is_taken_already_is_one_sentence(theirs, kind):
    place = theirs / "training"
    (place / "__init__.py").write_text("")
    if kind == "module":
        shutil.rmtree(place)
        place = theirs / "training.py"
        place.write_text("")
    done = python(theirs, "-c", "import training, rlhf_chat")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{place} is imported as training already" in done.stderr and str(HOME / "training") in done.stderr


def test_a_script_of_another_copy_says_so(theirs):
    script = theirs / "copy" / "training" / "step1_sft" / "main.py"
    script.parent.mkdir(parents=True)
    shutil.copy(HOME / "training" / "step1_sft" / "main.py", script)
    done = python(theirs, script, "run")
    assert done.returncode == 2 and f"{script} is not of the rlhf-chat that Python imports, {HOME}" in done.stderr
