"""Text of models, files and users that would steer the terminal, and what steers it rightly."""

import io
import json
import os
import sys

import pytest
from rich.table import Table
from rich.text import Text

from inference.console import PrintableConsole
from inference.streams import Screen, Shown, json_text, printable, show_json, unguarded

RUDE = "a\x1b[2J\x1b]0;title\x07b\x9b31m\rc\u202ed\u2066e\x7f\tf\ng"
TAME = "a[2J]0;titleb31mcde\tf\ng"


def test_what_is_printed_does_not_steer():
    shown = Shown(io.StringIO())
    print(RUDE, file=shown)
    shown.writelines(["\x1b[A\x1b[2Kup", "\r\x1b[2Kover"])
    assert shown.getvalue() == f"{TAME}\n[A[2Kup[2Kover"
    unguarded(shown).write(RUDE)
    assert shown.getvalue().endswith(RUDE)


@pytest.mark.parametrize("text", ["\r 50%|█████     | 5/10", "\n\n\x1b[A\x1b[A", "\r", "Grüße, 你好, שלום"])
def test_progress_bars_and_other_scripts_stay(text):
    shown = Shown(io.StringIO())
    shown.write(text)
    assert shown.getvalue() == text


def test_rich_steers_and_text_in_it_does_not():
    shown = Shown(io.StringIO())
    console = PrintableConsole(file=shown, force_terminal=True, color_system="standard", width=40)
    console.print(Text(RUDE, "red"))
    table = Table("prompt")
    table.add_row(Text("\x1b[2Jevil\u202e"))
    table.add_row("good")
    console.print(table)
    said = shown.getvalue()
    assert "\x1b[31ma[2J]0;titleb31mcde" in said and "\x1b[2J" not in said and "\u202e" not in said
    assert len({len(line) for line in said.splitlines() if line.startswith("│")}) == 1  # the edges are in line


def test_data_for_programs_are_whole():
    values = {"text": RUDE}
    assert json.loads(json_text(values)) == values and printable(json_text(values)) == json_text(values)


def test_data_for_programs_are_not_broken_on_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    read, write = os.pipe()
    with Screen(os.fdopen(write, "wb", buffering=0), "utf-8", newline="\n", write_through=True) as terminal:
        monkeypatch.setattr(sys, "stdout", Shown(terminal))
        show_json({"text": "words and " * 20})
    with open(read, encoding="utf-8") as found:
        assert json.load(found) == {"text": "words and " * 20}
