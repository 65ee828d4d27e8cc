"""Step 2 on the tiny model against a second implementation: plain transformers and torch, one answer at a time."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from inference.chat_format import ChatFormat
from inference.errors import UserError
from inference.families import build_tiny_model
from tests.supervised_steps import (
    BATCH,
    LONGEST,
    make_run,
    metrics_of,
    on_two_ranks,
    prompt,
    require_same_weights,
    result_of,
    settings_of,
    stage_of,
    text,
    train_by_hand,
    with_idle_micro_batch,
)
from training.data.rows import require_margins
from training.data.token_cache import rows_of
from training.evaluation.comparison import Accuracy
from training.models.loading import load_scorer, save_model
from training.models.policy import Scorer
from training.role_settings import LoRASettings
from training.run_directory import RunDirectory
from training.step2_reward import reward
from training.step2_reward.reward import RewardTask, initial_model, length_bucket
from training.steps import REWARD

SIDES = ("chosen", "rejected")
MARGIN, CENTERING = 0.5, 0.3
BY_HAND = ("plain", "margin", "centering", "by prompt")
CASES = {
    "plain": [],
    "small micro-batches": ["reward.micro_batch_tokens=8"],
    "not normalized": ["reward.normalize=false"],
    "lora": ["reward.optimizer.lora.rank=4", "reward.optimizer.learning_rate=1e-2"],
    "dropout": ["reward.dropout=0.3"],
    "margin": [f"reward.margin={MARGIN}"],
    "centering": [f"reward.centering={CENTERING}"],
    "by prompt": ["reward.by_prompt=true", f"reward.margin={MARGIN}"],
    "by prompt, small micro-batches": [
        *["reward.by_prompt=true", f"reward.margin={MARGIN}", "reward.micro_batch_tokens=8"],
    ],
}


def make_rows(count: int, seed: int) -> list[dict]:
    draw = random.Random(seed)
    return [{"prompt": prompt(draw), "chosen": text(draw, 6), "rejected": text(draw, 6)} for _ in range(count)]


SAME = " ".join(["story"] * 30)
TRAIN, HELD_OUT = make_rows(9, 1), make_rows(7, 2)
CUT_ALIKE = {"prompt": HELD_OUT[0]["prompt"], "chosen": f"{SAME} good", "rejected": f"{SAME} bad"}
for place in (1, 4, 5):
    HELD_OUT[place]["held_out_question"] = True
HELD_OUT[2]["held_out_question"] = False
for place, row in enumerate([*TRAIN[:-1], *HELD_OUT]):  # the last one says nothing, and others by scores
    row |= {"margin": place % 4} if place % 3 else {"chosen_score": place % 4 + 0.5, "rejected_score": -1.0}


def of_one_prompt(row: dict, *others: str) -> list[dict]:
    """A pair of each two answers: earlier ones are better."""
    answers = [*others, row["chosen"], row["rejected"]]
    return [
        {"prompt": row["prompt"], "chosen": answers[i], "rejected": answers[j], "margin": j - i}
        for j in range(len(answers))
        for i in range(j)
    ]


SEVERAL = [*of_one_prompt(TRAIN[0], "story", "rice sea"), TRAIN[1], *of_one_prompt(TRAIN[2], "sleep"), *TRAIN[3:6]]
SEVERAL = SEVERAL[::2] + SEVERAL[1::2]  # those of a prompt stand apart


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A scorer with a head that is known, and the shift and scale of an earlier training."""
    directory = tmp_path_factory.mktemp("reward")
    build_tiny_model(directory / "tiny")
    chat_format = ChatFormat.load(directory / "tiny")
    torch.manual_seed(5)
    model = load_scorer(directory / "tiny", chat_format, torch.float32)
    old = {"score_shift": 7.0, "score_scale": 3.0}
    save_model(directory / "base", model, chat_format, {}, LoRASettings(), torch.float32, old)
    return directory / "base"


def settings(base: Path) -> list[str]:
    return [f"model={base.parent / 'tiny'}", f"reward_model={base}", *settings_of("reward"), "reward.eval_rows=8"]


@pytest.fixture(scope="module")
def runs(base, one_rank) -> dict[str, RunDirectory]:
    """A finished step 2 of each case."""
    found = {}
    for name, extra in CASES.items():
        held_out = [CUT_ALIKE, *HELD_OUT, *make_rows(2, 3)]  # two more than reward.eval_rows
        train = SEVERAL if name.startswith("by prompt") else [*TRAIN, CUT_ALIKE]
        run = make_run(base.parent / name.replace(" ", "_").replace(",", ""), "pairs", train, held_out)
        reward.train(stage_of(run, REWARD, [*settings(base), *extra], one_rank))
        found[name] = run
    return found


def scores_by_hand(model, row: dict, chat_format: ChatFormat) -> list[torch.Tensor]:
    """Of the chosen and of the rejected answer, at its last token."""
    start = chat_format.prompt_ids(row["prompt"], 24)
    answers = [chat_format.response_ids(row[side], LONGEST) for side in SIDES]
    return [model(torch.tensor([start + answer])).logits[0, 0] for answer in answers]


def loss_by_hand(row: dict, scores: list[torch.Tensor], case: str = "plain") -> torch.Tensor:
    """log(1 + e^-lead), which is -log sigmoid(lead), and the square of the sum of both scores."""
    said = row.get("margin", row.get("chosen_score", 0) - row.get("rejected_score", 0))
    lead = scores[0] - scores[1] - (MARGIN * said if case in ("margin", "by prompt") else 0)
    return (1 + (-lead).exp()).log() + (CENTERING * (scores[0] + scores[1]) ** 2 if case == "centering" else 0)


@torch.no_grad()
def measure_by_hand(model, rows: list[dict], chat_format: ChatFormat, case: str = "plain") -> dict[str, float]:
    scores = [[float(score) for score in scores_by_hand(model, row, chat_format)] for row in rows]
    margins = [chosen - rejected for chosen, rejected in scores]
    losses = [loss_by_hand(row, torch.tensor(both), case) for row, both in zip(rows, scores, strict=True)]
    found = {
        "eval/loss": float(sum(losses)) / len(rows),
        "eval/margin": sum(margins) / len(rows),
        "eval/chosen": sum(chosen for chosen, _ in scores) / len(rows),
        "eval/rejected": sum(rejected for _, rejected in scores) / len(rows),
        "eval/accuracy": sum(margin > 0 for margin in margins) / len(rows),
    }
    groups: dict[str, list[bool]] = {}
    for row, margin in zip(rows, margins, strict=True):
        longer = max(len(chat_format.response_ids(row[side], LONGEST)) for side in SIDES)
        groups.setdefault(f"up_to_{8 if longer <= 8 else 16}_tokens", []).append(margin > 0)
        if row.get("held_out_question"):
            groups.setdefault("unseen_questions", []).append(margin > 0)
    assert len(groups) == 3
    return found | {f"eval/accuracy_{name}": sum(right) / len(right) for name, right in groups.items()}


@pytest.fixture(scope="module")
def all_by_hand(base):
    """Optimiser steps, evaluations and the trained model, by case."""
    return {case: case_by_hand(base, case) for case in BY_HAND}


@pytest.fixture
def by_hand(all_by_hand):
    return all_by_hand["plain"]


def case_by_hand(base: Path, case: str):
    """A batch is so many prompts in the end, each with its pairs: InstructGPT's 1 / (K over 2)."""
    chat_format = ChatFormat.load(base)
    model = AutoModelForSequenceClassification.from_pretrained(base).eval()
    of_prompts: dict[str, list[dict]] = {}
    for place, row in enumerate(SEVERAL if case == "by prompt" else TRAIN):
        of_prompts.setdefault(str(row["prompt"]) if case == "by prompt" else f"{place}", []).append(row)
    units, measured = list(of_prompts.values()), []

    def loss_of(batch: list[int]) -> torch.Tensor:
        losses, right, leads = [], 0.0, 0.0
        for unit in batch:
            for row in units[unit]:
                chosen, rejected = scores_by_hand(model, row, chat_format)
                share = 1 / len(units[unit]) / BATCH
                losses.append(loss_by_hand(row, [chosen, rejected], case) * share)
                right += share * float(chosen > rejected)
                leads += share * float(chosen - rejected)
        measured.append({"accuracy": right, "margin": leads})
        return torch.stack(losses).sum()

    steps, evaluations = train_by_hand(
        model, len(units), loss_of, lambda: measure_by_hand(model, HELD_OUT, chat_format, case)
    )
    return [step | more for step, more in zip(steps, measured, strict=True)], evaluations, model


@pytest.mark.parametrize("case", BY_HAND)
def test_training_is_that_of_a_second_implementation(runs, all_by_hand, case):
    steps, evaluations, model = all_by_hand[case]
    found, evaluated = metrics_of(runs[case], REWARD)
    updates = 2 if case == "by prompt" else 4
    assert len(found) == len(steps) == updates and len(evaluated) == len(evaluations) == updates // 2 + 1
    for ours, theirs in zip([*found, *evaluated], [*steps, *evaluations], strict=True):
        assert ours == pytest.approx(theirs | {"number": ours["number"]}, rel=1e-4, abs=1e-5)
    require_same_weights(AutoModelForSequenceClassification.from_pretrained(runs[case].step(REWARD).model), model)


def test_a_margin_that_no_pair_has_is_refused():
    with pytest.raises(UserError, match=r"none of the 2 does: give them a key margin, or scores"):
        require_margins(make_rows(2, 1))
    assert require_margins(TRAIN) == "1 of 9 pairs have no margin: any lead will do there"
    assert require_margins(TRAIN[:-1]) == ""


def test_an_answer_in_several_pairs_of_a_prompt_is_scored_once(runs, base, one_rank):
    """And a prompt with all its answers is in one forward pass, however few tokens that takes."""
    stage = stage_of(runs["by prompt"], REWARD, [*settings(base), *CASES["by prompt, small micro-batches"]], one_rank)
    chat_format, scored = ChatFormat.load(base), []
    task = RewardTask(stage, None, stage.token_pairs(SEVERAL, chat_format), [])
    task.engine = lambda batch: scored.append(batch.lengths) or torch.arange(float(sum(batch.lengths)))
    assert sorted(map(len, task.groups)) == [1, 1, 1, 1, 3, 6] and len(task.lengths) == 6
    for row, group in enumerate(task.groups):
        task.loss([row])
        assert len(scored[-1]) == {1: 2, 3: 3, 6: 4}[len(group)]
        assert sum(scored[-1]) == task.lengths[row]


def test_the_second_implementation_tells_the_sides_apart(by_hand):
    """What is turned round, or of another set of pairs, must be another number."""
    steps, evaluations, _ = by_hand
    last = evaluations[-1]
    assert last["eval/accuracy"] not in (0.5, last["eval/accuracy_unseen_questions"])
    unseen, seven = last["eval/accuracy_unseen_questions"] * 3, last["eval/accuracy"] * 7
    assert unseen / 3 != pytest.approx((seven - unseen) / 4)  # those of the other questions
    assert abs(last["eval/margin"]) > 0.01 and steps[-1]["loss"] != pytest.approx(steps[0]["loss"], rel=1e-3)


@torch.no_grad()
def scale_by_hand(model, rows: list[dict], chat_format: ChatFormat) -> tuple[float, float]:
    """Mean and standard deviation of the scores of chosen and rejected answers together."""
    scores = [float(score) for row in rows for score in scores_by_hand(model, row, chat_format)]
    mean = sum(scores) / len(scores)
    return mean, math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def test_shift_and_scale_are_mean_and_deviation_of_all_held_out_answers(runs, by_hand, base):
    chat_format = ChatFormat.load(base)
    shift, scale = scale_by_hand(by_hand[2], HELD_OUT, chat_format)
    result, config = result_of(runs["plain"], REWARD), config_of(runs["plain"].step(REWARD).model)
    for found in (result, config):
        assert (found["score_shift"], found["score_scale"]) == pytest.approx((shift, scale), rel=1e-4)
    chosen = metrics_of(runs["plain"], REWARD)[1][-1]["eval/chosen"]
    assert abs(shift - chosen) > 1e-3 and abs(scale - scale**2) > 1e-2  # what else it might be is another number


def test_scaled_scores_of_human_answers_have_mean_0_and_deviation_1(runs, base):
    """As step 3 reads the saved model."""
    chat_format, directory = ChatFormat.load(base), runs["plain"].step(REWARD).model
    scorer = Scorer(load_scorer(directory, chat_format, torch.float32)).eval()
    raw = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    scores = [
        (float(score) - scorer.shift) / scorer.scale
        for row in HELD_OUT
        for score in scores_by_hand(raw, row, chat_format)
    ]
    assert sum(scores) / 14 == pytest.approx(0, abs=1e-4)
    assert sum(score**2 for score in scores) / 14 == pytest.approx(1, abs=1e-4)


def test_without_normalizing_the_scores_stay_raw_whatever_the_model_began_with(runs, base):
    assert config_of(base)["score_shift"] == 7.0
    result, config = result_of(runs["not normalized"], REWARD), config_of(runs["not normalized"].step(REWARD).model)
    for found in (result, config):
        assert (found["score_shift"], found["score_scale"]) == (0.0, 1.0)
    assert metrics_of(runs["not normalized"], REWARD) == metrics_of(runs["plain"], REWARD)


@pytest.mark.parametrize("names", [("plain", "small micro-batches"), ("by prompt", "by prompt, small micro-batches")])
def test_training_does_not_depend_on_micro_batches(runs, names):
    for ours, theirs in zip(*(metrics_of(runs[name], REWARD) for name in names), strict=True):
        for line, other in zip(ours, theirs, strict=True):
            assert other == pytest.approx(line, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_saved_model_is_the_one_that_was_evaluated_last(runs, base, name):
    """So adapters and head are merged once, dropout is off where it is evaluated, and the last weights are kept."""
    run = runs[name]
    model = AutoModelForSequenceClassification.from_pretrained(run.step(REWARD).model).eval()
    expected = measure_by_hand(model, HELD_OUT, ChatFormat.load(base), name.partition(",")[0])
    result = result_of(run, REWARD)
    assert {key: result[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert expected["eval/loss"] != pytest.approx(metrics_of(run, REWARD)[1][0]["eval/loss"], rel=1e-3)


def test_pairs_that_are_the_same_after_the_cut_are_left_out(runs):
    """One in each set; the expected values above were without them."""
    assert result_of(runs["plain"], REWARD)["rows"] == len(TRAIN) and result_of(runs["plain"], REWARD)["held_out"] == 7


def test_dropout_changes_what_is_trained(runs):
    losses = [[line["loss"] for line in metrics_of(runs[name], REWARD)[0]] for name in ("plain", "dropout")]
    assert abs(losses[0][0] - losses[1][0]) > 1e-3


@pytest.fixture
def task(runs, base, one_rank) -> RewardTask:
    """Its engine is the model alone: measuring takes no more."""
    stage = stage_of(
        runs["plain"], REWARD, [*settings(base), "reward.micro_batch_tokens=40", "reward.eval_rows=5"], one_rank
    )
    chat_format = ChatFormat.load(base)
    scorer = Scorer(load_scorer(base, chat_format, torch.float32)).eval()
    scorer.shift, scorer.scale = 0.0, 1.0
    pairs = [stage.token_pairs(rows, chat_format) for rows in (TRAIN, HELD_OUT)]
    return RewardTask(stage, scorer, *pairs, scores_by_prompt=True)


def scale_anew(task: RewardTask) -> dict[str, float]:
    task.held_out_scores = None
    return task.score_scale()


def ranking_anew(task: RewardTask, questions: list[str]) -> dict[str, Accuracy]:
    task.held_out_scores = None
    return task.ranking(questions)


def scores_of_texts(task: RewardTask) -> dict[int, float]:
    return dict(enumerate(task.scores_of_texts(rows_of(task.held_out)).tolist()))


def test_a_text_alone_has_the_score_that_it_has_in_a_pair(task):
    chosen, rejected = task.scores(task.held_out).tolist()
    assert list(scores_of_texts(task).values()) == pytest.approx([*chosen, *rejected], abs=1e-5)


@pytest.mark.parametrize("measure", [RewardTask.evaluate, scale_anew, scores_of_texts])
def test_an_idle_micro_batch_does_not_count(task, monkeypatch, measure):
    expected = measure(task)
    monkeypatch.setattr(reward, "plan_micro_batches", with_idle_micro_batch(reward.plan_micro_batches))
    assert measure(task) == expected


@pytest.mark.parametrize("measure", [RewardTask.evaluate, scale_anew, scores_of_texts])
def test_two_ranks_measure_the_mean_over_all_pairs(task, measure):
    """Not the mean of their means."""
    assert on_two_ranks(task, lambda: measure(task)) == pytest.approx(measure(task), rel=1e-5, abs=1e-6)


def test_the_ranking_that_is_kept_is_the_last_evaluation(runs, task, monkeypatch):
    """By the rates, whatever the plan and the number of ranks; with questions that hold several pairs."""
    questions = list("aabbcde")
    expected, measured = ranking_anew(task, questions), task.evaluate()
    names = {"all": "eval/accuracy", "unseen_questions": "eval/accuracy_unseen_questions"}
    for name, found in expected.items():
        assert found["rate"] == pytest.approx(measured[names.get(name, f"eval/accuracy_{name}")])
    assert expected["all"]["pairs"] == 7 and expected["all"]["questions"] == 5
    assert on_two_ranks(task, lambda: ranking_anew(task, questions)) == expected
    monkeypatch.setattr(reward, "plan_micro_batches", with_idle_micro_batch(reward.plan_micro_batches))
    assert ranking_anew(task, questions) == expected
    result = result_of(runs["plain"], REWARD)
    assert result["reward_accuracy"]["all"]["rate"] == pytest.approx(result["eval/accuracy"])
    assert result["reward_accuracy"]["all"]["pairs"] == result["held_out"]


def test_the_scores_of_the_last_evaluation_serve_for_scale_and_ranking(task):
    """And no older ones."""
    questions, engine = list("aabbcde"), task.engine
    for factor in (-2, -0.5):
        with torch.no_grad():
            engine.score_head.weight *= factor
        task.evaluate()
    task.engine = None  # asked no more
    found = task.score_scale(), task.ranking(questions)
    task.engine = engine
    assert found == (scale_anew(task), task.ranking(questions))


def test_without_held_out_pairs_the_scale_is_that_of_the_first_training_pairs(task, base):
    task.held_out = []
    model = AutoModelForSequenceClassification.from_pretrained(base).eval()
    found = task.score_scale()
    expected = scale_by_hand(model, TRAIN[:5], ChatFormat.load(base))  # reward.eval_rows
    assert (found["score_shift"], found["score_scale"]) == pytest.approx(expected, rel=1e-4)
    assert task.evaluate() == task.ranking([]) == {}


def test_equal_scores_leave_a_scale_to_divide_by(task):
    torch.nn.init.zeros_(task.engine.score_head.weight)
    assert task.score_scale() == {"score_shift": 0.0, "score_scale": 1e-6}
    assert task.evaluate()["eval/accuracy"] == 0.0  # a tie is not ranked right


def test_gradients_are_those_of_plain_torch(task, base):
    """Of the sum over pairs, before any optimiser; in fp64, for in fp32 plain torch itself is 2e-6 off, where a bias or
    an embedding adds over tokens."""
    model = AutoModelForSequenceClassification.from_pretrained(base).double().eval()
    task.engine.double()
    chat_format = ChatFormat.load(base)
    scores = [scores_by_hand(model, TRAIN[row], chat_format) for row in (2, 5)]
    sum(loss_by_hand(TRAIN[row], both) for row, both in zip((2, 5), scores, strict=True)).backward()
    loss, _ = task.loss([2, 5])
    loss.backward()
    theirs = dict(model.named_parameters())
    for name, parameter in task.engine.model.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name].grad, rtol=0, atol=1e-6), name


@pytest.mark.parametrize(("source", "expected"), [("base", "base"), ("sft", "tiny")])
def test_training_begins_from_the_base_model_or_from_step_1(runs, base, one_rank, source, expected):
    extra = [f"sft_model={base.parent / 'tiny'}", f"reward.initialize_from={source}"]
    stage = stage_of(runs["plain"], REWARD, [*settings(base), *extra], one_rank)
    assert initial_model(stage) == base.parent / expected


def test_buckets_hold_answers_up_to_their_size():
    assert [length_bucket(tokens) for tokens in (1, 8, 9, 16, 256, 257, 5000)] == [8, 8, 16, 16, 256, 256, 256]
