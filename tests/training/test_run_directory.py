import json
import os
import subprocess
import sys

import pytest
import torch

from inference.errors import UserError
from training.checkpoints import Checkpoints
from training.distributed import Ranks
from training.metrics import Journal
from training.run_directory import RunDirectory, write_directory, write_text
from training.steps import SFT

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_a_run_is_locked_for_one_command_at_a_time(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with run.locked():
        program = (
            "import sys; from pathlib import Path; from training.run_directory import RunDirectory\n"
            "from inference.errors import UserError\n"
            "try:\n  RunDirectory(Path(sys.argv[1])).locked().__enter__()\n"
            "except UserError as error: print(error); sys.exit(2)\n"
        )
        other = subprocess.run([sys.executable, "-c", program, run.path], capture_output=True, text=True)
        assert other.returncode == 2 and "is in use by another command" in other.stdout
    with run.locked():
        pass


def test_a_new_run_that_is_refused_leaves_what_was_there(tmp_path):
    run = RunDirectory(tmp_path / "new" / "run")
    for there in ([], [run.path / ".keep"]):
        for file in there:
            file.parent.mkdir(parents=True)
            file.touch()
        with pytest.raises(UserError, match="few"), run.locked():
            for name in ("models/m", "tokens", "step1_sft/model", ".models.tmp"):
                (run.path / name).mkdir(parents=True)
            for name in ("config.yaml", "starts.jsonl", "error.json"):
                (run.path / name).touch()
            raise UserError("few")
        assert list(tmp_path.rglob("*")) == ([run.path.parent, run.path, *there] if there else [])


def test_missing_step_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"step1_sft of .* is not finished; run it first: rlhf-chat sft"):
        RunDirectory(tmp_path).require_model(SFT)


def test_directories_appear_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"

    def fails(directory):
        (directory / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_directory(target, fails)
    assert not target.exists()
    write_directory(target, lambda directory: (directory / "a").write_text("1"))
    write_directory(target, lambda directory: (directory / "b").write_text("2"))
    assert [f.name for f in target.iterdir()] == ["b"]
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_write_text_replaces_at_once(tmp_path):
    write_text(tmp_path / "f", "old")
    write_text(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "new" and os.listdir(tmp_path) == ["f"]


def test_newest_checkpoints_are_kept_and_found(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2, ranks=ALONE)
    assert checkpoints.newest() is None
    for number in (5, 10, 15):
        checkpoints.save(number, lambda d, n=number: (d / "w").write_text("w" * n), {"score": number})
    assert checkpoints.numbers() == [10, 15]
    directory, state = checkpoints.newest()
    assert (directory.name, state["score"], state["number"]) == ("15", 15, 15)


def test_an_unfinished_checkpoint_is_not_seen(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, ranks=ALONE)
    checkpoints.save(1, lambda d: (d / "w").write_text("w"), {})
    (tmp_path / ".2.tmp").mkdir()
    assert checkpoints.newest()[0].name == "1"


@pytest.mark.parametrize("damage", ["cut", "missing", "state"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path, keep=3, ranks=ALONE)
    for number in (1, 2):
        checkpoints.save(number, lambda d: (d / "weights").write_text("123456"), {})
    if damage == "cut":
        (tmp_path / "2" / "weights").write_text("123")
    elif damage == "missing":
        (tmp_path / "2" / "weights").unlink()
    else:
        (tmp_path / "2" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"is damaged .* delete .*2 to go on from the one before"):
        checkpoints.newest()


def test_another_number_of_processes_is_refused_where_an_earlier_version_wrote(tmp_path):
    for number, name in enumerate(("0.safetensors", "0.pt"), 1):
        Checkpoints(tmp_path, keep=1, ranks=ALONE).save(number, lambda d, name=name: (d / name).touch(), {})
        state = tmp_path / str(number) / "state.json"
        state.write_text(json.dumps({**json.loads(state.read_text()), "ranks": 2}))
        if number == 1:
            assert Checkpoints(tmp_path, keep=1, ranks=ALONE).newest()[1]["ranks"] == 2
    with pytest.raises(UserError, match="written by 2 processes in DeepSpeed's form"):
        Checkpoints(tmp_path, keep=1, ranks=ALONE).newest()


def test_journal_forgets_what_came_after_and_a_torn_line(tmp_path):
    journal = Journal(tmp_path / "m.jsonl")
    for number in (1, 2, 3):
        journal.write(number, {"loss": number / 2})
    with open(journal.file, "a", encoding="utf-8") as handle:
        handle.write('{"number": 4, "lo')
    journal.rewind(2)
    assert journal.read() == [{"number": 1, "loss": 0.5}, {"number": 2, "loss": 1.0}]
    journal.file.write_bytes(journal.file.read_bytes()[:-1])  # a crash took the end of the line alone
    journal.rewind(2)
    journal.write(3, {"loss": 1.5})
    assert [row["number"] for row in journal.read()] == [1, 2, 3]


def test_going_on_decodes_no_whole_line(tmp_path, monkeypatch):
    """Of rollouts there may be gigabytes."""
    journal = Journal(tmp_path / "rollouts.jsonl")
    for number in (1, 2, 3):
        journal.write(number, {"prompt": "Hi"})
    with monkeypatch.context() as patched:
        patched.setattr("training.metrics.read_line", None)
        journal.rewind(2)
    assert [row["number"] for row in journal.read()] == [1, 2]
