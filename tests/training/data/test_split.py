import json

import pytest

from inference.errors import UserError
from training.data.split import split_rows


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
