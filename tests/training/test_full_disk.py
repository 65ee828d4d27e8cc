"""Full disks in the middle of what a run writes: a sentence, the older checkpoint, and a way on once there is room."""

import json
from types import SimpleNamespace

import pytest
import torch

from inference.errors import EXIT_USER_ERROR, UserError
from tests.full_disk import small_disk
from training.checkpoints import Checkpoints
from training.distributed import Ranks
from training.error_report import leave_report, room_for_report
from training.metrics import Journal
from training.run_directory import write_directory, write_json
from training.stage_script import end_in_sentences

ALONE = Ranks(0, 1, torch.device("cpu"))


def write_kilobytes(number):
    return lambda place: torch.save(torch.zeros(number * 256), place / "state.pt")


def fill(disk):
    """Take the last byte."""
    with pytest.raises(OSError), open(disk / "filler", "wb", buffering=0) as handle:
        while handle.write(b" " * 512):
            pass


def test_a_checkpoint_on_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, 256) as make_room:
        checkpoints = Checkpoints(disk / "c", keep=2, ranks=ALONE)
        checkpoints.save(4, write_kilobytes(100), {})
        with pytest.raises(UserError) as refused:
            checkpoints.save(8, write_kilobytes(300), {})
        assert str(refused.value) == (
            f"The disk of {disk / 'c'} is full, so checkpoint 8 could not be written: make room, then the same command "
            f"goes on from checkpoint 4."
        )
        assert checkpoints.newest()[0].name == "4"
        assert [entry.name for entry in (disk / "c").iterdir()] == ["4"]
        make_room(1024)
        checkpoints.save(8, write_kilobytes(300), {})
        assert checkpoints.numbers() == [4, 8]


def test_what_several_ranks_left_half_written_goes_at_the_next_start(tmp_path):
    for name in (".8.tmp", ".4.old"):
        (tmp_path / name / "state").mkdir(parents=True)
    second = SimpleNamespace(is_first=False, tell=lambda value, phase: value)
    Checkpoints(tmp_path, keep=2, ranks=second).newest()
    assert len(list(tmp_path.iterdir())) == 2  # the first rank's business
    Checkpoints(tmp_path, keep=2, ranks=ALONE).newest()
    assert not list(tmp_path.iterdir())


def test_a_directory_on_a_full_disk_leaves_the_old_one_and_no_rest(tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, 256):
        write_directory(disk / "model", write_kilobytes(10))
        with pytest.raises(RuntimeError):
            write_directory(disk / "model", write_kilobytes(300))
        assert [entry.name for entry in disk.iterdir()] == ["model"]
        assert torch.load(disk / "model" / "state.pt").numel() == 2560


def test_a_journal_on_a_full_disk_loses_a_line_at_most(tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, 64) as make_room:
        journal = Journal(disk / "metrics.jsonl")
        written = 0
        with pytest.raises(UserError, match=r"The disk of .*metrics.jsonl is full"):
            for number in range(10_000):
                journal.write(number, {"loss": 0.5})
                written = number
        assert written > 100
        make_room(1024)
        journal.rewind(written)
        assert [row["number"] for row in journal.read()] == list(range(written + 1))


def test_a_file_on_a_full_disk_is_named_and_keeps_its_old_text(tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, 64):
        write_json(disk / "state.json", {"a": 1})
        fill(disk)
        with pytest.raises(OSError) as refused:
            write_json(disk / "state.json", {"a": "x" * 10_000})
        assert refused.value.filename == str(disk / "state.json")
        assert json.loads((disk / "state.json").read_text()) == {"a": 1}
        assert {entry.name for entry in disk.iterdir()} == {"state.json", "filler"}


def test_a_stage_says_why_it_ended_on_a_disk_without_a_byte_left(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CHAT_PARENT", "1")
    disk = tmp_path / "disk"

    def body():
        fill(disk)
        Journal(disk / "metrics.jsonl").write(1, {"loss": 0.5})

    with small_disk(disk, 64):
        file = disk / "step1_sft" / "error.json"
        with room_for_report(file):
            assert end_in_sentences(body, file) == EXIT_USER_ERROR
            report = json.loads(file.read_text())
        assert "metrics.jsonl is full" in report["sentence"] and report["code"] == EXIT_USER_ERROR
        assert [entry.name for entry in file.parent.iterdir()] == ["error.json"]
        with pytest.raises(OSError) as refused, room_for_report(disk / "error.json"):
            pass
        assert refused.value.filename == str(disk / "error.json")


def test_the_first_report_stays_and_an_older_one_goes(tmp_path):
    file = tmp_path / "error.json"
    file.write_text("of an earlier start")
    with room_for_report(file):
        assert not file.exists()
        leave_report(file, "The first.", 2)
        leave_report(file, "The second.", 2)
    assert json.loads(file.read_text()) == {"sentence": "The first.", "code": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["error.json"]


def test_an_error_of_the_system_ends_a_stage_in_a_sentence(tmp_path, capsys):
    def body():
        raise PermissionError(13, "Permission denied", "runs/demo/.lock")

    assert end_in_sentences(body, tmp_path / "error.json") == EXIT_USER_ERROR
    assert (
        "runs/demo/.lock cannot be used (Permission denied): check that place and its rights" in capsys.readouterr().err
    )
    with pytest.raises(ZeroDivisionError):
        end_in_sentences(lambda: 1 / 0, tmp_path / "other.json")
