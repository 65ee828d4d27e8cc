import json
import random
from itertools import pairwise

import pytest

from inference.errors import UserError
from tests.warm import ROOT
from training.data import chitchat
from training.data.chitchat import Dialogue, build_chitchat, prompts_for, read_dialogue
from training.data.rated_texts import texts_in
from training.data.rows import RowSets
from training.data_settings import DataSettings

SETTINGS = DataSettings(max_prompt_tokens=60, max_response_tokens=20, held_out=0.1)
WORDS = ["river", "stone", "window", "garden", "paper", "train", "coffee", "music", "happy", "great", "sad", "awful"]
TEXTS = texts_in(ROOT / "tests" / "data" / "rated_texts")


def make_dialogues(questions=10, each=12, turns=6, seed=0):
    rng = random.Random(seed)
    return [
        Dialogue(f"{q}-{d}", f"What about topic {chr(97 + q)}?", [
            " ".join(rng.choices(WORDS, k=rng.randint(4, 8))) + f" {q} {d} {t}" for t in range(turns)
        ])
        for q in range(questions)
        for d in range(each)
    ]  # fmt: skip


def owner_of(row, dialogues):
    """Names of the dialogues that a row's texts come from, apart from the questions."""
    texts = [m["content"] for m in row["prompt"][1:]] + [row[k] for k in ("response", "chosen", "rejected") if k in row]
    return {dialogue.name for dialogue in dialogues for text in texts if text in dialogue.turns}


def test_read_dialogue_joins_what_one_person_says():
    def turn(sender, *texts):
        return [{"sender": sender, "text": text, "timestamp": ""} for text in texts]

    value = {
        "messages": [turn("x", "Hi ", " there"), turn("y", " "), turn("x", "again\n"), turn("y", "yes")],
        "prompt": "Which computer? (i.e. Jarvis, HAL, etc.)",
    }
    assert read_dialogue("n", value) == Dialogue("n", "Which computer?", ["Hi there again", "yes"])
    assert read_dialogue("n", {"messages": []}).question == ""
    assert read_dialogue("n", {"messages": [], "prompt": None}).question == ""


def test_prompts():
    dialogue = Dialogue("n", "Q?", ["a", "b", "c", "d"])
    about = {"role": "system", "content": "You chat with a friend about: Q?"}
    short = [about, {"role": "user", "content": "c"}]
    long = [about, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, short[1]]
    assert list(prompts_for(dialogue, 3)) == [long, short]
    assert list(prompts_for(dialogue, 2)) == [[about, {"role": "user", "content": "b"}]]
    assert [[m["content"] for m in prompt] for prompt in prompts_for(dialogue, 0)] == [
        ["You chat with a friend.", "Q?"]
    ]


def test_training_and_evaluation_share_no_dialogue_question_or_prompt(word_format):
    dialogues = make_dialogues()
    sets, _, notes = build_chitchat(dialogues, TEXTS, SETTINGS, 1, word_format)
    rows = dict(sets.items())
    assert all(rows.values())
    owners = {name: set.union(*(owner_of(row, dialogues) for row in rows[name])) for name in rows}
    trained = set.union(*(owners[name] for name in rows if name.endswith("train")))
    evaluated = set.union(*(owners[name] for name in rows if name.endswith("eval")))
    assert not trained & evaluated
    new = [row for row in rows["prompts_eval"] if row["held_out_question"]]
    old = [row for row in [*rows["sft_eval"], *rows["prompts_eval"]] if not row["held_out_question"]]
    assert new and old
    questions = {name.split("-")[0] for name in trained}
    assert len(questions) == 5  # of ten, half are held out where there are not enough for six
    assert all({name.split("-")[0] for name in owner_of(row, dialogues)} <= questions for row in old)
    assert not any({name.split("-")[0] for name in owner_of(row, dialogues)} & questions for row in new)
    assert "5 of the 10 questions" in notes[0]
    assert notes[1] == "steps 1 and 3 share their dialogues"


def test_steps_get_dialogues_of_their_own_when_there_are_enough(word_format, monkeypatch):
    monkeypatch.setattr(chitchat, "ENOUGH_ROWS", 20)
    dialogues = make_dialogues()
    sets, _, notes = build_chitchat(dialogues, TEXTS, SETTINGS, 1, word_format)
    assert notes[1] == "steps 1 and 3 have dialogues of their own"
    owners = [set.union(*(owner_of(row, dialogues) for row in rows)) for rows in (sets.sft_train, sets.prompts_train)]
    assert not owners[0] & owners[1]
    # 120 dialogues, 5 of 10 questions known: 60, of which 6 are held out; of 54 a fifth is step 1's, the rest step 3's
    assert [len(each) for each in owners] == [11, 43]


def test_rows_keep_to_the_limits(word_format):
    dialogues = make_dialogues(turns=12)
    settings = SETTINGS.model_copy(update={"max_prompt_tokens": 30, "max_response_tokens": 10})
    sets, left_out, _ = build_chitchat(dialogues, TEXTS, settings, 1, word_format)
    assert len(sets.sft_train) > 50
    for row in sets.sft_train:
        assert len(word_format.prompt_ids(row["prompt"])) <= 30
        assert len(word_format.response_ids(row["response"])) <= 10
        roles = [m["role"] for m in row["prompt"]]
        assert roles[0] == "system" and roles[1] == roles[-1] == "user"
        assert all(a != b for a, b in pairwise(roles))
    assert left_out["reply too short or too long"] > 0  # words and three numbers: up to 11, and the end of turn
    most = max(len([r for r in sets.sft_train if owner_of(r, [d])]) for d in dialogues)
    assert most <= chitchat.ROWS_PER_DIALOGUE


def test_long_contexts_are_kept_where_they_fit(word_format):
    sets, _, _ = build_chitchat(make_dialogues(), TEXTS, SETTINGS, 1, word_format)
    assert {len(row["prompt"]) for row in sets.sft_train} == {2, 4}


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (["Hello there friend", "stone stone river"], "greeting for an answer"),
        (["river stone window", "see http://x.y now"], "no words, or a link"),
        (["river stone window", "you are an idiot"], "rude words"),
        (["you are an idiot", "river stone window"], "rude words"),
        (["river stone window", "yes"], "reply too short or too long"),
        (["river stone window", "!!! ?"], "no words, or a link"),
        (["river " * 50, "stone window river"], "context too long"),
    ],
)
def test_what_is_left_out(word_format, turns, reason):
    dialogues = [*make_dialogues(), *(Dialogue(f"x{q}", f"What about topic {chr(97 + q)}?", turns) for q in range(10))]
    _, left_out, _ = build_chitchat(dialogues, TEXTS, SETTINGS, 1, word_format)
    assert left_out[reason] >= 10
    assert build_chitchat(make_dialogues(), TEXTS, SETTINGS, 1, word_format)[1][reason] == 0


def test_the_same_reply_is_kept_three_times(word_format):
    dialogues = make_dialogues()
    dialogues += [Dialogue(f"x{i}", "What about topic a?", [f"train {i}", "Haha yes sure!"]) for i in range(20)]
    dialogues += [Dialogue(f"y{i}", "What about topic a?", [f"coffee {i}", "hahaha, YES sure"]) for i in range(20)]
    for seed in range(3):
        sets, _, _ = build_chitchat(dialogues, TEXTS, SETTINGS, seed, word_format)
        assert sum("sure" in row["response"] for row in sets.sft_train) in (0, 3)  # 0: the question is held out


def test_the_seed_decides_and_the_order_of_the_dialogues_does_not(word_format):
    dialogues = make_dialogues()
    sets, *_ = build_chitchat(dialogues, TEXTS, SETTINGS, 1, word_format)
    assert build_chitchat(dialogues[::-1], TEXTS, SETTINGS, 1, word_format)[0] == sets
    assert build_chitchat(dialogues, TEXTS, SETTINGS, 2, word_format)[0] != sets


def test_limit_counts_dialogues(word_format):
    settings = SETTINGS.model_copy(update={"limit": 40})
    dialogues = make_dialogues()
    sets, *_ = build_chitchat(dialogues, TEXTS, settings, 1, word_format)
    used = set.union(*(owner_of(row, dialogues) for _, rows in sets.items() for row in rows))
    assert 20 < len(used) <= 40


def test_limits_that_leave_nothing(word_format):
    settings = SETTINGS.model_copy(update={"max_prompt_tokens": 4})
    with pytest.raises(UserError, match="max_prompt_tokens=4"):
        build_chitchat(make_dialogues(), TEXTS, settings, 1, word_format)


def test_the_package(word_format):
    dialogues = chitchat.load_dialogues()
    assert len({dialogue.question for dialogue in dialogues}) == 34
    assert all(len(dialogue.turns) >= 2 for dialogue in dialogues)
    settings = DataSettings(max_prompt_tokens=64, max_response_tokens=32, limit=300)
    sets, *_ = build_chitchat(dialogues, TEXTS, settings, 1, word_format)
    assert min(len(rows) for _, rows in sets.items()) >= 8, json.dumps({n: len(r) for n, r in sets.items()})


def test_no_context_of_the_evaluation_opens_as_one_of_training(word_format):
    dialogues = make_dialogues()
    turns = ["train the river stone", "garden paper music"]
    for place, dialogue in enumerate(dialogues):  # the same turn in every dialogue, written in three ways
        opening = (turns[0], f" {turns[0].upper()}", f"{turns[0].replace(' ', '  ')}!")[place % 3]
        dialogue.turns[:] = [opening, f"{turns[1]} {place}"]
    sets, *_ = build_chitchat(dialogues, TEXTS, SETTINGS, 1, word_format)
    said = [[row["prompt"][1]["content"].lower() for row in rows] for rows in (sets.prompts_train, sets.prompts_eval)]
    assert sum("river" in text for text in said[0]) and not any("river" in text for text in said[1])


def test_prompts_for_evaluation_while_it_learns_stand_behind_those_of_the_comparison():
    sets = RowSets()
    kinds = [
        [{"prompt": [{"role": "user", "content": f"{kind} {i}"}], "response": "r"} for i in range(400)] for kind in "ab"
    ]
    chitchat.add_evaluation(sets, *kinds, random.Random(1))
    rows = sets.prompts_eval
    assert len({row["prompt"][0]["content"] for row in rows}) == len(rows) == 664
    assert sum(row["held_out_question"] for row in rows[:600]) == 300
    assert sum(row["held_out_question"] for row in rows[600:]) == 32
