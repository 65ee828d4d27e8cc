"""Disks that are full or refuse: real ones of a few kilobytes, and the error numbers of the others."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from inference.chat_format import ChatFormat
from inference.disk import file_sentence, is_disk_full, writing
from inference.errors import UserError
from tests.full_disk import small_disk

WAYS = {
    "text": lambda place: (place / "x").write_text("x" * 10**6),
    "torch": lambda place: torch.save({"a": torch.zeros(10**6)}, place / "x.pt"),
    "safetensors": lambda place: save_file({"a": torch.zeros(10**6)}, place / "x.safetensors"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_library_that_fills_a_disk_ends_in_the_sentence(tmp_path, way):
    with small_disk(tmp_path / "disk", 256), pytest.raises(UserError) as refused:
        with writing("the thing", tmp_path / "disk", "then go on"):
            WAYS[way](tmp_path / "disk")
    expected = f"The disk of {tmp_path / 'disk'} is full, so the thing could not be written: make room, then go on."
    assert str(refused.value) == expected


def test_a_tokenizer_on_a_full_disk(tmp_path, tiny_model_directory):
    with small_disk(tmp_path / "disk", 8), pytest.raises(UserError, match="is full, so the model could not"):
        with writing("the model", tmp_path / "disk"):
            ChatFormat.load(tiny_model_directory).save(tmp_path / "disk")


def test_what_is_no_matter_of_disks_passes_through(tmp_path):
    for error in (ValueError("x"), ConnectionResetError(errno.ECONNRESET, "reset"), RuntimeError("mat1 and mat2")):
        with pytest.raises(type(error)), writing("it", tmp_path):
            raise error


def test_a_failed_write_on_a_disk_with_room_is_not_called_full(tmp_path):
    with pytest.raises(UserError, match=r"cannot be written \(a write failed\)"), writing("it", tmp_path / "none"):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")


def test_a_refused_place_is_named_with_the_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\), the model is not there: set that"):
        with writing("the model", tmp_path):
            (tmp_path / "file" / "below").write_text("")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENOENT])
def test_errors_about_files_have_a_sentence_at_the_boundary(number):
    said = file_sentence(OSError(number, os.strerror(number), "runs/demo/.lock"))
    assert said is not None and said.startswith(f"runs/demo/.lock cannot be used ({os.strerror(number)}): check")


def test_a_full_disk_is_recognised_wherever_it_hides():
    hidden = ValueError("it failed")
    hidden.__cause__ = OSError(errno.EDQUOT, "quota")
    assert is_disk_full(hidden) and file_sentence(hidden) is not None
    assert file_sentence(ValueError("x")) is None and file_sentence(BrokenPipeError(errno.EPIPE, "pipe")) is None
