"""Lines on terminals of any width."""

import os

import pytest

from inference.streams import Screen, broken, cells, columns


def screen(monkeypatch, *writes: str, width: int = 40) -> list[str]:
    """The lines of what was written."""
    monkeypatch.setenv("COLUMNS", str(width))
    read, write = os.pipe()
    with Screen(os.fdopen(write, "wb", buffering=0), "utf-8", newline="\n", write_through=True) as shown:
        for text in writes:
            assert shown.write(text) == len(text)
    with open(read, encoding="utf-8", newline="\n") as found:
        return found.read().split("\n")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_lines_break_between_words_and_lose_nothing(monkeypatch, width):
    words = "The reward model ranks held-out pairs; 你好 世界 🙂 and naïve words, " * 9
    lines = screen(monkeypatch, words, "\n", "short\n", width=width)
    assert lines[-2:] == ["short", ""] and " ".join(lines[:-2]).split() == words.split()
    assert all(width - 12 < cells(line) <= width for line in lines[:-3])


def test_a_line_goes_on_below_its_text(monkeypatch):
    assert screen(monkeypatch, "  batch        64 rows = 8 in a micro-batch x 8\n") == [
        "  batch        64 rows = 8 in a",
        "               micro-batch x 8",
        "",
    ]
    assert broken("versions   ok   torch 2 and a_name_that_has_no_room_beside", 0, 30)[0].split("\n") == [
        "versions   ok   torch 2 and",
        "a_name_that_has_no_room_beside",
    ]


def test_pieces_colours_and_bars(monkeypatch):
    assert screen(monkeypatch, "one ", "two", " three", " four", width=12) == ["one two", "three four"]
    coloured = screen(monkeypatch, "\x1b[31m" + "red " * 12 + "\x1b[0m")
    assert [cells(line) for line in coloured] == [39, 8]
    bar = "\r\x1b[2K" + "━" * 40
    assert screen(monkeypatch, bar, bar) == [bar + bar]
    assert screen(monkeypatch, "你好" * 10 + " 世界") == ["你好" * 10, "世界"]


def test_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "57")
    assert columns() == 57
    monkeypatch.delenv("COLUMNS")
    read, write = os.pipe()
    assert columns(read) == 100
    os.close(read)
    os.close(write)
