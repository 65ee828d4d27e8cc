import pickle
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from tests.full_disk import small_disk
from training.data.token_cache import TokenCache, fingerprint
from training.data_settings import DataSettings
from training.metrics import Display

SETTINGS = DataSettings(max_prompt_tokens=8, max_response_tokens=3)
ROWS = [
    {"prompt": [{"role": "user", "content": "how are you"}], "chosen": "fine", "rejected": "go away now please"},
    {"prompt": [{"role": "user", "content": "hi"}], "chosen": "hello there", "rejected": "no"},
]
PARTS = ("prompt", "chosen", "rejected")


def cache(directory, word_format, rows=ROWS, parts=PARTS, settings=SETTINGS, small=0):
    return TokenCache(directory / "tokens", rows, parts, word_format, settings, small)


def as_lists(tokens):
    return [[part.tolist() for part in row] for row in tokens]


def test_what_is_read_is_what_was_made(tmp_path, word_format):
    first = cache(tmp_path, word_format)
    first.fill()
    kept = cache(tmp_path, word_format).load()
    expected = [
        [
            word_format.prompt_ids(row["prompt"], 8),
            word_format.response_ids(row["chosen"], 3),
            word_format.response_ids(row["rejected"], 3),
        ]
        for row in ROWS
    ]
    assert as_lists(kept) == expected == as_lists(first.make())
    assert all(part.dtype == torch.int64 for row in kept for part in row)
    assert [file.name for file in (tmp_path / "tokens").iterdir()] == [first.file.name]


def test_a_full_cache_makes_nothing_again(tmp_path, word_format, monkeypatch):
    cache(tmp_path, word_format).fill()
    monkeypatch.setattr(TokenCache, "make", lambda self: pytest.fail("made again"))
    again = cache(tmp_path, word_format)
    again.fill()
    assert len(again.read()) == 2


def test_making_tokens_shows_how_far_it_is(tmp_path, word_format, capsys):
    cache(tmp_path, word_format).fill(Display())
    assert capsys.readouterr().out == "Tokens of rows 2/2 · 0:00 left\n"
    cache(tmp_path, word_format).fill(Display())
    cache(tmp_path, word_format, rows=ROWS[:1], small=10_000).fill(Display())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [{**ROWS[0], "chosen": "Fine"}, ROWS[1]]},
        {"rows": ROWS[::-1]},
        {"rows": ROWS[:1]},
        {"parts": ("prompt", "chosen")},
        {"settings": DataSettings(max_prompt_tokens=7, max_response_tokens=3)},
        {"settings": DataSettings(max_prompt_tokens=8, max_response_tokens=4)},
    ],
)
def test_other_content_has_another_file(tmp_path, word_format, change):
    assert cache(tmp_path, word_format, **change).file != cache(tmp_path, word_format).file


def test_what_is_not_tokenised_does_not_matter(tmp_path, word_format):
    rows = [{**row, "source": "elsewhere"} for row in ROWS]
    assert cache(tmp_path, word_format, rows=rows).file == cache(tmp_path, word_format).file


def test_another_template_or_vocabulary_has_another_file(word_format, monkeypatch):
    before = fingerprint(word_format)
    monkeypatch.setattr(word_format.tokenizer, "chat_template", word_format.tokenizer.chat_template + " ")
    changed = fingerprint(word_format)
    monkeypatch.undo()
    assert changed != before == fingerprint(word_format)


def test_a_damaged_file_is_made_again(tmp_path, word_format):
    first = cache(tmp_path, word_format)
    first.fill()
    whole = first.file.read_bytes()
    made = first.make()
    for content in (whole[:-3], save({"ids": made.ids[:-1], "lengths": made.lengths.flatten()})):
        first.file.write_bytes(content)
        assert as_lists(cache(tmp_path, word_format).read()) == as_lists(made)
    cache(tmp_path, word_format).fill()
    assert first.file.read_bytes() == whole


def test_small_sets_are_not_kept(tmp_path, word_format):
    small = cache(tmp_path, word_format, small=10_000)
    small.fill()
    assert not (tmp_path / "tokens").exists() and len(small.read()) == 2


def test_a_directory_that_cannot_be_written_costs_nothing_but_time(tmp_path, word_format):
    (tmp_path / "tokens").write_text("a file")
    blocked = cache(tmp_path, word_format)
    blocked.fill()
    assert as_lists(blocked.read()) == as_lists(blocked.make())


def test_kept_tokens_on_a_full_disk(tmp_path, word_format):
    with small_disk(tmp_path / "disk", 4):
        (tmp_path / "disk" / "filler").write_bytes(b"x" * 4096)
        full = cache(tmp_path / "disk", word_format)
        full.fill()
        assert as_lists(full.read()) == as_lists(full.make())
        assert not list(full.directory.iterdir())


def test_a_million_rows_are_mapped_and_a_batch_reads_its_own(tmp_path, word_format):
    rows = 1_000_000
    kept = cache(tmp_path, word_format, rows=range(rows), parts=("prompt", "response"))
    kept.content = "hash", rows
    kept.directory.mkdir()
    save_file({"ids": torch.arange(4 * rows).int(), "lengths": torch.tensor([3, 1]).int().repeat(rows)}, kept.file)
    tokens = kept.load()
    places = [
        line.split()[0]
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        if kept.file.name in line
    ]
    mapped = [range(*(int(end, 16) for end in place.split("-"))) for place in places]
    assert any(tokens.ids.data_ptr() in each for each in mapped)
    seconds = []
    for start in range(5):
        begun = time.process_time()
        batch = [tokens[row] for row in range(start, rows, rows // 64)]
        seconds.append(time.process_time() - begun)
    assert min(seconds) < 0.005
    assert len(tokens) == rows and as_lists(batch[:1]) == [[[16, 17, 18], [19]]]


def test_what_is_read_takes_no_other_row_along(tmp_path, word_format):
    rows = [{"prompt": [{"role": "user", "content": f"how are you {i}"}]} for i in range(200)]
    filled = cache(tmp_path, word_format, rows=rows, parts=("prompt",))
    filled.fill()
    for tokens in (filled.load(), filled.make()):
        ((prompt,), *_) = tokens
        assert prompt.untyped_storage().nbytes() == 8 * len(prompt)
        assert len(pickle.dumps(prompt)) < 1000
