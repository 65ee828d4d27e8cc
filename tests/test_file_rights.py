"""Files of runs, exports and caches have the rights that the umask gives, and a run may be one to read only."""

import ctypes
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from applications.export import export
from inference.model_store import resolve_model
from tests.tiny_runs import make_tiny_run
from tests.warm import Command, fork_all
from training.run_directory import write_tensors
from training.steps import SFT

CAP_DAC_OVERRIDE = 1 << 1


@pytest.fixture(params=[0o002, 0o077], ids=["shared", "private"])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def others(place: Path, umask: int) -> list[str]:
    """What has other rights than a new file, or a new directory, would have."""
    return wrong({str(path): path.stat().st_mode for path in [place, *place.rglob("*")]}, umask)


def wrong(rights: dict[str, int], umask: int) -> list[str]:
    wanted = {path: (0o777 if stat.S_ISDIR(mode) else 0o666) & ~umask for path, mode in rights.items()}
    return [f"{path} {mode:o}" for path, mode in rights.items() if stat.S_IMODE(mode) != wanted[path]]


def test_of_a_run(tiny_run):
    rights = json.loads((tiny_run.parents[1] / "rights.json").read_text())
    assert len(rights) > 50 and wrong(rights, 0o002) == []


def test_of_an_export_and_of_caches(tiny_run, tmp_path, umask, monkeypatch):
    export(tiny_run, tmp_path / "model", "merged", "", "rlhf")
    export(tiny_run, tmp_path / "half", "merged", "bf16", "rlhf")
    monkeypatch.setenv("RLHF_CHAT_CACHE", str(tmp_path / "cache"))
    resolve_model("tiny", print)
    write_tensors(tmp_path / "tokens.safetensors", {"ids": torch.zeros(2)})
    assert [found for path in tmp_path.iterdir() for found in others(path, umask)] == []


def test_of_an_adapter(tmp_path, umask):
    run = make_tiny_run(tmp_path, lora_rank=2)
    export(run.path, tmp_path / "adapter", "adapter", "", "sft")
    assert others(run.step(SFT).adapter, umask) + others(tmp_path / "adapter", umask) == []


@pytest.fixture
def read_only(tiny_run):
    """The finished run, with no right to write for anybody."""
    paths = [tiny_run, *tiny_run.rglob("*")]
    for path in paths:
        path.chmod(path.stat().st_mode & ~0o222)
    yield tiny_run
    for path in paths:
        path.chmod(path.stat().st_mode | 0o220)


@dataclass(frozen=True)
class WithoutOverride(Command):
    """Bound by the rights of files, as root is not otherwise."""

    def __call__(self) -> None:
        if os.geteuid() == 0:
            libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            assert libc.capget(header, sets) == 0
            sets[0], sets[1] = sets[0] & ~CAP_DAC_OVERRIDE, sets[1] & ~CAP_DAC_OVERRIDE  # effective, permitted
            assert libc.capset(header, sets) == 0
        super().__call__()


def test_a_run_that_one_may_only_read(read_only, tmp_path):
    words = "chat RUN --max-tokens 3", "export RUN --to model", "report RUN --out page.html", "report RUN", "eval RUN"
    commands = [WithoutOverride(tuple(each.replace("RUN", str(read_only)).split())) for each in words]
    *fine, report, evaluation = fork_all(commands, [{}] * len(commands), tmp_path, "Hello", timeout=120)
    assert [done.code for done in fine] == [0, 0, 0] and (tmp_path / "page.html").exists(), fine
    assert report.code == 2 and "choose another place with --out" in report.err
    assert evaluation.code == 2 and "is not yours to write in" in evaluation.err
    assert "Traceback" not in report.err + evaluation.err
