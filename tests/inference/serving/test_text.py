"""Text as it grows: whole characters, and no further than a stop string."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from inference.chat_model import OVERLAP, WINDOW, TextPieces, pieces_of, whole_text
from inference.generation.sampler import OwnSample, SamplingKey, SamplingSettings
from inference.serving.answers import Choice, Logprobs, StopStrings


def grow(model, text: str, stops=()) -> tuple[list[str], str | None]:
    """The pieces of an answer that is `text`, and why it ended."""
    ids = model.format.response_ids(text)
    sample = OwnSample(0, torch.tensor([1]), len(ids) + 5, settings=SamplingSettings(0), key=SamplingKey(0))
    choice, pieces = Choice(sample, model.format.decode, stops), []
    for token in ids:
        sample.response_ids.append(token)
        sample.ended = token == model.format.end_of_turn_id
        pieces.append(choice.grow())
        if choice.finish:
            break
    assert choice.text == "".join(pieces)
    assert stops or choice.new_tokens() == range(len(ids) - 1)  # all but the end
    return pieces, choice.finish


def test_characters_come_whole(model):
    text = "Hi 🙂🇩🇪 你好, naïve " * 12
    pieces, finish = grow(model, text)
    assert "".join(pieces) == text and finish == "stop"
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 100


def test_a_stop_string_of_many_bytes(model):
    pieces, finish = grow(model, "Hi 🙂 你好, naïve", ["好,"])
    assert "".join(pieces) == "Hi 🙂 你" and finish == "stop"


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """Letters, spaces as `▁`, and bytes for what it has no letter for: in the manner of sentencepiece."""
    letters = ["<unk>", "</s>", "▁", *"hiyou", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(letters)}, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def test_bytes_of_tokens_join_to_the_text(model):
    for tokenizer, start in ((model.format.tokenizer, ""), (pieces_tokenizer(), " ")):
        text = "hi 🙂, you 你好 naïve"
        ids = tokenizer.encode(text, add_special_tokens=False)
        sample = OwnSample(
            0, torch.tensor([1]), 9, ids, [0.5] * len(ids), settings=SamplingSettings(9), key=SamplingKey(0)
        )
        entries = Logprobs(tokenizer).of(sample, range(len(ids)))
        assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == start + text
        assert entries[-1]["token"] in ("e", "ve") and entries[-1]["logprob"] == 0.5


def test_only_a_window_is_decoded(model):
    ids = model.format.response_ids("All is well in the world, and the sea is quiet. " * 30)
    longest = 0

    def decode(part):
        nonlocal longest
        longest = max(longest, len(part))
        return model.format.decode(part)

    pieces = TextPieces(decode)
    whole = "".join(pieces.take(ids[: end + 1], end + 1 == len(ids)) for end in range(len(ids)))
    assert whole == model.format.decode(ids) and len(ids) > 4 * WINDOW
    assert OVERLAP < longest <= WINDOW + 4


def test_random_bytes_join_to_the_decoded_whole(model):
    generator = torch.Generator().manual_seed(1)
    for length in (1, WINDOW, 3 * WINDOW, 300):
        ids = torch.randint(0, 512, (length,), generator=generator).tolist()
        pieces = TextPieces(model.format.decode)
        grown = [pieces.take(ids[: end + 1], end + 1 == length) for end in range(length)]
        assert "".join(grown) == model.format.decode(ids)


@pytest.mark.parametrize("is_fast", [True, False])
def test_each_token_has_its_text_and_a_character_stands_at_its_last_token(model, is_fast):
    tokenizer = model.format.tokenizer
    given = tokenizer if is_fast else SimpleNamespace(decode=tokenizer.decode)
    generator = torch.Generator().manual_seed(1)
    for length in (1, 5, 200):
        ids = torch.randint(0, 512, (length,), generator=generator).tolist()
        pieces = pieces_of(ids, given)
        assert "".join(pieces) == whole_text(ids, tokenizer) and len(pieces) == length
    ids = [model.format.end_of_turn_id, *tokenizer.encode("\N{GRINNING FACE}!", add_special_tokens=False)]
    assert pieces_of(ids, given) == ["</s>", *[""] * (len(ids) - 3), "\N{GRINNING FACE}", "!"] and len(ids) > 4
    assert pieces_of(ids[:-2], given)[-1].strip("\ufffd") == ""  # cut within the character
    assert pieces_of([], given) == []


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("one two three", ["two"], "one "),
        ("aaab", ["aab"], "a"),
        ("abcabd", ["abd"], "abc"),
        ("xy", ["yz"], "xy"),
        ("x\n\nHuman: y", ["Human:", "\n\n"], "x"),
        ("stop", ["stop"], ""),
        ("text", [], "text"),
    ],
)
def test_stop_strings_are_found_however_the_text_comes(text, stops, shown):
    for cuts in itertools.product([False, True], repeat=len(text) - 1):
        parts = [""]
        for character, cut in zip(text, [False, *cuts], strict=True):
            if cut:
                parts.append("")
            parts[-1] += character
        passing = StopStrings(stops)
        passed = [passing.let_pass(part, is_last=place == len(parts) - 1) for place, part in enumerate(parts)]
        assert "".join(passed) == shown
        assert passing.was_found == any(stop in text for stop in stops)


def test_text_that_cannot_become_a_stop_string_is_not_held_back():
    passing = StopStrings(["END"])
    assert [passing.let_pass(piece) for piece in ("a", "bE", "x", "EN", "E")] == ["a", "b", "Ex", "", "EN"]
