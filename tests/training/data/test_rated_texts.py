"""Texts that people rated, from a small archive like the real one, and from an excerpt of the real texts."""

import io
import tarfile
from collections import Counter

import pytest

from inference.errors import UserError
from tests.warm import ROOT
from training.data.prepare import prepare_data
from training.data.rated_texts import DOMAINS, RatedText, load_texts, share_texts, texts_in, unpack_texts
from training.data.rows import read_rows
from training.data_settings import DataSettings

EXCERPT = ROOT / "tests" / "data" / "rated_texts"
SETTINGS = DataSettings(max_prompt_tokens=64, max_response_tokens=32)


def pack(files):
    """A packed archive, as bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_the_archive_becomes_texts_with_mean_and_single_ratings(tmp_path):
    resources = {}
    for name in DOMAINS.values():
        truth = "1\t0.5\tFish &amp; chips\t\u2013 caf\u00e9\r\n2\t-1.25\tRain  again.\r\n"
        ratings = "\ufeff1\t0.5\t0.5\t[1, 0]\r\n2\t-2.0\t0.1\t[-2, -2]\r\n"
        for part, text in (("GroundTruth", truth), ("anonDataRatings", ratings)):
            resources[f"hutto_ICWSM_2014/{name}_{part}.txt"] = text.encode()
    inner = pack(resources)
    root = "vaderSentiment-3.3.2"
    files = {f"{root}/LICENSE.txt": b"MIT", f"{root}/additional_resources/hutto_ICWSM_2014.tar.gz": inner}
    (tmp_path / "file.tar.gz").write_bytes(pack(files))
    unpack_texts(tmp_path / "file.tar.gz", tmp_path)
    texts = texts_in(tmp_path)
    assert list(texts) == ["tweets", "product reviews", "editorials", "film reviews"]
    for found in texts.values():  # the second one's ratings are not those of its mean
        assert found == [RatedText("Fish & chips \u2013 caf\u00e9", 0.5, [1, 0]), RatedText("Rain again.", -1.25, [])]
    assert (tmp_path / "LICENSE").read_text() == "MIT"
    assert all(words in (tmp_path / "NOTICE").read_text() for words in ("Hutto", "ICWSM 2014", "MIT", "3.3.2"))


def test_without_an_index_a_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CHAT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        UserError, match=r"could not download vaderSentiment==3\.3\.2 .*source dist.*, or give .* --data"
    ):
        load_texts(lambda line: None)


def test_what_is_held_out_is_not_trained_on(word_format):
    texts = texts_in(EXCERPT)
    rows = share_texts(texts, SETTINGS, 1, word_format)
    judged = {row["response"] for row in rows.panel if row["domain"] == "tweets"}
    trained, evaluated = (
        [pair[side] for pair in pairs for side in ("chosen", "rejected")]
        for pairs in (rows.pairs_train, rows.pairs_eval)
    )
    assert len(judged) > 40 and len(set(trained)) > 100 and len(evaluated) > 20
    assert judged.isdisjoint(trained) and judged.issuperset(evaluated)
    assert set(Counter(evaluated).values()) == {1}  # so that pairs are independent
    assert {row["domain"] for row in rows.panel} == set(DOMAINS)
    for row in rows.panel:
        assert abs(sum(row["ratings"]) / len(row["ratings"]) - row["mean"]) < 1e-6
    assert rows == share_texts(texts, SETTINGS, 1, word_format)
    assert judged != {row["response"] for row in share_texts(texts, SETTINGS, 2, word_format).panel}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Too short", "fewer than 3 or more than 16 words"),
        ("word " * 17, "fewer than 3 or more than 16 words"),
        ("Look at @somebody over there", "no words, a link or a name"),
        ("Look at http://url_removed over there", "no words, a link or a name"),
        ("I LOVE this feeling :D", "there twice"),
        ("Well, you are an idiot", "rude words"),
        ("a-b-c-d-e-f-g-h-i-j-k-l-m-n-o-p-q-r-s and more", "too long"),
    ],
)
def test_what_is_left_out(word_format, text, reason):
    texts = texts_in(EXCERPT)
    more = {**texts, "tweets": [*texts["tweets"], *[RatedText(text, 1.0, [1])] * 3]}
    if reason == "there twice":
        more["tweets"] += [RatedText(text.lower() + "!", 1.0, [1])]
    before, after = (
        share_texts(each, SETTINGS, 1, word_format).left_out[f"rated text: {reason}"] for each in (texts, more)
    )
    assert after - before == 3


def test_names_at_the_beginning_are_cut_off(word_format):
    texts = texts_in(EXCERPT)
    more = {**texts, "tweets": [*texts["tweets"], RatedText("RT @a: @bc What a lovely river", 1.0, [1])]}
    for seed in range(20):  # until it is held out
        rows = share_texts(more, SETTINGS, seed, word_format)
        assert not any("@" in row["response"] for row in rows.panel)
        if any(row["response"] == "What a lovely river" for row in rows.panel):
            return
    raise AssertionError("never held out")


def test_a_limit_and_what_leaves_nothing(word_format):
    texts = texts_in(EXCERPT)
    few = share_texts(texts, SETTINGS.model_copy(update={"limit": 30}), 1, word_format)
    assert 10 < len({pair[side] for pair in few.pairs_train for side in ("chosen", "rejected")}) <= 30
    with pytest.raises(UserError, match=r"fits data\.max_response_tokens=3"):
        share_texts(texts, SETTINGS.model_copy(update={"max_response_tokens": 3}), 1, word_format)


def test_the_prepared_data_hold_the_panel(tmp_path, word_format):
    settings = SETTINGS.model_copy(update={"limit": 60})
    counts = prepare_data(settings, 1, tmp_path / "data", word_format, lambda line: None)
    assert {row["domain"] for row in read_rows(tmp_path / "data" / "panel.jsonl")} == set(DOMAINS)
    assert counts.notes[-1].startswith("step 2: pairs of 60 tweets, by what people rated as more positive; held out: ")
    without = settings.model_copy(update={"split": (1, 0, 1)})
    prepare_data(without, 1, tmp_path / "other", word_format, lambda line: None)
    assert not (tmp_path / "other" / "panel.jsonl").exists() and not read_rows(tmp_path / "other" / "pairs_train.jsonl")


def test_texts_answer_prompts_and_held_out_ones_what_is_held_out(word_format):
    texts, (known, unseen) = (
        texts_in(EXCERPT),
        ([[{"role": "user", "content": f"{kind} {i}"}] for i in range(9)] for kind in "ab"),
    )
    rows = share_texts(texts, SETTINGS, 1, word_format, known, unseen)
    for found, allowed in ((rows.pairs_train, known), (rows.pairs_eval, unseen), (rows.panel, unseen)):
        assert len({row["prompt"][0]["content"] for row in found}) == 9 and all(
            row["prompt"] in allowed for row in found
        )
