"""What two real processes say to each other: flat tensors, time-outs, who is waited for, files that show late."""

import contextlib
import dataclasses
import io
import os
import re
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from inference.errors import UserError
from tests.ranks import run_ranks
from training import distributed, launchers
from training import stage_script as stage
from training.distributed import PATIENCE, RollCall, is_lost_peer, named
from training.launchers import wait_until_seen
from training.stage_script import end_in_sentences

GIVEN = [[7, 8, 9], []]


def talk(ranks, directory: Path) -> dict:
    """Called in processes of its own."""
    from training.hybrid_engine.deepspeed_setup import deepspeed

    gathered = ranks.gather_flat(torch.tensor(GIVEN[ranks.rank], dtype=torch.int32), "a test")
    default = dist.group.WORLD
    deepspeed.init_distributed()
    groups = [dist.new_group([0, 1]), deepspeed.comm.new_group([0, 1]), default]
    heard = io.StringIO()
    store = dist.distributed_c10d._get_default_store()
    others = {} if ranks.is_first else {"long": 0.1}
    hasty = dataclasses.replace(ranks, roll_call=RollCall(ranks.rank, 2, dist.PrefixStore("hasty", store), **others))
    said = directory / "said"
    hasty.roll_call._say = lambda what: (RollCall._say(hasty.roll_call, what), said.touch())
    with contextlib.redirect_stderr(heard):
        while ranks.is_first and not said.exists():
            time.sleep(0.01)
        hasty.barrier("preparing the data")
    file, pauses = directory / f"{ranks.rank}", []
    if ranks.is_first:
        file.touch()

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        file.touch()

    with patch.object(launchers.time, "sleep", pause):  # the other one's shows late
        ranks.see(file)
    return {
        "gathered": [part.tolist() for part in gathered],
        "sum": ranks.sum(torch.tensor([1.0 + ranks.rank])).tolist(),
        "told": ranks.tell({"from": ranks.rank}, "a test"),
        "on_first": ranks.gather_on_first(ranks.rank, "a test"),
        "same_group": dist.group.WORLD is default,
        "timeouts": [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups],
        "log": heard.getvalue(),
        "pauses": len(pauses),
    }


def test_two_processes(tmp_path):
    first, second = run_ranks(__file__, "talk", 2, tmp_path)
    for found in (first, second):
        assert found["gathered"] == GIVEN and found["sum"] == [3.0] and found["told"] == {"from": 0}
        assert found["same_group"] and set(found["timeouts"]) == {PATIENCE.total_seconds()}
    assert first["on_first"] == [0, 1] and second["on_first"] == []
    assert timedelta(hours=12) <= PATIENCE
    assert re.match(r"rank 1 has waited \d+ s for rank 0 \(preparing the data\)$", second["log"].splitlines()[0])
    assert first["log"] == "" and (first["pauses"], second["pauses"]) == (0, 1)


def test_a_rank_that_gave_no_sign_of_life_ends_the_one_that_waits_for_it(monkeypatch, capsys):
    """With a clock that goes on when the thread that watches pauses."""
    clock, codes, shared = [0.0], [], dist.PrefixStore("roll call", store := dist.HashStore())
    watch = RollCall._watch
    monkeypatch.setattr(distributed, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(RollCall, "_watch", lambda calls: None)  # in a thread of its own
    calls = RollCall(0, 3, store, long=60, silence=1800)
    shared.add("met/2", 1)

    def pause(seconds: float) -> bool:
        clock[0] += seconds
        if clock[0] < 600:  # rank 1 is late and alive, and then it is not
            shared.add("alive/1", 1)
        return bool(codes) or clock[0] > 9000

    monkeypatch.setattr(calls.over, "wait", pause)
    monkeypatch.setattr(distributed.os, "_exit", codes.append)
    with calls.meeting("generation"):
        calls.now.begun = 0.0
        watch(calls)
    assert codes == [distributed.EXIT_LOST] and 600 + 1800 < clock[0] < 600 + 1800 + 10
    waits = [f"rank 0 has waited {seconds} s for rank 1 (generation)" for seconds in (60, 120, 240, 480, 960, 1920)]
    ends = "rank 0 ends: rank 1 gave no sign of life; the same command goes on"
    assert capsys.readouterr().err.splitlines() == [*waits, ends]


def test_many_ranks_are_counted():
    assert named([3]) == "rank 3" and named([1, 2]) == "ranks 1, 2"
    assert named(list(range(20))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"


def test_a_file_that_shows_late_is_waited_for_and_one_that_never_does_is_a_sentence(tmp_path, monkeypatch):
    late = tmp_path / "late"
    monkeypatch.setattr(launchers.time, "sleep", lambda seconds: late.touch())
    wait_until_seen(late)
    with pytest.raises(UserError, match=r"does not see .*never, .* file system that all nodes share"):
        wait_until_seen(tmp_path / "never", seconds=0.1)


class Ended(BaseException):
    pass


def end(code: int) -> None:
    raise Ended(code)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("weights"), "KeyError: 'weights'"),
        (RuntimeError("[pair.cc:538] Connection closed by peer [127.0.0.1]:5"), "is gone ([pair.cc:538] Connection"),
        (dist.DistNetworkError("the server is gone"), "is gone (the server is gone): give the same command again"),
    ],
)
def test_an_error_of_one_of_several_ranks_ends_it_at_once(monkeypatch, capsys, tmp_path, error, said):
    """Leaving the process group may wait for the others, who wait for this rank."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(stage.time, "sleep", lambda seconds: None)
    left = []
    monkeypatch.setattr(dist, "is_initialized", lambda: left.append("asked") or False)

    def body() -> None:
        raise error

    with pytest.raises(Ended) as ended:
        end_in_sentences(body, tmp_path / "error.json")
    assert ended.value.args == (1,) and said in capsys.readouterr().err
    assert is_lost_peer(error) == ("gone" in said) and not (tmp_path / "error.json").exists()
