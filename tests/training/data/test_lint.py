import re
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from inference.chat_format import ChatFormat
from tests.inference.templates import FAMILIES, bytes_tokenizer
from tests.training.evaluation.preferences import preference
from training.data.lint import Lines, bad_rows, lint, lint_preferences, lint_tokenizer, shared_prompts
from training.data_settings import DataSettings

SETTINGS = DataSettings(max_prompt_tokens=12, max_response_tokens=4)


WORDS = "a b c d e f w one two three four five six".split()


@pytest.fixture(scope="module")
def words():
    """One token for each of these words."""
    return ChatFormat(make_tokenizer("<pad>"))


def make_tokenizer(pad):
    vocabulary = ["<unk>", "</s>", "<pad>", "Human", "Assistant", ":", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    given = {} if pad is None else {"pad_token": pad}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", **given)


def prompt(text):
    return [{"role": "user", "content": text}]


def pair(question, chosen, rejected):
    return {"prompt": prompt(question), "chosen": chosen, "rejected": rejected}


def lines(*rows):
    return Lines(rows, [f"line {number}" for number in range(1, len(rows) + 1)])


def findings(rows, chat_format=None):
    return {(each.level, each.check): each for each in lint(rows, chat_format, SETTINGS)}


def test_good_rows(words):
    rows = lines(pair("a", "b", "c"), {"prompt": prompt("d"), "response": "e"}, {"prompt": prompt("f")})
    assert findings(rows, words) == {}


def test_chosen_is_rejected():
    found = findings(lines(pair("a", "b", "c"), pair("a", "b", "b")))[("error", "chosen = rejected")]
    assert (found.count, found.places) == (1, ("line 2",))


def test_chosen_is_rejected_once_they_are_cut(words):
    rows = lines(pair("a", "one two three four five", "one two three four six"), pair("a", "one two", "one six"))
    found = findings(rows, words)[("error", "chosen = rejected")]
    assert found.places == ("line 1",) and "max_response_tokens=4" in found.sentence


def test_duplicates_and_contradictions():
    rows = lines(pair("a", "b", "c"), pair("a", "b", "c"), pair("a", "c", "b"), {"prompt": prompt("a")})
    found = findings(rows)
    assert found[("warning", "duplicates")].places == ("line 2",)
    assert found[("warning", "contradictions")].places == ("line 1", "line 2", "line 3")


def test_rows_that_a_weight_repeats_are_no_duplicates():
    rows = [{**pair("a", "b", "c"), "source": source} for source in ("x", "x", "y", "y")]
    settings = DataSettings(source=["x=2", "y"])
    (found,) = lint(lines(*rows), None, settings)
    assert (found.check, found.places) == ("duplicates", ("line 3", "line 4"))


@pytest.mark.parametrize(
    ("longer", "said"), [(14, "longer answer is chosen in 70%"), (5, "shorter .* in 75%"), (11, "")]
)
def test_length_bias(longer, said):
    rows = [pair(f"q{i}", "long answer", "short") if i < longer else pair(f"q{i}", "b", "longer") for i in range(20)]
    found = findings(lines(*rows, pair("equal", "x", "y"))).get(("warning", "length bias"))
    assert (found is None) == (not said)
    if found:
        assert re.search(said, found.sentence) and found.count == 20


def test_a_few_pairs_show_no_length_bias():
    assert findings(lines(*[pair(f"q{i}", "long answer", "short") for i in range(19)])) == {}


def test_truncation_counts_prompts_and_answers(words):
    long = "w " * 20
    rows = lines(
        {"prompt": prompt(long), "response": "e"},
        {"prompt": prompt("a"), "response": "one two three"},  # and the end of the turn: 4 tokens
        {"prompt": prompt("a"), "response": "one two three four"},
    )
    found = [each for each in lint(rows, words, SETTINGS) if each.check == "truncation"]
    assert [each.places for each in found] == [("line 1",), ("line 3",)]
    assert str(found[0]) == (
        "a prompt over data.max_prompt_tokens=12 loses its oldest turns: 33% of the rows (1 row: line 1)"
    )


def test_an_answer_without_a_token(words):
    rows = lines({"prompt": prompt("a"), "response": " "}, {"prompt": prompt("a"), "response": "b"})
    found = findings(rows, words)[("error", "no trained token")]
    assert found.places == ("line 1",)


def test_bad_rows_are_errors_and_gaps_of_a_set_are_not():
    found = bad_rows(
        [("a, line 1", "it is {odd}", True), ("a, line 4", "it is {odd}", True), ("b, row 2", "a tie", False)]
    )
    assert [(each.level, each.check, each.count, each.sentence) for each in found] == [
        ("error", "bad row", 2, "it is {odd}"),
        ("warning", "left out", 1, "a tie"),
    ]
    assert found[0].places == ("a, line 1", "a, line 4")


def test_prompts_on_both_sides():
    train, held_out = lines(pair("a", "b", "c"), pair("d", "e", "f")), lines(pair("x", "y", "z"), pair("d", "y", "z"))
    (found,) = shared_prompts(train, held_out)
    assert (found.level, found.places) == ("error", ("line 2",))
    same = {**pair("D ?", "y", "z"), "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": " D?"}]}
    (found,) = shared_prompts(train, lines(pair("x", "y", "z"), same))
    assert found.places == ("line 2",)  # written in another way, under a system message


@pytest.mark.parametrize(
    ("pad", "said"),
    [
        (None, "without a pad token: <|pad|> is used"),
        ("</s>", "pad token ends the turn (</s>): <|pad|>"),
        ("<pad>", ""),
    ],
)
def test_the_pad_token(tmp_path, pad, said):
    found = lint_tokenizer(make_tokenizer(pad), ChatFormat(make_tokenizer(pad)), tmp_path)
    assert len(found) == bool(said)
    if said:
        assert said in found[0].sentence and found[0].level == "warning"


def test_a_template_that_writes_finished_dialogues_otherwise(tmp_path):
    tokenizer = bytes_tokenizer(FAMILIES["zephyr"], pad_token="<unk>")
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"
    (found,) = lint_tokenizer(tokenizer, ChatFormat(tokenizer), tmp_path)
    assert (found.level, found.check) == ("warning", "chat template")
    assert "otherwise than its prompts" in found.sentence


# What people preferred


def test_a_side_that_is_preferred_is_a_warning():
    found = {each.check: each for each in lint_preferences([preference("ann", "one", f"{i}") for i in range(20)])}
    assert found["side bias"].sentence.startswith("ann prefers the left answer in 100% of the pairs")
    few = [preference("ann", "one", f"{i}") for i in range(19)]
    even = [preference("ben", "one", f"{i}", swapped=i % 2 == 0) for i in range(40)]
    assert lint_preferences([*few, *even]) == [] == lint_preferences([])


def test_people_who_agree_as_chance_would_are_a_warning():
    def preferences(by: str, said: str, swapped: bool = False) -> list:
        words = {"o": "one", "O": "other"}
        return [
            preference(by, words[letter], f"{i}", swapped=swapped ^ (i // 2 % 2 == 0)) for i, letter in enumerate(said)
        ]

    ann, ben, later = (
        preferences("ann", "oOoO" * 6),
        preferences("ben", "oOOo" * 6, True),
        preferences("ann", "oooO" * 6, True),
    )
    (found,) = lint_preferences([*ann, *ben])
    assert found.check == "no agreement" and found.sentence.startswith("ann and ben agree on 50% of 24 pairs")
    assert lint_preferences([*ann, *later]) == []
    assert lint_preferences([*ann, *(replace(each, by="carl") for each in ann)]) == []
    (found,) = lint_preferences([*ann, *(replace(each, by="ann") for each in ben)])
    assert found.sentence.startswith("ann and the same person later agree on 50%")
