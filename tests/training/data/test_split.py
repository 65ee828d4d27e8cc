import json

import pytest

from inference.errors import UserError
from training.data.rows import RowSets
from training.data.split import keep_once, one_spelling, split_rows


def message(text):
    return [{"role": "user", "content": text}]


def pairs(count):
    return [{"prompt": message(f"q{i}"), "chosen": "good", "rejected": "bad"} for i in range(count)]


def prompts_of(rows):
    return {json.dumps(row["prompt"]) for row in rows}


def test_pairs_are_shared_out_and_each_row_trains_one_step():
    sets = split_rows(pairs(200), (2, 4, 4), held_out=0.05, seed=1)
    assert (len(sets.sft_train), len(sets.pairs_train), len(sets.prompts_train)) == (38, 76, 76)  # of 190
    assert (len(sets.sft_eval), len(sets.pairs_eval), len(sets.prompts_eval)) == (10, 10, 10)
    used = [prompts_of(rows) for rows in (sets.sft_train, sets.pairs_train, sets.prompts_train, sets.pairs_eval)]
    assert len(set.union(*used)) == sum(map(len, used)) == 200
    assert sets.sft_train[0].keys() == {"prompt", "response"}
    assert sets.sft_train[0]["response"] == "good"
    assert sets.prompts_train[0].keys() == {"prompt"}


def demonstrations(count):
    return [{"prompt": message(f"d{i}"), "response": "r"} for i in range(count)]


def test_demonstrations_alone_all_train_step_1_and_give_step_3_its_prompts():
    sets = split_rows(demonstrations(66), (2, 4, 4), held_out=0.09, seed=1)  # 6 held out
    assert (len(sets.sft_train), len(sets.pairs_train), len(sets.prompts_train)) == (60, 0, 60)
    assert (len(sets.sft_eval), len(sets.pairs_eval), len(sets.prompts_eval)) == (6, 0, 6)
    assert not prompts_of([*sets.sft_train, *sets.prompts_train]) & prompts_of([*sets.sft_eval, *sets.prompts_eval])


def test_demonstrations_beside_other_rows_all_go_to_step_1():
    sets = split_rows([*demonstrations(20), *pairs(20)], (0, 1, 1), held_out=0.1, seed=1)
    assert (len(sets.sft_train), len(sets.pairs_train), len(sets.prompts_train)) == (0, 9, 9)  # step 1 has no share
    sets = split_rows([*demonstrations(20), *pairs(20)], (2, 4, 4), held_out=0.1, seed=1)
    assert (len(sets.sft_train), len(sets.pairs_train), len(sets.prompts_train)) == (18 + 4, 7, 7)


def test_prompts_all_go_to_step_3():
    sets = split_rows([{"prompt": message(f"q{i}")} for i in range(20)], (2, 4, 4), held_out=0.1, seed=1)
    assert (len(sets.prompts_train), len(sets.prompts_eval)) == (18, 2)


def test_a_step_whose_share_is_zero_gets_nothing():
    sets = split_rows(pairs(20), (0, 1, 0), held_out=0.1, seed=1)
    assert [len(rows) for _, rows in sets.items()] == [0, 0, 18, 2, 0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_the_same_prompt_is_on_one_side_only(seed):
    rows = [*pairs(6), *pairs(6), *({"prompt": message(f"q{i}"), "response": "r"} for i in range(4))]
    sets = split_rows(rows, (1, 1, 1), held_out=0.2, seed=seed)
    trained = prompts_of([*sets.sft_train, *sets.pairs_train, *sets.prompts_train])
    evaluated = prompts_of([*sets.sft_eval, *sets.pairs_eval, *sets.prompts_eval])
    assert trained and evaluated
    assert not trained & evaluated


def test_answers_of_one_conversation_stay_together():
    rows = []
    for i in range(30):
        start = message(f"q{i}")
        rows.append({"prompt": start, "response": "a"})
        rows.append({"prompt": [*start, {"role": "assistant", "content": "a"}, *message("more")], "response": "b"})
    sets = split_rows(rows, (1, 0, 0), held_out=0.2, seed=1)
    openings = [{row["prompt"][0]["content"] for row in rows} for rows in (sets.sft_train, sets.sft_eval)]
    assert (len(openings[0]), len(openings[1])) == (24, 6)
    assert not openings[0] & openings[1]


def test_two_prompts_are_enough_for_a_held_out_row_and_one_is_not():
    sets = split_rows(pairs(2), (0, 1, 0), held_out=0.05, seed=1)
    assert (len(sets.pairs_train), len(sets.pairs_eval)) == (1, 1)
    sets = split_rows(pairs(1) * 3, (0, 1, 0), held_out=0.05, seed=1)
    assert (len(sets.pairs_train), len(sets.pairs_eval)) == (3, 0)


def test_conversations_that_all_open_alike_are_split_by_their_whole_prompt():
    rows = [
        {"prompt": [*message("hi"), {"role": "assistant", "content": "hello"}, *message(f"q{i}")]} for i in range(10)
    ]
    sets = split_rows(rows, (1, 1, 1), held_out=0.2, seed=1)
    assert (len(sets.prompts_train), len(sets.prompts_eval)) == (8, 2)


def test_the_seed_decides():
    assert split_rows(pairs(50), (1, 1, 1), 0.1, seed=1) == split_rows(pairs(50), (1, 1, 1), 0.1, seed=1)
    assert split_rows(pairs(50), (1, 1, 1), 0.1, seed=1) != split_rows(pairs(50), (1, 1, 1), 0.1, seed=2)


@pytest.mark.parametrize("shares", [(0, 0, 0), (-1, 1, 1), (float("nan"), 1, 1)])
def test_impossible_shares(shares):
    with pytest.raises(UserError, match="three shares of 0 or more"):
        split_rows(pairs(3), shares, 0.1, seed=1)


SPELLINGS = [
    "What is tea?",
    " what  is\ttea? \n",
    "WHAT IS TEA",
    "What\u00a0is tea\uff1f",  # a no-break space, a full-width mark
    "What is te\u200ba?",  # an invisible sign
    "\ufeffWhat is tea?",
    "**What is tea?**",
    "## What is tea",
    '- "What is tea?"',
    "`What is tea;`",
    "\u00bfWhat is tea,",
]


def ask(text, *systems):
    """The question under each system message, and under none."""
    return [message(text), *([{"role": "system", "content": system}, *message(text)] for system in systems)]


@pytest.mark.parametrize("seed", range(5))
def test_a_question_is_on_one_side_however_it_is_written_and_whatever_system_message_is_before_it(seed):
    rows = [
        {"prompt": prompt, "response": f"answer {i}"}
        for i in range(30)
        for text in (f"{i}: {SPELLINGS[0]}", f" {i}:  {SPELLINGS[1 + i % 5].strip()} ")
        for prompt in ask(text, "Be brief.", "Be kind.")
    ]
    sets = split_rows(rows, (1, 0, 0), held_out=0.2, seed=seed)
    numbers = [{row["response"] for row in side} for side in (sets.sft_train, sets.sft_eval)]
    assert len(numbers[1]) == 6 and not numbers[0] & numbers[1]


@pytest.mark.parametrize("text", SPELLINGS)
def test_one_spelling(text):
    assert one_spelling(text) == "what is tea"


def test_different_questions_stay_apart():
    different = [
        "cafe",
        "caf\u00e9",
        "2+2",
        "22",
        "?",
        "!?",
        "re-sign",
        "resign",
        "c",
        "c#",
        "c++",
        "5",
        "-5",
        "\u00df",
        "s",
    ]
    assert len({one_spelling(text) for text in different}) == len(different)
    assert one_spelling("STRASSE") == one_spelling("stra\u00dfe")
    assert one_spelling("cafe\u0301") == one_spelling("caf\u00e9")


def test_turns_of_a_conversation_stay_together_where_all_open_alike():
    hello = [*message("Hi"), {"role": "assistant", "content": "Hello!"}]
    rows = []
    for i in range(20):
        second = [*hello, *message(f"q{i}")]
        rows.append({"prompt": second, "response": f"{i}"})
        third = [*second, {"role": "assistant", "content": f"{i}"}, *message("and?")]
        rows.append({"prompt": third, "response": f"{i}"})
    sets = split_rows(rows, (1, 0, 0), held_out=0.2, seed=1)
    numbers = [{row["response"] for row in side} for side in (sets.sft_train, sets.sft_eval)]
    assert [len(each) for each in numbers] == [16, 4] and not numbers[0] & numbers[1]


def test_a_kind_of_which_everything_would_be_held_out_keeps_something_to_train_on():
    for seed in range(20):
        rows = [*pairs(3), {"prompt": message("q1"), "response": "r"}]
        sets = split_rows(rows, (1, 1, 1), held_out=0.05, seed=seed)
        assert "r" in {row["response"] for row in sets.sft_train}


def test_questions_are_held_out_and_not_rows():
    """Thirty of ten rows, ten of one: of forty questions 0.1 is four, and the rows are more or fewer."""
    rows = [*pairs(30) * 10, *({"prompt": message(f"x{i}"), "chosen": "a", "rejected": "b"} for i in range(10))]
    sets = split_rows(rows, (0, 1, 0), held_out=0.1, seed=1)
    assert len(prompts_of(sets.pairs_eval)) == 4


def test_a_question_with_most_of_the_rows_is_not_held_out():
    for seed in range(40):
        sets = split_rows([*pairs(1) * 100, *pairs(20)], (0, 1, 0), held_out=0.1, seed=seed)
        assert len(sets.pairs_eval) == 2


def test_a_row_is_in_a_set_once():
    several = [{"prompt": message(f"q{i}"), "chosen": "a", "rejected": f"{j}"} for i in range(20) for j in range(10)]
    sets = split_rows([*several, {"prompt": message("q1 "), "chosen": "a", "rejected": "0"}], (1, 1, 1), 0.1, seed=3)
    assert keep_once(sets) > 0
    for rows in (sets.prompts_train, sets.prompts_eval, sets.sft_train, sets.sft_eval):
        assert len(rows) == len(prompts_of(rows))  # all chosen answers are alike
    assert (len(sets.prompts_eval), len(sets.sft_eval), len(sets.pairs_eval)) == (2, 2, 20)
    assert len(sets.pairs_train) == 10 * len(prompts_of(sets.pairs_train))


def test_prompts_differ_by_what_a_reward_function_is_told_in_training_only():
    told = [{"prompt": message("sort"), "extra": {"answer": i % 2}} for i in range(6)]
    sets = RowSets(prompts_train=list(told), prompts_eval=list(told))
    assert keep_once(sets) == 4 + 5
    assert sets.prompts_train == told[:2] and sets.prompts_eval == told[:1]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_too_few_questions_to_share_out_train_every_step(count):
    sets = split_rows(pairs(count), (2, 4, 4), held_out=0.05, seed=1)
    trained = max(1, count - 1)  # one of two or three is held out
    assert sets.steps_share
    assert [len(rows) for _, rows in sets.items()] == [trained, count - trained] * 3


@pytest.mark.parametrize("seed", range(20))
def test_every_step_with_a_share_gets_a_question(seed):
    rows = [*pairs(4), *pairs(2) * 50]  # rows of two questions weigh more than all others
    sets = split_rows(rows, (1, 4, 4), held_out=0.05, seed=seed)
    assert not sets.steps_share and all((sets.sft_train, sets.pairs_train, sets.prompts_train))
    used = [prompts_of(rows) for rows in (sets.sft_train, sets.pairs_train, sets.prompts_train)]
    assert len(set.union(*used)) == sum(map(len, used)) == 3
    assert split_rows(pairs(50), (0.001, 1, 0), 0.05, seed=seed).sft_train


@pytest.mark.parametrize("seed", range(10))
def test_what_one_kind_holds_out_no_other_trains_on(seed):
    rows = [
        *pairs(10),
        *({"prompt": message(f" Q{i}?"), "response": "r"} for i in range(30)),
        *({"prompt": [{"role": "system", "content": "s"}, *message(f"q{i} ")]} for i in range(5, 25)),
    ]
    sets = split_rows(rows, (1, 1, 1), held_out=0.1, seed=seed)
    sides = [
        {
            one_spelling(row["prompt"][-1]["content"])
            for name, rows in sets.items()
            if name.endswith(end)
            for row in rows
        }
        for end in ("train", "eval")
    ]
    assert len(sides[1]) >= 3 and not sides[0] & sides[1]
