"""Two answers and a preference: through a pipe, line by line in a terminal, and by single keys in a real one."""

import contextlib
import io
import os
import sys
from dataclasses import replace

import pytest

from inference.chat_model import ChatModel
from inference.errors import UserError
from inference.generation.sampler import SamplingSettings
from inference.prefer import Interview, ModelPair, again, drawn
from inference.preferences import DRAWS, Answer, BlindPair, PreferenceFile
from tests.inference.test_chat import Echo, TypedLines, in_child, user

SETTINGS = SamplingSettings(max_tokens=24, temperature=0.7)


class Seeded(Echo):
    """Answers with its seed, so that two draws differ."""

    def reply(self, messages, settings, seed, turn):
        yield from super().reply(messages, settings, seed, seed)


@pytest.fixture
def file(tmp_path) -> PreferenceFile:
    return PreferenceFile(tmp_path / "preferences.jsonl")


def interview(file, text: str, by="ann", terminal=False) -> Interview:
    source, sink = (TypedLines(text), TypedLines()) if terminal else (io.StringIO(text), io.StringIO())
    return Interview(file, by, source, sink)


def asking(one=None, other=None) -> ModelPair:
    one = one or Seeded("s")
    return ModelPair([("demo/sft", one), ("demo/rlhf" if other else "demo/sft", other or one)], SETTINGS)


def ask(file, text: str, models=None, suggested=(), **given) -> str:
    asked = interview(file, text, **given)
    asked.collect(drawn(asked, models or asking(), iter(suggested)))
    return asked.sink.getvalue()


def winners(file) -> list[tuple[str, str]]:
    return [(each.prompt[-1]["content"], each.winner) for each in file.read()]


def test_in_a_pipe_message_and_preference_take_turns(file):
    shown = ask(file, "one\n1\n two \n2\nthree\n=\nfour\n0\nfive\ns\nsix\nq\nseven\n1\n")
    assert winners(file) == [("one", "a"), ("two", "b"), ("three", "tie"), ("four", "both bad")]
    first = file.read()[0]
    assert shown.startswith(f"1: {first.response_a}\n2: {first.response_b}\n") and "seven" not in shown
    assert {first.by, first.model_a, first.model_b} == {"ann", "demo/sft"} and first.seed_a != first.seed_b
    assert (first.temperature, first.max_tokens) == (0.7, 24)


def test_the_side_is_drawn_and_each_answer_keeps_its_model_and_seed(file):
    ask(file, "hi\n1\n" * 30, asking(Seeded("s"), Seeded("r")))
    preferences = file.read()
    assert {preference.model_a for preference in preferences} == {"demo/sft", "demo/rlhf"}
    for preference in preferences:
        for model, text, seed in (
            (preference.model_a, preference.response_a, preference.seed_a),
            (preference.model_b, preference.response_b, preference.seed_b),
        ):
            assert text == f"{'s' if model == 'demo/sft' else 'r'} hi/{seed}"


def test_an_answer_can_be_drawn_again_by_its_seed(file, tiny_model_directory):
    model = ChatModel.load(tiny_model_directory)
    ask(file, "hello\n1\n", asking(model))
    (preference,) = file.read()
    for text, seed in ((preference.response_a, preference.seed_a), (preference.response_b, preference.seed_b)):
        assert text == "".join(model.reply(user("hello"), SamplingSettings(24, temperature=0.7), seed, 0))


def test_what_was_taken_back_is_asked_again_before_the_next(file):
    shown = ask(file, "one\n1\ntwo\nu\n2\n=\n")
    assert winners(file) == [("one", "b"), ("two", "tie")]
    assert shown.count("user: one\n") == 1 and shown.count("user: two\n") == 1
    ask(file, "three\nu\nu\nu\n", by="ben")
    assert len(file.read()) == 2  # nobody takes away what others said


def test_an_empty_message_takes_the_next_suggestion(file):
    shown = ask(file, "\n1\nmine\n1\n\n2\n", suggested=[user("first?"), user("second?")])
    assert winners(file) == [("first?", "a"), ("mine", "a"), ("second?", "b")]
    assert "user: first?\n1: " in shown and "user: mine" not in shown
    with pytest.raises(UserError, match="no message left to suggest"):
        ask(file, "\n1\n")
    assert "no message left" in ask(file, "\nmine\n1\n", terminal=True)
    assert winners(file)[-1] == ("mine", "a")


def test_a_wrong_preference_in_a_pipe_names_its_line_and_loses_nothing(file):
    with pytest.raises(UserError, match=r"Line 4 of the input is 'better' and no preference: 1 or 2 is better"):
        ask(file, "one\n1\ntwo\nbetter\n")
    assert winners(file) == [("one", "a")]


def test_equal_answers_are_drawn_again_and_then_said(file):
    class Stubborn(Seeded):
        def reply(self, messages, settings, seed, turn):
            self.asked.append(list(messages))
            yield "same" if len(self.asked) <= 2 * self.stays_equal else f"{len(self.asked)}"

    model = Stubborn()
    model.stays_equal = DRAWS - 1
    ask(file, "hi\n1\n", asking(model))
    assert len(model.asked) == 2 * DRAWS and len(file.read()) == 1
    model.stays_equal = 100
    with pytest.raises(UserError, match="the same, or one was empty, 3 times: say something else"):
        ask(file, "hi\n1\n", asking(model))
    assert "one was empty, 3 times" in ask(file, "hi\n", asking(model), terminal=True) and len(file.read()) == 1


def test_in_a_terminal_without_keys_a_line_is_read_and_asked_again(file):
    shown = ask(file, "one\n7\n1\n/undo\n2\n/nonsense\ntwo\nq\n", terminal=True)
    assert winners(file) == [("one", "b")]
    assert "There is no command /nonsense; /undo takes" in shown and shown.count("q quit: ") == 4
    assert "demo" not in shown  # whose answer it is


def test_columns_when_wide_one_under_the_other_when_narrow(file, monkeypatch):
    for columns, text in ((100, "│"), (60, "1\ns hi/")):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert text in ask(file, "hi\n1\n", terminal=True)


def test_ctrl_c_stops_the_answers_and_not_the_interview(file):
    class Interrupted(Seeded):
        def reply(self, messages, settings, seed, turn):
            yield "half"
            if messages[-1]["content"] == "one":
                raise KeyboardInterrupt
            yield str(seed)

    shown = ask(file, "one\ntwo\n1\n", asking(Interrupted()), terminal=True)
    assert "(stopped)\n" in shown and winners(file) == [("two", "a")]


def test_a_preference_that_the_disk_refuses_is_asked_for_again(file, monkeypatch):
    """Of the present pair, and of one that was to be taken back; in a pipe the sentence ends it."""
    writes, full = iter([True, False, True, True]), UserError("The disk is full: make room, then judge it again.")
    add, undo = PreferenceFile.add, PreferenceFile.undo

    def refusing(work):
        def maybe(*given):
            if not next(writes, False):
                raise full
            return work(*given)

        return maybe

    monkeypatch.setattr(PreferenceFile, "add", refusing(add))
    shown = ask(file, "one\n1\ntwo\n1\n2\nthree\n0\n", terminal=True)
    assert winners(file) == [("one", "a"), ("two", "b"), ("three", "both bad")]
    assert shown.count(str(full)) == 1 and [each.seed_a != each.seed_b for each in file.read()] == [True] * 3
    monkeypatch.setattr(PreferenceFile, "undo", refusing(undo))
    assert ask(file, "four\nu\ns\n/undo\n", terminal=True).count(str(full)) == 2 and len(file.read()) == 3
    for text in ("five\n1\n", "five\nu\n"):
        with pytest.raises(UserError, match="make room"):
            ask(file, text)


def test_a_second_person_judges_the_same_answers(file):
    ask(file, "one\n1\ntwo\n2\n", asking(Seeded("s"), Seeded("r")))
    before = file.read()
    for _ in range(10):
        asked = interview(file, "1\n2\n", by="ben")
        assert asked.collect(again(asked, before)) == 2
    assert "user: one\n1: " in asked.sink.getvalue()
    theirs = [each for each in file.read() if each.by == "ben"]
    for one, other in zip(before * 10, theirs, strict=True):
        swapped = replace(
            other,
            response_a=other.response_b,
            response_b=other.response_a,
            model_a=other.model_b,
            model_b=other.model_a,
            seed_a=other.seed_b,
            seed_b=other.seed_a,
        )
        same = {"id": one.id, "time": one.time, "by": "ann", "winner": one.winner}
        assert one in (replace(other, **same), replace(swapped, **same)) and other.id != one.id
    assert len({each.response_a for each in theirs if each.prompt == before[0].prompt}) == 2  # both sides


def test_single_keys_in_a_real_terminal(file):
    pair = BlindPair.of(user("hi"), Answer("a", "x", 1), Answer("b", "y", 2), 0.7, 24)

    def talk() -> None:
        with open(0, encoding="utf-8") as sys.stdin, open(1, "w", encoding="utf-8") as sys.stdout:
            Interview(file, "ann").collect([pair, pair, pair])

    process, descriptor = in_child(talk, terminal=True)
    shown = b""
    for number, key in enumerate((b"x", b"2", b"=", b"q"), 1):
        while shown.count(b"q quit: ") < number:
            shown += os.read(descriptor, 1000)
        os.write(descriptor, key)  # without Enter
    with contextlib.suppress(OSError):
        while more := os.read(descriptor, 1000):
            shown += more
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    os.close(descriptor)
    assert [each.winner for each in file.read()] == ["b", "tie"]
    assert b"q quit: about the same" in shown
