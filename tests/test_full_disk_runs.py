"""A run of two processes whose disk fills up in the middle of a checkpoint, given more room, comes to its end."""

from tests.conftest import rlhf_chat
from tests.full_disk import small_disk


def test_two_processes_on_a_full_disk(tmp_path, workplace):
    disk = tmp_path / "disk"
    settings = {"checkpoint_every": 4, "keep_checkpoints": 3, "max_steps": 8, "optimizer.zero_stage": 1}
    arguments = [part for key, value in settings.items() for part in ("--set", f"sft.{key}={value}")]
    command = ("sft", disk / "run", "--model", "tiny", "--processes", 2, *arguments)
    with small_disk(disk, 3500) as make_room:  # rows and one checkpoint, of which each rank writes a part
        done = rlhf_chat(*command, cwd=workplace)
        assert done.code == 2, done.out + done.err
        assert done.err == (
            f"rlhf-chat: The disk of {disk / 'run/step1_sft/checkpoints'} is full, so checkpoint 8 could not be "
            f"written: make room, then the same command goes on from checkpoint 4.\n"
        )
        assert (disk / "run/step1_sft/checkpoints/4").is_dir()
        make_room(20_000)
        done = rlhf_chat(*command, cwd=workplace)
        assert done.code == 0 and "going on after optimiser step 4" in done.out, done.err
        assert {entry.name for entry in (disk / "run/step1_sft/checkpoints").iterdir()} == {"4", "8"}
