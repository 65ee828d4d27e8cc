"""What is shown ends no work: readers that go, full disks, encodings that lack a character, closed streams."""

import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from inference.errors import UserError
from inference.streams import EXIT_READER_GONE, STAND_INS, guard_output
from tests.conftest import rlhf_chat
from tests.warm import ROOT, Command, Done, fork_all
from training.run_directory import RunDirectory
from training.steps import SFT


@dataclass(frozen=True)
class Unread(Command):
    """`rlhf-chat` whose output nobody reads any more, or is to be kept in `file`, in ASCII."""

    errors_too: bool = True
    file: str = ""

    def __call__(self) -> None:
        read_end, write_end = os.pipe()
        os.close(read_end)
        if self.file:
            write_end = os.open(self.file, os.O_WRONLY)
        for descriptor in (1, 2)[: 1 + self.errors_too]:
            os.dup2(write_end, descriptor)
        sys.stdout = open(1, "w", encoding="ascii", closefd=False)  # noqa: SIM115
        super().__call__()


def unread(*arguments: object, cwd: Path, errors_too: bool = True) -> Done:
    return fork_all([Unread(tuple(map(str, arguments)), errors_too)], [{}], cwd, "", 120)[0]


def test_training_goes_on_without_a_reader(tmp_path):
    run = tmp_path / "run"
    done = unread("sft", run, "--model", "tiny", "--data", ROOT / "tests/data/pairs.jsonl", cwd=tmp_path)
    assert done.code == 0 and (run / "step1_sft/result.json").exists()
    assert "Talk to it" in (run / "log.txt").read_text(encoding="utf-8")
    assert "held-out loss" in (shown := (run / "step1_sft/log.txt").read_text(encoding="utf-8")) and "·" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["run", "--model", "opt-13b", "--dry-run"],
        ["plan", "--model", "tiny", "--effort", 0],
    ],
)
def test_what_only_prints_ends_quietly(arguments, tmp_path):
    done = unread(*arguments, cwd=tmp_path, errors_too=False)
    assert (done.code, done.err) == (EXIT_READER_GONE, "")


def test_a_full_disk_under_a_report_is_a_sentence(tmp_path):
    command = Unread(("run", "--model", "tiny", "--dry-run"), errors_too=False, file="/dev/full")
    done = fork_all([command], [{}], tmp_path, "", 60)[0]
    assert done.code == 2 and done.err.startswith("rlhf-chat: The disk is full") and done.err.count("\n") == 1


def test_each_locale_has_the_same_file_names(tmp_path):
    """Started cold: Python settles its encodings before our first line."""
    (tmp_path / "pärs 日本.jsonl").write_bytes((ROOT / "tests/data/pairs.jsonl").read_bytes())
    command = [sys.executable, "-m", "rlhf_chat", "data", "show", "pärs 日本.jsonl"]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env={**environment(), **locale})
    assert done.returncode == 0, done.stderr.decode()
    assert b"p?rs ??.jsonl" in done.stdout and b"between [ and ]" in done.stdout


def test_a_name_that_is_no_text_is_refused(tmp_path):
    done = rlhf_chat("data", "show", b"z\xff.jsonl".decode(errors="surrogateescape"), cwd=tmp_path)
    assert done.code == 2 and "'z?.jsonl' is not UTF-8 text" in done.err


def test_stand_ins():
    file = io.BytesIO()
    guard_output()
    stream = io.TextIOWrapper(file, "ascii", STAND_INS)
    stream.write("┏━┓ │ ║ ┴ ⟦x⟧ – · 🙂 \udcff")
    stream.flush()
    assert file.getvalue() == b"+-+ | | + [x] - ? ? ?"


@dataclass(frozen=True)
class Printing:
    """Prints `text` behind the guard, to a reader that is slow or a stream that is closed."""

    closed: bool

    def __call__(self) -> None:
        if self.closed:
            os.close(1)
            sys.stdout = None  # type: ignore[assignment]  # what Python does then
            guard_output()
            print("nobody sees this")
            with open("file", "w", encoding="utf-8") as file:
                assert file.fileno() > 2
            return
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        if os.fork() == 0:
            os.close(write_end)
            count = sum(len(piece) for piece in iter(lambda: os.read(read_end, 4096), b""))
            os.write(2, str(count).encode())
            os._exit(0)
        os.dup2(write_end, 1)
        os.close(write_end)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        guard_output()
        print("x" * 300_000, flush=True)
        os.close(1)
        os.wait()


@pytest.mark.parametrize(("closed", "counted"), [(True, ""), (False, "300001")])
def test_closed_and_slow_streams(tmp_path, closed, counted):
    done = fork_all([Printing(closed)], [{}], tmp_path, "", 300)[0]
    assert (done.code, done.err) == (0, counted)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_commands_to_copy_are_quoted(tmp_path):
    for name, shown in (("my runs/it's", """'my runs/it'"'"'s'"""), ("-x", "./-x"), ("runs/demo", "runs/demo")):
        with pytest.raises(UserError, match=re.escape(f"rlhf-chat sft {shown}") + "$"):
            RunDirectory(Path(name)).require_model(SFT)
