"""The table at the end of a run, from files made by hand."""

import io
import json
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from applications.report_table import SHOWN_ANSWERS, comparison_table, preferences_table
from training.run_directory import RunDirectory
from training.steps import DPO, PPO, REWARD

SFT = {
    "learned_reward": -0.25,
    "length": 12.34,
    "ended_fraction": 0.875,
    "distinct_bigrams": 0.6543,
    "most_frequent_share": 0.125,
    "perplexity_untouched": 31.26,
    "kl": 0.0,
}
RLHF = {
    "learned_reward": 1.5,
    "length": 20.06,
    "ended_fraction": 1.0,
    "distinct_bigrams": 0.4321,
    "most_frequent_share": 0.5,
    "perplexity_untouched": 45.04,
    "kl": 3.456,
}
WIN = {"rate": 0.7625, "low": 0.7031, "high": 0.8219, "judge": "learned reward"}
ACCURACY = {"eval/accuracy": 0.8125, "eval/accuracy_up_to_8_tokens": 0.75, "eval/accuracy_up_to_99_tokens": 0.9}


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


def answer(prompt: str, sft: str, rlhf: str, turns: tuple[str, ...] = ()) -> dict:
    messages = [{"role": "user", "content": text} for text in (*turns, prompt)]
    return {"prompt": messages, "sft": sft, "rlhf": rlhf, "sft_score": 0.0, "rlhf_score": 1.0}


def make_run(
    directory, answers: list[dict], sft=SFT, rlhf=RLHF, reward: dict | None = None, unseen: dict | None = None
) -> RunDirectory:
    run = RunDirectory(directory)
    run.path.mkdir(exist_ok=True)
    sampling = {"temperature": 0.7, "max_tokens": 48}
    result = {"prompts": 80, "sampling": sampling, "sft": sft, "rlhf": rlhf, "win_rate": WIN}
    if unseen is not None:
        result["win_rate_unseen_questions"] = unseen
    run.comparison_of(PPO)[0].write_text(json.dumps(result))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers)
    run.comparison_of(PPO)[1].write_text(lines, encoding="utf-8", newline="\n")
    if reward is not None:
        run.step(REWARD).model.mkdir(parents=True)
        run.step(REWARD).result_file.write_text(json.dumps(reward))
    return run


DPO_PAIR = {"sft": "SFT", "dpo": "DPO"}


def test_a_dpo_run_has_its_own_column_and_no_win_rate_without_a_judge(tmp_path):
    run = RunDirectory(tmp_path)
    evaluation, comparison = run.comparison_of(DPO)
    sft, dpo = ({k: v for k, v in each.items() if k != "learned_reward"} for each in (SFT, RLHF))
    sampling = {"temperature": 0.7, "max_tokens": 48}
    evaluation.write_text(json.dumps({"prompts": 80, "sampling": sampling, "pair": DPO_PAIR, "sft": sft, "dpo": dpo}))
    row = answer("Hi?", "Go.", "Hello!")
    comparison.write_text(json.dumps({"prompt": row["prompt"], "sft": row["sft"], "dpo": row["rlhf"]}) + "\n")
    run.step(DPO).path.mkdir()
    run.step(DPO).result_file.write_text(json.dumps({"eval/accuracy": 0.625}))
    text = comparison_table(run, step=DPO)
    assert "RLHF" not in text and "learned reward" not in text
    assert ["KL to SFT (nats a reply)", "0.00", "3.46"] in cells(text)
    assert cells(text)[-1] == ["Hi?", "Go.", "Hello!"]
    assert "62.5% of held-out pairs ranked right" in one_line(text) and "No win rate" in one_line(text)
    result = json.loads(evaluation.read_text())
    evaluation.write_text(json.dumps(result | {"win_rate": WIN}))
    assert "DPO beats SFT in 76.2% of prompts" in one_line(comparison_table(run, step=DPO))


def cells(text: str) -> list[list[str]]:
    """The rows of all tables, each a list of cells."""
    return [[cell.strip() for cell in line[1:-1].split("│")] for line in text.split("\n") if line.startswith("│")]


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_every_measure_stands_in_its_row_and_column(tmp_path):
    text = comparison_table(make_run(tmp_path, [answer("Hi?", "Go.", "Hello!")]))
    assert cells(text) == [
        ["learned reward", "-0.250", "1.500"],
        ["KL to SFT (nats a reply)", "0.00", "3.46"],
        ["length (tokens)", "12.3", "20.1"],
        ["ended fraction", "0.875", "1.000"],
        ["distinct bigrams", "0.654", "0.432"],
        ["most frequent reply", "12.5%", "50.0%"],
        ["perplexity, untouched model", "31.3", "45.0"],
        ["Hi?", "Go.", "Hello!"],
    ]
    assert "80 held-out prompts, temperature 0.7, at most 48 tokens" in one_line(text)
    for heading in ("SFT", "RLHF", "prompt"):
        assert heading in text


def test_the_score_of_the_lexicon_is_shown_where_it_judges(tmp_path):
    run = make_run(tmp_path, [], {**SFT, "true_score": 0.1234}, {**RLHF, "true_score": -0.5})
    assert cells(comparison_table(run))[0] == ["upbeat score (lexicon)", "0.123", "-0.500"]


def test_win_rate_with_its_interval_and_judge(tmp_path):
    text = one_line(comparison_table(make_run(tmp_path, [])))
    assert "RLHF beats SFT in 76.2% of prompts by learned reward (95 % interval 70.3% to 82.2%; a tie" in text


def test_prompts_that_open_alike_are_said(tmp_path):
    run = make_run(tmp_path, [])
    result = json.loads(run.comparison_of(PPO)[0].read_text())
    for questions, said in ((80, False), (12, True)):
        result["win_rate"] |= {"prompts": 80, "questions": questions}
        run.comparison_of(PPO)[0].write_text(json.dumps(result))
        assert ("a tie counts half; 12 different openings)" in one_line(comparison_table(run))) == said


def test_questions_that_were_never_trained_on_have_a_line_of_their_own(tmp_path):
    unseen = {"prompts": 33, "rate": 0.625, "low": 0.5, "high": 0.75}
    text = one_line(comparison_table(make_run(tmp_path, [], unseen=unseen)))
    assert "On the 33 prompts under questions that no step was trained on: 62.5% (50.0% to 75.0%)" in text
    assert "no step was trained" not in comparison_table(make_run(tmp_path, []))


def test_agreement_with_people_stands_beside_one_person_and_the_lexicon(tmp_path):
    rates = (("learned", 0.947), ("person", 0.935), ("lexicon", 0.926), ("over_lexicon", 0.021))
    judges = {judge: {"rate": rate, "low": rate - 0.01, "high": rate + 0.02} for judge, rate in rates}
    result = {"prompts": 80, "sampling": {"temperature": 0.7, "max_tokens": 48}, "sft": SFT, "rlhf": RLHF}
    result["win_rate"] = WIN | {"judge": "upbeat score (lexicon)"}
    result["panel"] = {
        "tweets": {"texts": 471, "pairs": 9, **judges},
        "film reviews": {"texts": 30, "pairs": 5, **judges},
    }
    run = make_run(tmp_path, [])
    run.comparison_of(PPO)[0].write_text(json.dumps(result))
    text = one_line(comparison_table(run))
    assert "│ tweets (471 texts) │ 94.7% (93.7% to 96.7%) │ 93.5% │ 92.6% │ │ film reviews (30 texts) │ 94.7%" in text
    assert "in 94.7% of pairs, one person in 93.5%, the lexicon in 92.6%: +2.1 points against the lexicon" in text
    assert "(95 % interval +1.1 to +4.1)" in text and "No reward saw the lexicon" in text
    result["win_rate"] = WIN  # by another judge
    run.comparison_of(PPO)[0].write_text(json.dumps(result))
    assert "No reward saw" not in comparison_table(run)


def test_a_person_called_all_keeps_a_row_and_all_people_stand_below_a_line():
    shares = {"rate": 0.5, "low": 0.25, "high": 0.75, "ties": 0, "both_bad": 0}
    by = {"all": shares | {"preferences": 3}, "ann": shares | {"preferences": 4}}
    console = Console(file=io.StringIO(), width=120)
    console.print(preferences_table({"model": "m", "against": "n", "by": by, "together": shares | {"preferences": 7}}))
    rows = [row[:2] for row in cells(console.file.getvalue())]
    assert [row for row in rows if row[1:] != ["preferences"]] == [["all", "3"], ["ann", "4"], ["all", "7"]]
    assert [line[0] for line in console.file.getvalue().splitlines()] == list("┏┃┡││├│└")


def test_reward_accuracy_comes_from_the_finished_step_2(tmp_path):
    text = one_line(comparison_table(make_run(tmp_path, [], reward=ACCURACY)))
    assert "81.2% of held-out pairs ranked right (up to 8 tokens 75.0%, up to 99 tokens 90.0%)" in text
    text = one_line(comparison_table(make_run(tmp_path / "counted", [], reward={**ACCURACY, "held_out": 32})))
    assert "81.2% of 32 held-out pairs ranked right" in text


def test_no_reward_accuracy_without_step_2(tmp_path):
    assert "ranked right" not in comparison_table(make_run(tmp_path, []))


def test_the_last_turn_of_a_conversation_is_the_prompt_shown(tmp_path):
    run = make_run(tmp_path, [answer("And you?", "Fine.", "Great!", turns=("How are you?",))])
    assert cells(comparison_table(run))[-1] == ["And you?", "Fine.", "Great!"]


def test_the_first_few_answers_are_shown(tmp_path):
    run = make_run(tmp_path, [answer(f"question {i}", f"sft {i}", f"rlhf {i}") for i in range(SHOWN_ANSWERS + 2)])
    shown = [row for row in cells(comparison_table(run)) if row[0].startswith("question")]
    assert shown == [[f"question {i}", f"sft {i}", f"rlhf {i}"] for i in range(SHOWN_ANSWERS)]


@pytest.mark.parametrize("said", ["[bold]not markup[/bold]", "an end [/b] without a beginning", "[red]", ":smile:"])
def test_answers_are_shown_as_they_are(tmp_path, said, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    run = make_run(tmp_path, [answer(f"p {said}", f"s {said}", f"r {said}")])
    assert cells(comparison_table(run))[-1] == [f"p {said}", f"s {said}", f"r {said}"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_other_line_separators_in_an_answer_end_no_row(tmp_path, separator):
    """str.splitlines() would cut the JSON line in two there."""
    run = make_run(tmp_path, [answer("first", f"one{separator}two", "three"), answer("second", "four", "five")])
    text = comparison_table(run)
    assert "one" in text and "two" in text and "three" in text
    assert cells(text)[-1] == ["second", "four", "five"]


def test_a_long_answer_is_folded_not_cut(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = [f"word{i}" for i in range(60)]
    text = comparison_table(make_run(tmp_path, [answer("p", " ".join(words), "short")]))
    assert max(map(len, text.split("\n"))) <= 80
    shown = " ".join(row[1] for row in cells(text) if len(row) == 3 and "word" in row[1])
    assert shown.split() == words


def test_a_run_whose_base_is_not_known_says_under_which_model_and_what_was_trained_elsewhere(tmp_path):
    figures = ({k: v for k, v in each.items() if k != "perplexity_untouched"} for each in (SFT, RLHF))
    sft, rlhf = (each | {"perplexity_sft_model": 7.25} for each in figures)
    run = make_run(tmp_path, [answer("Hi?", "Go.", "Hello!")], sft, rlhf)
    file = run.comparison_of(PPO)[0]
    sentence = "It is not known what [my/sft] was trained on."
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trained_elsewhere": [sentence]}))
    text = comparison_table(run)
    assert "perplexity, SFT model" in text and "7.2" in text and "untouched" not in text
    assert sentence in text


def test_on_a_narrow_terminal_figures_stay_whole_and_answers_stand_below_each_other(tmp_path, monkeypatch):
    run = make_run(tmp_path, [answer("How are 你好 you today, my friend?", "Fine, thank you very much 世界.", "Well.")])
    for width in (30, 40, 59, 80, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        text = comparison_table(run)
        assert all(cell_len(line) <= width for line in text.splitlines())
        assert all(re.search(rf"(?<![\d.]){re.escape(value)}(?![\d.])", text) for value in ("-0.250", "0.875", "31.3"))
        assert ("prompt: How are" in text) == (width < 60)
        assert "世界" in text
