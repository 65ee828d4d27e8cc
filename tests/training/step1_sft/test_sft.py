"""Step 1 on the tiny model against a second implementation: plain torch, one row at a time."""

import math
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from inference.chat_format import ChatFormat
from inference.families import build_tiny_model
from tests.supervised_steps import (
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
from training.data.token_cache import TokenRows
from training.models.loading import load_causal_lm
from training.models.policy import Policy
from training.run_directory import RunDirectory
from training.step1_sft import sft
from training.step1_sft.sft import SFTTask, within_budget
from training.steps import DEMONSTRATIONS, SFT

LORA = ["sft.optimizer.lora.rank=4", "sft.optimizer.learning_rate=1e-2"]
CASES = {
    "plain": [],
    "small micro-batches": ["sft.micro_batch_tokens=8"],
    "lora": LORA,
    "dropout": ["sft.dropout=0.3"],
}


def make_rows(count: int, seed: int) -> list[dict]:
    draw = random.Random(seed)
    return [{"prompt": prompt(draw), "response": text(draw, 6)} for _ in range(count)]


TRAIN, HELD_OUT = make_rows(9, 1), make_rows(3, 2)
BEYOND_EVAL_ROWS = make_rows(2, 3)
TRAIN[0]["response"] = " ".join(["story"] * 30)  # is cut, and has no end token


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("sft") / "tiny"
    build_tiny_model(directory)
    return directory


@pytest.fixture(scope="module")
def runs(tiny, one_rank) -> dict[str, RunDirectory]:
    """A finished step 1 of each case."""
    found = {}
    for name, extra in CASES.items():
        run = make_run(tiny.parent / name.replace(" ", "_"), "sft", TRAIN, HELD_OUT + BEYOND_EVAL_ROWS)
        settings = [f"model={tiny}", *settings_of("sft"), "sft.eval_rows=3", *extra]
        sft.train(stage_of(run, SFT, settings, one_rank))
        found[name] = run
    return found


def tokens_of(row: dict, chat_format: ChatFormat) -> tuple[list[int], list[int]]:
    return chat_format.prompt_ids(row["prompt"], 24), chat_format.response_ids(row["response"], LONGEST)


def by_hand(model, rows: list[dict], chat_format: ChatFormat) -> tuple[torch.Tensor, float]:
    """Loss and entropy in nats a response token: the sums over all rows' tokens, over their number."""
    losses, entropies = [], []
    for row in rows:
        prompt_ids, response_ids = tokens_of(row, chat_format)
        logits = model(torch.tensor([prompt_ids + response_ids])).logits[0]
        for place, token in enumerate(response_ids, start=len(prompt_ids)):
            chances = logits[place - 1].exp() / logits[place - 1].exp().sum()
            losses.append(-chances[token].log())
            entropies.append(-float((chances * chances.log()).sum().detach()))
    return torch.stack(losses).sum() / len(losses), sum(entropies) / len(entropies)


def held_out_loss(model, chat_format: ChatFormat) -> float:
    with torch.no_grad():
        return float(by_hand(model, HELD_OUT, chat_format)[0])


def test_training_is_that_of_a_second_implementation(runs, tiny):
    chat_format, model = ChatFormat.load(tiny), AutoModelForCausalLM.from_pretrained(tiny).eval()
    entropies = []

    def loss_of(batch: list[int]) -> torch.Tensor:
        loss, entropy = by_hand(model, [TRAIN[row] for row in batch], chat_format)
        entropies.append(entropy)
        return loss

    steps, evaluations = train_by_hand(model, len(TRAIN), loss_of, lambda: {"loss": held_out_loss(model, chat_format)})
    for step, entropy in zip(steps, entropies, strict=True):
        step["entropy"] = entropy
    found, evaluated = metrics_of(runs["plain"], SFT)
    assert len(found) == len(steps) == 4 and len(evaluated) == len(evaluations) == 3
    for ours, theirs in zip(found, steps, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-4)
    for ours, theirs in zip(evaluated, evaluations, strict=True):
        assert ours["eval/loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["eval/perplexity"] == pytest.approx(math.exp(theirs["loss"]), rel=1e-3)
    assert [line["number"] for line in evaluated] == [0, 2, 4]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    require_same_weights(AutoModelForCausalLM.from_pretrained(runs["plain"].step(SFT).model), model)


def test_the_end_of_the_turn_is_learned_unless_the_answer_was_cut(tiny):
    chat_format = ChatFormat.load(tiny)
    ends = [tokens_of(row, chat_format)[1][-1] == chat_format.end_of_turn_id for row in TRAIN]
    assert ends == [False] + [True] * 8


def test_training_does_not_depend_on_micro_batches(runs):
    for ours, theirs in zip(*(metrics_of(runs[name], SFT) for name in ("plain", "small micro-batches")), strict=True):
        for line, other in zip(ours, theirs, strict=True):
            assert other == pytest.approx(line, rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_saved_model_is_the_one_that_was_evaluated_last(runs, tiny, name):
    """So adapters are merged once, dropout is off where it is evaluated, and the last weights are kept."""
    run = runs[name]
    loss = held_out_loss(AutoModelForCausalLM.from_pretrained(run.step(SFT).model).eval(), ChatFormat.load(tiny))
    assert result_of(run, SFT)["eval/loss"] == pytest.approx(loss, rel=1e-4)
    assert result_of(run, SFT)["eval/loss"] == metrics_of(run, SFT)[1][-1]["eval/loss"]
    assert loss < metrics_of(run, SFT)[1][0]["eval/loss"] - 0.01
    assert result_of(run, SFT)["optimizer_steps"] == 4 and result_of(run, SFT)["rows"] == len(TRAIN)


def test_dropout_changes_what_is_trained(runs):
    losses = [[line["loss"] for line in metrics_of(runs[name], SFT)[0]] for name in ("plain", "dropout")]
    assert abs(losses[0][0] - losses[1][0]) > 1e-3


@pytest.fixture
def task(runs, tiny, one_rank) -> SFTTask:
    """Its engine is the model alone: evaluating takes no more."""
    stage = stage_of(runs["plain"], SFT, [f"model={tiny}", *settings_of("sft"), "sft.micro_batch_tokens=30"], one_rank)
    chat_format = ChatFormat.load(tiny)
    policy = Policy(load_causal_lm(tiny, chat_format, torch.float32)).eval()
    rows = stage.tokens(TRAIN, DEMONSTRATIONS, chat_format)
    return SFTTask(stage, policy, rows.first(0), rows)  # nine rows, in several micro-batches


def test_an_idle_micro_batch_does_not_count(task, monkeypatch):
    expected = task.evaluate()
    monkeypatch.setattr(sft, "plan_micro_batches", with_idle_micro_batch(sft.plan_micro_batches))
    assert task.evaluate() == expected


def test_two_ranks_measure_the_mean_over_all_tokens(task):
    """Not the mean of their means."""
    assert on_two_ranks(task, task.evaluate) == pytest.approx(task.evaluate(), rel=1e-6)


def test_without_held_out_rows_nothing_is_measured(task):
    task.held_out = task.rows
    assert task.evaluate() == {}


def test_the_token_budget_takes_the_first_rows_that_fit():
    rows = TokenRows(torch.zeros(16).int(), torch.tensor([[3, 2], [3, 4], [3, 1]]).int())  # 5, 7 and 4 tokens
    assert [len(within_budget(rows, budget)) for budget in (0, 16, 15, 12, 11, 1)] == [3, 3, 2, 2, 1, 1]
