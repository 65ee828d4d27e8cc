"""Locks hold, end with their holder, and hold where the file system knows none."""

import errno
import fcntl
import os
import socket
from contextlib import ExitStack
from threading import Timer

import pytest

from inference import disk
from inference.disk import hold_lock, is_held
from inference.errors import UserError


@pytest.fixture(params=[None, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def known(request, monkeypatch) -> bool:
    """Whether flock is known; it is not on three file systems."""

    def flock(handle, operation):
        raise OSError(request.param, os.strerror(request.param))

    if request.param is not None:
        monkeypatch.setattr(disk.fcntl, "flock", flock)
    return request.param is None


def test_one_holds_it_and_the_next_one_can(known, tmp_path):
    file, waited = tmp_path / "new" / "lock", []
    with hold_lock(file, "It is taken", 0):
        with (
            pytest.raises(UserError, match=r"^It is taken; wait until it has ended"),
            hold_lock(file, "It is taken", 0.3, lambda: waited.append(1)),
        ):
            pass
        assert waited == [1]
        with hold_lock(tmp_path / "new" / "other", "Another one", 0):
            pass
        assert is_held(file) and not is_held(tmp_path / "new" / "third")
    assert not is_held(file)
    with hold_lock(file, "It is free again", 0):
        pass


def test_a_look_at_a_lock_refuses_nobody(tmp_path):
    file = tmp_path / "lock"
    look = os.open(file, os.O_CREAT)
    fcntl.flock(look, fcntl.LOCK_SH)
    Timer(0.03, os.close, [look]).start()
    with hold_lock(file, "It is taken", 0):
        pass


def test_a_lock_that_its_holder_has_removed_is_not_held(known, tmp_path):
    file = tmp_path / "lock"
    with hold_lock(file, "first", 0), ExitStack() as stack:
        old = stack.enter_context(open(file, "a", encoding="utf-8"))  # as of somebody who came before it was removed
        file.unlink()
        assert not disk._is_there(file, old)
    with hold_lock(file, "second", 0), pytest.raises(UserError), hold_lock(file, "third", 0):
        pass


@pytest.mark.parametrize("known", [errno.ENOLCK], indirect=True)
def test_another_machine_is_named_and_what_this_one_left_is_taken_over(known, tmp_path):
    file, owner = tmp_path / "lock", tmp_path / "lock.host"
    owner.write_text("node-7")
    with pytest.raises(UserError, match=rf"^In use on node-7 \(if nothing runs there any more, delete {owner}\); wait"):
        hold_lock(file, "In use", 0).__enter__()
    owner.write_text(socket.gethostname())
    with hold_lock(file, "Free", 0):
        assert owner.exists()
    assert not owner.exists()


@pytest.mark.parametrize("known", [errno.ENOSYS], indirect=True)
def test_without_any_lock_nothing_begins(known, tmp_path, monkeypatch):
    class NoNames(socket.socket):
        def bind(self, address):
            raise FileNotFoundError(2, "no such names")

    monkeypatch.setattr(disk.socket, "socket", NoNames)
    with pytest.raises(UserError, match=r"lies on a file system without locks, .* choose a place on another one"):
        hold_lock(tmp_path / "lock", "", 0).__enter__()
