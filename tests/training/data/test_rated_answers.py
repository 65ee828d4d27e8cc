"""Several answers to one prompt: which is the better one is worked out by hand, `good` and `bad` are their texts."""

import json

import pytest

from inference.errors import UserError
from tests.training.data.parsing import parse_row
from training.data.entries import BadRow, LeftOut
from training.data.formats import read_row
from training.data.reading import read_sources
from training.data_settings import DataSettings

GOOD, BAD = ({"role": "assistant", "content": text} for text in ("good", "bad"))
QUESTION = {"role": "user", "content": "q"}
RATED = ("so", "good", "bad", "even")
PAIR = {"prompt": [QUESTION], "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    "row",
    [
        # columns that are called so
        {"prompt": "q", "good": "good", "bad": "bad"},
        {"prompt": "q", "answer_good": "good", "answer_bad": "bad"},
        {"question": "q", "Better_Response": "good", "Worse_Response": "bad"},
        {"prompt": "q", "preferred": [GOOD], "dispreferred": [BAD]},
        {"question": "q", "response_j": "good", "response_k": "bad"},
        {"prompt": "q", "accepted": "good", "rejected": "bad"},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": BAD,
        },
        {"input": json.dumps({"messages": [QUESTION]}), "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        {"prompt": "q", "chosen": "good", "rejected": "bad", "score_chosen": 2.5, "score_rejected": "2"},
        # two answers with a winner or scores
        {"prompt": "q", "response_a": "bad", "response_b": "good", "winner": "b"},
        {"prompt": "q", "response_a": "good", "response_b": "bad", "winner": "model_a"},
        {"prompt": "q", "Answer1": "bad", "Answer2": "good", "human_preference": "Answer 2"},
        {"prompt": "q", "response_0": "bad", "response_1": "good", "better_response_id": 1},
        {"instruction": "q", "input": "", "output_1": "good", "output_2": "bad", "preference": 1.0},
        {"prompt": "q", "text_a": "bad", "text_b": "good", "choice": "good"},
        {"prompt": "q", "response_1": "good", "response_2": "bad", "preference_strength": -2},
        {"context": [QUESTION], "response1": "bad", "response2": "good", "overall_preference": 1},
        {"conversation_a": [QUESTION, BAD], "conversation_b": [QUESTION, GOOD], "winner": "model_b"},
        {"prompt": "q", "response_a": "good", "response_b": "bad", "winner_model_a": 1, "winner_model_b": 0},
        {"prompt": "q", "response_a": "bad", "response_b": "good", "score_a": 0.1, "score_b": 0.2},
        {"prompt": "q", "answer_1": "good", "answer_2": "bad", "answer_1_rating": "4", "answer_2_rating": "3"},
        # a list of answers
        {"prompt": "q", "responses": ["so", "good", "bad"], "scores": [2, 3, -1]},
        {"prompt": "q", "responses": ["no score", "good", "bad"], "rewards": [None, 0, -1]},
        {"prompt": "q", "responses": '["bad", "good"]', "scores": "[1, 2]"},
        {"prompt": "q", "answers": [[BAD], [GOOD]], "answer_scores": [1, 2]},
        {"prompt": "q", "summaries": ["bad", "good"], "summary_ratings": [1, 2]},
        {"question": "q", "answers": ["so", "good", "bad"], "ranks": [2, 1, 3]},
        {"question": "q", "answers": ["so", "good", "bad"], "ranking": [2, 1, 3]},
        {"prompt": "q", "answers": [{"answer": "bad", "rank": 2.0}, {"answer": "good", "rank": 1.0}]},
        {"question": "q", "answers": [{"text": "good", "pm_score": 5}, {"text": "bad", "pm_score": 1}]},
        {
            "instruction": "q",
            "completions": [
                {"response": "bad", "overall_score": 9.0, "fine-grained_score": 2.0},
                {"response": "good", "overall_score": 7.0, "fine-grained_score": 4.5},
            ],
        },
        {
            "instruction": "q",
            "completions": [
                {"response": "bad", "annotations": {"honesty": {"Rating": "4"}, "helpfulness": {"Rating": "3"}}},
                {"response": "good", "annotations": {"honesty": {"Rating": "N/A"}, "helpfulness": {"Rating": "4"}}},
            ],
        },
    ],
    ids=lambda row: ",".join(row),
)
def test_the_better_answer_is_chosen(row):
    read = read_row(row)
    assert [without_margin(pair) for pair in read.rows] == [PAIR]
    assert not read.unused and not read.extra


def without_margin(row):
    return {key: value for key, value in row.items() if key != "margin"}


@pytest.mark.parametrize(
    ("row", "margin"),
    [
        ({"chosen": "good", "rejected": "bad", "margin": "2.5"}, 2.5),
        ({"chosen": "good", "rejected": "bad", "margin": 3, "score_chosen": 2.5, "score_rejected": 2}, 3),  # as TRL's
        ({"chosen": "good", "rejected": "bad", "score_chosen": 2.5, "score_rejected": "2"}, 0.5),
        ({"chosen": "good", "rejected": "bad"}, None),
        ({"good": "good", "bad": "bad", "margin": "wide"}, None),
        ({"chosen": "good", "rejected": "bad", "Margin": 2}, 2),
        ({"chosen": "good", "rejected": "bad", "margin": "wide", "score_chosen": 3, "score_rejected": 2}, 1),
        ({"response_1": "good", "response_2": "bad", "preference_strength": -2}, 2),
        ({"response_a": "bad", "response_b": "good", "score_a": -1, "score_b": 3}, 4),
        ({"response_a": "bad", "response_b": "good", "winner": "b"}, None),
        ({"responses": ["so", "good", "bad"], "scores": [2, 3, -1]}, 4),
        ({"responses": ["so", "good", "bad"], "ranks": [2, 1, 3]}, 2),
        ({"completions": [{"response": "bad", "overall_score": 1}, {"response": "good", "overall_score": 7}]}, 6),
    ],
    ids=lambda row: ",".join(row) if isinstance(row, dict) else str(row),
)
def test_the_margin_is_what_is_said_or_the_difference_of_scores(row, margin):
    (pair,) = read_row({"prompt": "q", **row}).rows
    assert without_margin(pair) == PAIR and pair.get("margin") == margin


@pytest.mark.parametrize(
    "row",
    [
        {"Responses": ["so", "good", "bad", "even", "?"], "scores": [2, 3, -1, 2, None], "id": 1},
        {"answers": [{"text": text, "score": score} for text, score in zip(RATED, (2, 3, -1, 2), strict=True)]},
    ],
    ids=["beside", "within"],
)
def test_of_all_comparisons_each_two_with_different_scores_are_a_pair(row):
    read = read_row({"prompt": "q", **row}, every=True)
    found = [(pair["chosen"], pair["rejected"], pair["margin"]) for pair in read.rows]
    assert found == [
        *[("good", "bad", 4), ("so", "bad", 3), ("even", "bad", 3), ("good", "so", 1), ("good", "even", 1)],
    ]
    assert read.unused == {"id"} & row.keys()


def test_an_answer_that_is_there_twice_is_compared_with_the_others_alone():
    twice = {"prompt": "q", "responses": ["so", "so ", "bad"], "scores": [3, 2, 1]}
    found = [(pair["chosen"], pair["rejected"], pair["margin"]) for pair in read_row(twice, every=True).rows]
    assert found == [("so", "bad", 2), ("so", "bad", 1)]
    with pytest.raises(BadRow, match="are the same"):
        read_row({"prompt": "q", "responses": ["so", "so"], "scores": [3, 2]}, every=True)


@pytest.mark.parametrize("every", [False, True])
def test_the_context_of_several_answers_is_their_prompt(every):
    row = {"context": [{"role": "user", "content": "q"}], "responses": ["good", "bad"], "scores": [3, 1]}
    assert [without_margin(pair) for pair in read_row(row, every).rows] == [PAIR]


def test_all_comparisons_of_what_has_no_scores_are_those_of_before():
    several = {"prompt": "q", "chosen": ["good", "so"], "rejected": ["bad"]}
    assert [pair["chosen"] for pair in read_row(several, every=True).rows] == ["good", "so"]
    with pytest.raises(LeftOut, match="have the same score"):
        read_row({"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]}, every=True)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]}, "have the same score"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [None, 1]}, "only one answer to the prompt has a score"),
        ({"prompt": "q", "response_a": "a", "response_b": "b", "winner": "tie (bothbad)"}, "neither of the two"),
        ({"prompt": "q", "response_a": "a", "response_b": "b", "score_a": 1, "score_b": 1.0}, "neither of the two"),
        ({"prompt": "q", "response_1": "a", "response_2": "b", "overall_preference": 0}, "neither of the two"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": 1, "rejected_score": 1}, "no higher score"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": -0.5}, "margin is below 0"),
    ],
)
def test_where_no_answer_is_better_the_row_is_left_out(row, reason):
    with pytest.raises(LeftOut, match=reason):
        parse_row(row)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1]}, "there are 2 'responses' and 1 'scores'"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": ["fine", 1]}, "'scores' has 'fine', which is no number"),
        ({"prompt": "q", "responses": ["a", "b", "c"], "rankings": [3, 1, 2]}, "call it 'ranks'"),
        ({"prompt": "q", "response_a": "a", "response_b": "b", "winner": 1}, "neither response_a nor response_b"),
        (
            {"question": "q", "answer": "a"},
            "call them prompt and response to learn the answer, or prompt and answer for",
        ),
    ],
)
def test_a_judgement_that_cannot_be_read_is_a_bad_row(row, reason):
    with pytest.raises(BadRow, match=reason) as error:
        parse_row(row)
    assert not isinstance(error.value, LeftOut)


def test_answers_that_nothing_rates_go_to_a_reward_function():
    assert parse_row({"prompt": "q", "responses": ["a", "b"]}) == [
        {"prompt": [QUESTION], "extra": {"responses": ["a", "b"]}}
    ]


# In several rows


def read(tmp_path, *rows, **settings):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = read_sources(DataSettings(source=str(file), **settings), lambda line: None)
    return found


def labelled(prompt, response, label):
    return {"prompt": prompt, "completion": response, "label": label}


def scored(prompt, response, **score):
    return {"prompt": prompt, "response": response, **score}


def as_text(rows):
    return [
        (row["prompt"][0]["content"], *(row[k] for k in ("response", "chosen", "rejected") if k in row)) for row in rows
    ]


def places(found):
    return [place.rpartition(" ")[2] for place in found.locations]


def test_a_bad_answer_is_paired_with_a_good_one_of_its_prompt(tmp_path):
    found = read(
        tmp_path,
        labelled("p", "bad", False),
        labelled("p", "good", True),
        labelled("alone", "r", False),
        labelled("q ", "worse", "no"),
        labelled("demonstration", "r", True),
        labelled("q", "fine", "yes"),
        labelled("q", "wrong", 0),
        labelled("q", "right", 1),
        labelled("q", "left", 1),
    )
    assert as_text(found.rows) == [
        ("p", "good", "bad"),
        ("demonstration", "r"),
        ("q", "fine", "worse"),
        ("q", "right", "wrong"),
        ("q", "left"),
    ]
    assert places(found) == ["2", "5", "6", "8", "9"]
    assert dict(found.reasons) == {
        "an answer that is labelled as bad, and its prompt has none that is labelled as good": 1
    }
    assert "; 3 pairs of answers in several rows, by label" in found.describe()


def test_a_good_answer_serves_several_bad_ones_but_not_itself(tmp_path):
    rows = [labelled("p", text, label) for text, label in (("good", 1), ("bad", 0), ("worse", 0), ("good", 0))]
    found = read(tmp_path, *rows)
    assert as_text(found.rows) == [("p", "good", "bad"), ("p", "good", "worse")]
    assert dict(found.reasons) == {"the same answer to the prompt is labelled as bad and as good": 1}


def test_labelled_conversations_are_paired_by_their_last_answer(tmp_path):
    turns = [QUESTION, GOOD, {"role": "user", "content": "and?"}]
    found = read(tmp_path, {"messages": [*turns, BAD], "label": False}, {"messages": [*turns, GOOD], "label": True})
    assert found.rows == [
        {"prompt": [QUESTION], "response": "good"},
        {"prompt": turns, "chosen": "good", "rejected": "bad"},
    ]


def test_of_answers_with_scores_the_best_and_the_worst_are_the_pair(tmp_path):
    found = read(
        tmp_path,
        *[scored("p", text, helpfulness=score, verbosity=1) for text, score in (("so", 2), ("bad", 0), ("good", 4))],
        *[scored("alike", text, helpfulness=3) for text in ("one", "two")],
        scored("alone", "r", helpfulness=1),
    )
    assert as_text(found.rows) == [("p", "good", "bad"), ("alike", "one"), ("alike", "two"), ("alone", "r")]
    assert sum(found.reasons.values()) == 1 and "the best and the worst are the pair" in next(iter(found.reasons))
    assert "; 1 pair of answers in several rows, by helpfulness; not used: verbosity" in found.describe()


def test_all_comparisons_of_answers_in_several_rows(tmp_path):
    found = read(
        tmp_path,
        *[scored("p", text, score=score) for text, score in (("so", 2), ("bad", 0), ("good", 4), ("even", 2))],
        *[labelled("q", text, label) for text, label in (("good", 1), ("bad", 0), ("fine", 1), ("worse", 0))],
        comparisons="all",
    )
    pairs = [("good", "bad"), ("so", "bad"), ("good", "so"), ("good", "even"), ("even", "bad")]
    assert sorted(as_text(found.rows)) == sorted(
        [
            *[("p", *pair) for pair in pairs],
            *[("q", good, bad) for good in ("good", "fine") for bad in ("bad", "worse")],
        ]
    )
    assert len(found.locations) == len(found.rows) and found.reasons == {}
    assert {row["margin"] for row in found.rows if "margin" in row} == {2, 4}
    assert "; 9 pairs of answers in several rows, by label, score" in found.describe()


def test_of_ranks_the_first_is_the_best(tmp_path):
    found = read(tmp_path, scored("p", "bad", rank=2), scored("p", "good", rank=1))
    assert as_text(found.rows) == [("p", "good", "bad")]


def test_bad_answers_alone_are_no_data(tmp_path):
    with pytest.raises(UserError, match=r"none of its rows can be used .an answer that is labelled as bad, and its"):
        read(tmp_path, labelled("p", "bad", False))


def test_several_rejected_answers_become_a_pair_each(tmp_path):
    texts = {"prompt": "p", "chosen": "good", "rejected": ["bad", "worse"]}
    messages = {
        "prompt": "q",
        "good": [GOOD],
        "bad": [[BAD], [{"role": "assistant", "content": "worse"}]],
        "system": "s",
    }
    both = {"prompt": "r", "chosen": ["a", "b"], "rejected": ["c"]}
    found = read(tmp_path, texts, messages, both)
    assert [text[1:] for text in as_text(found.rows)] == [
        *(("good", "bad"), ("good", "worse"), ("good", "bad"), ("good", "worse"), ("a", "c"), ("b", "c")),
    ]
    assert "not used" not in found.describe() and found.reasons == {}
    rewarded = {"prompt": "p", "good": ["x", "y"]}  # no worse one: for a reward function
    assert read(tmp_path, rewarded).rows[0]["extra"] == {"good": ["x", "y"]}


def test_turns_as_the_text_of_a_list(tmp_path):
    def battle(*answers: str, prompt: str = '["p"]') -> dict:
        first, second = (json.dumps(answers[i::2]) for i in (0, 1))
        return {"prompt": prompt, "response_a": first, "response_b": second, "winner_model_a": 0, "winner_model_b": 1}

    found = read(tmp_path, battle("[bad]", "good"), battle("a", "b", "c", "d", prompt='["p", "q"]'))
    assert as_text(found.rows) == [("p", "good", "[bad]")]
    assert dict(found.reasons) == {"a conversation of several turns, of which the two models had each its own": 1}
    said = read(tmp_path, battle("bad", "good") | {"prompt": "[sic]"})  # a text in brackets is a text
    assert as_text(said.rows) == [("[sic]", '["good"]', '["bad"]')]
