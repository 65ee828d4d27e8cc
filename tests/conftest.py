"""What all tests share: the command, one finished run of the `tiny` preset, and a browser."""

import gc
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from inference.model_store import cache_directory
from tests.warm import ROOT, Command, Done, fork_all

gc.set_threshold(700, 10, 100)  # a search through all that the libraries have made is long, and finds nothing

LONGEST = (
    "test_switching",
    "test_survival",
    "test_survival_of_ranks",
    "test_launchers",
    "test_training_options",
    "test_zero_engine",
    "test_exactness",
    "test_fusion",
    "test_ppo_updates",
    "test_pipeline",
    "test_full_disk_runs",
    "test_readme",
)
"""Files that take a minute or more, most of them with ranks of their own."""


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: tests wait for files, ranks and clocks."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that none of them is left for one process at the end; spread out they took longer."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def rlhf_chat(*arguments: object, cwd: Path, stdin: str = "", timeout: float = 300, **environment: str) -> Done:
    """Run the command as a user would."""
    return fork_all([Command(tuple(map(str, arguments)))], [environment], cwd, stdin, timeout)[0]


@pytest.fixture(autouse=True)
def seed() -> None:
    """What a test draws does not depend on those before it: which worker has them is chance."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def state(tmp_path_factory) -> Path:
    """Where commands keep what runs may do: not where those of this user do."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    return Path(os.environ["XDG_STATE_HOME"])


@pytest.fixture(scope="session", autouse=True)
def kept(tmp_path_factory) -> None:
    """What commands keep: what this user has, but an excerpt of the rated texts, which need a network otherwise."""
    base, own = tmp_path_factory.getbasetemp(), cache_directory()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    shared.mkdir(exist_ok=True)
    there = {place.name: place for place in own.glob("*")}
    for name, place in (there | {"rated-texts-1": ROOT / "tests" / "data" / "rated_texts"}).items():
        with suppress(FileExistsError):  # of another worker
            (shared / name).symlink_to(place)
    os.environ["RLHF_CHAT_CACHE"] = str(shared)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """A working directory with folders named like ours, which must not be imported."""
    directory = tmp_path_factory.mktemp("workplace")
    for name in ("training", "inference", "applications"):
        (directory / name).mkdir()
        (directory / name / "__init__.py").write_text("raise ImportError('the wrong package')\n")
    return directory


@pytest.fixture(scope="session")
def tiny_run(workplace) -> Path:
    """`rlhf-chat run --model tiny --name demo` with a group's rights; output.txt has its output, rights.json the rights
    of its files at its end."""
    command = Command(("run", "--model", "tiny", "--name", "demo"), umask=0o002)
    [done] = fork_all([command], [{}], workplace, stdin="", timeout=300)
    assert done.code == 0, done.out[-3000:] + done.err[-3000:]
    (workplace / "output.txt").write_text(done.out)
    run = workplace / "runs" / "demo"
    rights = {str(path): path.stat().st_mode for path in [run, *run.rglob("*")]}
    (workplace / "rights.json").write_text(json.dumps(rights))
    return run


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Of the machine, without a window; where there is none the test is skipped."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=program)


@pytest.fixture
def page(chromium) -> Iterator[Page]:
    page = chromium.new_page()
    yield page
    page.close()


@pytest.fixture
def complaints(page) -> list[str]:
    """Errors of the page: exceptions, and what its security policy refused."""
    found: list[str] = []
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("console", lambda said: found.append(said.text) if said.type == "error" else None)
    return found
