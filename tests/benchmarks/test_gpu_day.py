"""The script for a day with a GPU runs in miniature on a CPU, section by section."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_day
from tests.ranks import run_ranks


def run_in_miniature(ranks, directory):
    """What the sections find, by section; called in a process of its own."""
    day, everything = gpu_day.miniature(), {}
    for name, section in gpu_day.SECTIONS.items():
        if name == "tests":
            continue
        found = everything.setdefault(name, {})
        more = {"ranks": ranks} if name in ("iteration", "large") else {}
        section.run(day, lambda what, found=found, **figures: found.update({what: figures}), **more)
    return everything


def test_every_section_runs_in_miniature(tmp_path):
    found = run_ranks(__file__, "run_in_miniature", 1, tmp_path)[0]
    assert all(found["equality"][name]["equal"] for name in ("opt-1.3b", "qwen2.5-0.5b"))
    assert found["bench"]["ruler"]["tokens"] == sum(gpu_day.ruler(gpu_day.miniature())[1])
    assert min(found["generate"][name]["milliseconds"] for name in ("eager", "graphs")) > 0
    for name in ("iteration", "large"):
        assert list(found[name]) == ["iteration 1", "iteration 2"]
        assert found[name]["iteration 2"]["slots"] == 4 and found[name]["iteration 2"]["gib_estimated"] > 0


def test_the_ruler_is_the_common_one():
    prompts, lengths = gpu_day.ruler(gpu_day.full_day())
    assert len(prompts) == 256 and sum(lengths) == gpu_day.RULER_TOKENS
    assert sum(map(len, prompts)) == 142_827


def test_sections_fit_into_the_time_and_their_tests_are_there():
    assert sum(section.limit for section in gpu_day.SECTIONS.values()) <= 480
    for file in gpu_day.CUDA_TESTS:
        assert "torch.cuda.is_available()" in (gpu_day.ROOT / file).read_text(encoding="utf-8")


def test_what_is_found_is_written_at_once(tmp_path):
    out: Path = tmp_path / "out.json"
    seen = []

    def run(name: str, limit: float) -> dict:
        seen.append((name, limit, out.exists() and list(json.loads(out.read_text(encoding="utf-8"))["sections"])))
        return {"figure": 1}

    gpu_day.main(["bench", "generate", "--out", str(out)], run)
    assert [(name, there) for name, _, there in seen] == [("bench", False), ("generate", ["bench"])]
    assert seen[0][1] == gpu_day.SECTIONS["bench"].limit
    gpu_day.main(["bench", "--out", str(out), "--seconds", "1"], run)
    assert json.loads(out.read_text(encoding="utf-8"))["sections"] == {"bench": {"error": "no time is left"}}


@pytest.mark.parametrize("is_late", [False, True])
def test_a_section_that_fails_or_is_late_keeps_what_it_found(is_late, monkeypatch):
    def run(command: list[str], timeout: float, **_: Any) -> subprocess.CompletedProcess:
        out = b'Loading\n{"a": {"b": 1}}\n'
        if is_late:
            raise subprocess.TimeoutExpired(command, timeout, out)
        return subprocess.CompletedProcess(command, 1, out, b"broken")

    monkeypatch.setattr(gpu_day.subprocess, "run", run)
    found = gpu_day.outcome("bench", 3)
    assert found["a"] == {"b": 1} and found["error"] == ("stopped after 3 seconds" if is_late else "broken")


def test_what_a_machine_lacks_is_named(monkeypatch):
    assert gpu_day.missing_packages() == []
    monkeypatch.setattr(gpu_day, "version", lambda name: {"torch": "2.10.0"}.get(name, "99!0"))
    lacking = gpu_day.missing_packages()
    assert "torch>=2.11 (here: 2.10.0)" in lacking and any(each.startswith("deepspeed") for each in lacking)
    assert not any(each.startswith("peft") for each in lacking)
