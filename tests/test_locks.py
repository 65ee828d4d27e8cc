"""The locks in locks/ name what requirements.txt names, and all that this needs, each with hashes."""

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def read(file: Path) -> dict[str, Requirement]:
    """What a lock installs here, with the files that it includes, by name; each package must be pinned, with hashes."""
    found = {}
    for block in re.split(r"\n(?=\S)", file.read_text(encoding="utf-8").strip()):
        first, *hashes = block.split(" \\\n    ")
        if first.startswith("-r "):
            found |= read(file.parent / first.removeprefix("-r "))
            continue
        pin = Requirement(first)
        assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), pin
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), pin
        if pin.marker is None or pin.marker.evaluate():
            assert canonicalize_name(pin.name) not in found, f"{pin.name} is there twice"
            found[canonicalize_name(pin.name)] = pin
    return found


lock = cache(lambda name: read(ROOT / "locks" / f"{name}.txt"))


@pytest.mark.parametrize("name", ["cpu", "cuda"])
class TestLock:
    def test_agrees_with_requirements(self, name):
        for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                wanted = Requirement(line)
                (pinned,) = lock(name)[canonicalize_name(wanted.name)].specifier
                assert wanted.specifier.contains(pinned.version), (line, pinned)

    def test_has_all_that_its_packages_need(self, name):
        for each in lock(name):
            for line in needs(each):
                (pinned,) = lock(name)[canonicalize_name(line.name)].specifier
                assert line.specifier.contains(pinned.version, prereleases=True), (each, str(line), pinned)


def needs(name: str) -> list[Requirement]:
    """What an installed package requires here without extras; nothing of one that is not installed."""
    try:
        lines = requires(name) or []
    except PackageNotFoundError:
        return []
    found = [Requirement(line) for line in lines]
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]


def test_only_the_cuda_lock_has_libraries_of_cuda():
    libraries = {name for name in lock("cuda") if name.startswith(("nvidia-", "cuda-")) or name == "triton"}
    assert {"nvidia-nccl-cu13", "triton"} <= libraries
    assert lock("cuda").keys() - lock("cpu").keys() == libraries


def test_locks_hold_no_address():
    text = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "locks").glob("*.txt"))
    assert not re.search(r"://|--(extra-)?index|--find-links", text)
