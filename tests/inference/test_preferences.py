"""The file of preferences: none is lost, whatever ends the process, fills the disk or writes at the same time."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from statistics import median

import pytest

from inference.errors import UserError
from inference.preferences import Answer, BlindPair, Preference, PreferenceFile, checked_name
from tests.full_disk import small_disk

PAIR = BlindPair(
    [{"role": "user", "content": "Wie geht's?\u2028🙂"}],
    Answer("demo/sft", "Fine.\nAnd you?", 1),
    Answer("demo/rlhf", "Great!", 2),
    temperature=0.7,
    max_tokens=32,
)
PREFERENCES = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from inference.preferences import Preference, PreferenceFile
file, name, count = PreferenceFile(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3])
pattern = Preference.of(sys.argv[4])
def preference(number):
    file.add(replace(pattern, id=f"{name}-{number}", by=name))
    print(f"{name}-{number}", flush=True)
"""
LOOP = PREFERENCES + "for number in range(count): preference(number)"
ENDS = (
    PREFERENCES
    + """
def kill(*_): os.kill(os.getpid(), signal.SIGKILL)
def half(file, line, write=os.write): write(file, line[: len(line) // 2]); kill()
def unended(file, line, write=os.write): write(file, line[:-1]); kill()
ways = {"before": ("write", kill), "half": ("write", half), "unended": ("write", unended), "after": ("fsync", kill)}
preference(0)
for number, (call, instead) in enumerate(ways.values(), 1):
    if (child := os.fork()) == 0:
        setattr(os, call, instead)
        preference(f"killed-{number}")
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    preference(number)
"""
)


def process_that_adds(program: str, path, name: str, count: int = 0) -> "subprocess.Popen[str]":
    given = str(path), name, str(count), PAIR.judged("a", "nobody").line
    return subprocess.Popen([sys.executable, "-c", program, *given], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def file(tmp_path) -> PreferenceFile:
    return PreferenceFile(tmp_path / "preferences.jsonl")


def test_a_preference_is_read_as_it_was_given(file):
    assert file.read() == [] and not file.path.exists()
    given = [PAIR.judged(winner, " Ada  L. ") for winner in ("a", "b", "tie", "both bad")]
    for preference in given:
        file.add(preference)
    assert file.read() == given
    assert json.loads(file.path.read_bytes().splitlines()[0]) == {
        "id": PAIR.id,
        "time": given[0].time,
        "by": "Ada L.",
        "prompt": PAIR.prompt,
        "response_a": "Fine.\nAnd you?",
        "response_b": "Great!",
        "winner": "a",
        "model_a": "demo/sft",
        "model_b": "demo/rlhf",
        "seed_a": 1,
        "seed_b": 2,
        "temperature": 0.7,
        "max_tokens": 32,
    }
    assert replace(BlindPair.again(given[1]), id=PAIR.id) == PAIR


def test_sides_are_drawn():
    one, other = PAIR.left, PAIR.right
    pairs = [BlindPair.of(PAIR.prompt, one, other, 0.7, 32) for _ in range(200)]
    assert 60 < sum(pair.left == one for pair in pairs) < 140  # beyond: once in 10 million
    assert all({pair.left.model, pair.right.model} == {one.model, other.model} for pair in pairs)
    assert len({pair.id for pair in pairs}) == 200


@pytest.mark.parametrize(("left", "right", "nothing"), [("a", "b", False), ("a", " a\n", True), ("a", " ", True)])
def test_what_teaches_nothing(left, right, nothing):
    pair = replace(PAIR, left=replace(PAIR.left, text=left), right=replace(PAIR.right, text=right))
    assert pair.teaches_nothing is nothing


def test_the_same_pair_with_its_sides_drawn_again():
    first = PAIR.judged("a", "ada")
    again = [BlindPair.again(first, redrawn=True) for _ in range(40)]
    assert {pair.left for pair in again} == {PAIR.left, PAIR.right}
    assert {pair.judged("b", "bob").pair for pair in again} == {first.pair}
    assert replace(first, response_b="Great").pair != first.pair != replace(first, prompt=first.prompt * 2).pair


@pytest.mark.parametrize("name", ["", "  ", "x" * 81, "\x1b[2J"])
def test_a_name_is_needed(name):
    with pytest.raises(UserError, match=r"^Say who judges: a name of 1 to 80"):
        checked_name(name)


def test_a_kill_at_any_moment_of_a_preference_loses_none_before_it(file):
    process = process_that_adds(ENDS, file.path, "ada")
    kept = process.communicate(timeout=60)[0].split()
    assert process.returncode == 0 and kept == [f"ada-{number}" for number in range(5)]
    found = [preference.id for preference in file.read()]
    assert [name for name in found if "killed" not in name] == kept
    assert [name for name in found if "killed" in name] == ["ada-killed-3", "ada-killed-4"]  # whole, if unacknowledged


def test_a_killed_process_has_kept_what_it_has_said(file):
    process = process_that_adds(LOOP, file.path, "ada", 10**6)
    said = [process.stdout.readline().strip() for _ in range(20)]
    process.kill()
    said += process.communicate(timeout=60)[0].split()
    found = [preference.id for preference in file.read()]
    assert said == found[: len(said)] and len(found) <= len(said) + 1


def test_ten_write_at_once(file):
    """Two processes and eight threads, while another one reads and takes back."""
    processes = [process_that_adds(LOOP, file.path, f"process-{number}", 10) for number in range(2)]

    def preference(name: str) -> None:
        for _ in range(10):
            file.add(PAIR.judged("a", name))

    threads = [threading.Thread(target=preference, args=(f"thread-{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        file.add(PAIR.judged("b", "eve"))
        assert file.undo("eve") not in file.read()
    for thread in threads:
        thread.join(60)
    for process in processes:
        process.communicate(timeout=60)
    by = [preference.by for preference in file.read()]
    people = [*(f"process-{number}" for number in range(2)), *(f"thread-{number}" for number in range(8))]
    assert {name: by.count(name) for name in by} == dict.fromkeys(people, 10)


@pytest.mark.parametrize("before", [0, 1])
def test_a_last_line_that_was_cut_off_is_healed(file, before):
    """At every byte; and the zeros that a crash leaves, behind a part of the line too."""
    line = PAIR.judged("a", "ada").line.encode()
    rests = [line[:length] for length in range(1, len(line))]
    given = [PAIR.judged("a", "ada")] * before
    start = "".join(f"{each.line}\n" for each in given).encode()
    for rest in rests:
        file.path.write_bytes(start + rest)
        assert file.read() == given, rest
    for rest in [*rests[:60:7], *rests[-3:], b"\0" * 70_000, line[:40] + b"\0" * 9]:
        file.path.write_bytes(start + rest)
        file.add(last := PAIR.judged("b", "ada"))
        assert file.read() == [*given, last], rest
    file.path.write_bytes(start + line)  # it is whole
    file.add(last)
    assert file.read() == [*given, Preference.of(line.decode()), last]


@pytest.mark.parametrize(
    "foreign",
    [
        "# Notes\n\nA last line without its end",
        "A line with its end\n",
        json.dumps([{"id": "1", "prompt": "Hi"}]),
        json.dumps({"id": "p1", "prompt": "Hi", "chosen": "x", "rejected": "y"}),
        '{"id": "p1", "prompt": "Hi", "chos',
        json.dumps({"id": "p1", "time": "noon"}),
        "\xff\xfe",
    ],
)
def test_a_file_of_another_kind_is_left_as_it_is(file, foreign):
    file.path.write_bytes(foreign.encode("latin-1"))
    for use in (file.read, file.require_own, lambda: file.undo("ada"), lambda: file.add(PAIR.judged("a", "ada"))):
        with pytest.raises(
            UserError, match=r"preferences.jsonl is no file of preferences \(line 1: .*choose another file"
        ):
            use()
    assert file.path.read_bytes() == foreign.encode("latin-1")
    mixed = f"{PAIR.judged('a', 'ada').line}\n{foreign.strip()}".encode()
    file.path.write_bytes(mixed)
    with pytest.raises(UserError, match="is no preference"):
        file.add(PAIR.judged("a", "ada"))
    assert file.path.read_bytes() == mixed


def test_a_damaged_line_is_named_and_stays(file):
    file.add(PAIR.judged("a", "ada"))
    bad = json.dumps({**json.loads(PAIR.judged("a", "ada").line), "winner": "left"}) + "\n"
    with open(file.path, "a", encoding="utf-8") as handle:
        handle.write(bad)
    for use in (file.read, lambda: file.undo("ada")):
        with pytest.raises(UserError, match=r"preferences.jsonl, line 2, is no preference \(winner: Input should be"):
            use()
    said: list[str] = []
    assert file.read_or_say(said.append) == [] and len(said) == 1
    assert (
        said[0].startswith(f"Warning: {file.path}, line 2, is no preference")
        and "no preference of it counts" in said[0]
    )
    file.add(PAIR.judged("b", "ada"))  # a preference is kept all the same
    assert bad in file.path.read_text() and len(file.path.read_text().split("\n")[:-1]) == 3


def test_links_and_rights_stay_and_new_files_have_those_of_the_umask(file, tmp_path):
    """The lock lies beside the file itself, so that it is one lock under both names."""
    home = tmp_path / "home"
    home.mkdir()
    file.path.symlink_to(home / "preferences.jsonl")
    before = os.umask(0o002)
    try:
        file.add(PAIR.judged("a", "ada"))
        os.umask(0o077)
        file.add(PAIR.judged("a", "bob"))
        assert file.undo("ada") and file.path.is_symlink()
    finally:
        os.umask(before)
    assert [each.by for each in PreferenceFile(home / "preferences.jsonl").read()] == ["bob"]
    rights = {path.name: path.stat().st_mode & 0o777 for path in home.iterdir()}
    assert rights == {"preferences.jsonl": 0o664, ".preferences.jsonl.lock": 0o664}


def test_undo_takes_the_newest_of_that_person_and_leaves_the_rest_as_it_is(file):
    given = [PAIR.judged("a", name) for name in ("ada", "bob", "ada", "bob")]
    for preference in given:
        file.add(preference)
    lines = file.path.read_text().split("\n")[:-1]
    lines[0] = lines[0][:-1] + ', "of": "a newer version"}'
    file.path.write_text("\n".join(lines) + "\n")
    assert file.undo("ada") == given[2]
    assert file.path.read_text().split("\n")[:-1] == [lines[0], lines[1], lines[3]]
    assert file.undo(" ada ") == given[0] and file.undo("ada") is None and file.undo("eve") is None
    assert file.read() == [given[1], given[3]]
    assert sorted(path.name for path in file.path.parent.iterdir()) == [f".{file.path.name}.lock", file.path.name]


def test_a_full_disk_keeps_what_was_there(tmp_path):
    with small_disk(tmp_path / "disk", 16) as make_room:
        file = PreferenceFile(tmp_path / "disk" / "preferences.jsonl")
        long = replace(PAIR, left=Answer("demo/sft", "x" * 3000, 1))
        given = []
        with pytest.raises(UserError) as refused:
            while len(given) < 10:
                file.add(preference := long.judged("a", "ada"))
                given.append(preference)
        assert str(refused.value) == (
            f"The disk of {file.path} is full, so the preference could not be written: make room, then judge it again."
        )
        kept = file.path.read_bytes()
        assert len(given) >= 2 and file.read() == given and kept.endswith(b"\n")
        with pytest.raises(UserError, match="is full"):
            file.undo("ada")
        assert file.path.read_bytes() == kept
        make_room(64)
        file.add(preference)
        assert file.read() == [*given, preference] and file.undo("ada") == preference


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*, the preference is not there"):
        PreferenceFile(tmp_path / "file" / "preferences.jsonl").add(PAIR.judged("a", "ada"))


def test_a_preference_is_on_the_disk_when_add_returns(file, monkeypatch):
    """The limit of 100 ms is that of people, who do not notice less."""
    synced, fsync = [], os.fsync
    monkeypatch.setattr("os.fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), fsync(handle)))
    seconds = []
    for number in range(1, 21):
        began = time.perf_counter()
        file.add(PAIR.judged("a", "ada"))
        seconds.append(time.perf_counter() - began)
        assert synced.count(file.path.stat().st_ino) == number
    assert file.path.parent.stat().st_ino in synced  # its name too
    assert median(seconds) < 0.1


def test_fields_that_a_newer_version_adds_are_read_over():
    preference = PAIR.judged("tie", "ada")
    assert Preference.of(preference.line[:-1] + ', "more": 1}') == preference
    with pytest.raises(ValueError, match="seed_a: Input should be a valid integer"):
        Preference.of(preference.line.replace('"seed_a": 1', '"seed_a": "1"'))
