"""DPO on answers with a label each (`dpo.loss=kto`) on the tiny model: against a second implementation from the paper's
formulas, over micro-batches, stages and ranks, resumed; and what it teaches."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from inference.errors import UserError
from tests.ranks import run_ranks
from tests.training.step2_dpo.test_dpo import (
    BATCH,
    BETA,
    COMMON,
    EPOCHS,
    LORA,
    RATE,
    SEED,
    Killed,
    at_start,
    lines,
    logprobs_by_hand,
    make_rows,
    training,
)
from training.run_directory import RunDirectory
from training.stage import Stage
from training.steps import DPO, REWARD

KTO = ["method=dpo", "dpo.loss=kto"]
WEIGHED = ["dpo.undesirable_weight=0.1", "dpo.length_normalized=true"]
"""With them the reference point is over 0."""
DROPOUT = [LORA, "dpo.dropout=0.2", "dpo.checkpoint_every=2"]
CASES = {
    "plain": [],
    "small micro-batches": [*WEIGHED, "dpo.micro_batch_tokens=8"],
    "zero 3": [*WEIGHED, "dpo.optimizer.zero_stage=3"],
    "weighed": WEIGHED,
    "whole": DROPOUT,
    "killed": DROPOUT,
}
GOOD, BAD = ("Yes, sure.", "Yes, gladly."), ("No, never.", "No way.")
TAUGHT = ["dpo.epochs=4", "dpo.optimizer.learning_rate=1e-2", "data.split=[0,1,0]", "dpo.eval_every=0"]


def rows_of(seed: int, pairs: int, labelled: int) -> list[dict]:
    """Answers with a label, and pairs behind them."""
    rows = make_rows(pairs + labelled, seed)
    labels = [
        {"prompt": row["prompt"], "response": row["chosen"], "label": place % 3 == 0}
        for place, row in enumerate(rows[pairs:])
    ]
    return labels + rows[:pairs]


TRAINED, HELD_OUT = rows_of(1, 2, 7), rows_of(2, 2, 2)  # 11 answers, 3 + 2 of them good; 6 held out


def train_everywhere(ranks, directory):
    from unittest.mock import patch

    from inference.families import build_tiny_model
    from training.config_files import load_config
    from training.hybrid_engine.zero_engine import ZeroEngine
    from training.stage import make_stage
    from training.step2_dpo import dpo, reference

    sft = directory / "sft"
    if ranks.is_first and not sft.exists():
        build_tiny_model(sft)

    def train(name: str, *settings: str) -> None:
        run = RunDirectory(directory / str(ranks.size) / name)
        if ranks.is_first and not run.step(DPO).path.exists():
            run.step(DPO).path.mkdir(parents=True)
            if name in CASES:
                run.data.mkdir()
                for part, rows in (("train", TRAINED), ("eval", HELD_OUT)):
                    (run.data / f"pairs_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
                (run.data / "counts.json").write_text("{}")
        ranks.barrier()
        config = load_config([], [f"model={sft}", f"sft_model={sft}", *COMMON, *KTO, *settings])
        dpo.train(make_stage(run, DPO, config, ranks))

    if ranks.size == 2:
        train("weighed", *WEIGHED)
        return
    step = ZeroEngine.step

    def until_the_fourth(engine, *arguments):
        if engine.updates == 3:
            raise Killed
        return step(engine, *arguments)

    for name, settings in CASES.items():
        if name == "killed":
            with pytest.raises(Killed), patch.object(ZeroEngine, "step", until_the_fourth):
                train(name, *settings)
            with patch.object(reference, "reference_logprobs", side_effect=AssertionError("asked again")):
                train(name, *settings)
        else:
            train(name, *settings)
    questions = [f"Will you come to {place} on day {day}?" for place in ("Rome", "Oslo") for day in range(20)]
    labels = [
        {"prompt": question, "completion": (GOOD if place % 4 else BAD)[place % 2], "label": bool(place % 4)}
        for place, question in enumerate(questions)
    ]
    (directory / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    train("taught", f"data.source={directory / 'labels.jsonl'}", "data.held_out=0.3", *TAUGHT)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("kto")
    for size in (1, 2):
        run_ranks(__file__, "train_everywhere", size, directory)
    return directory


def train_by_hand(sft: Path, bad_weight: float, normalized: bool) -> list[dict[str, float]]:
    """Equation 7 of the paper in plain loops: lambda - lambda * sigmoid(+-beta * (r - z0)), and z0 from y' of the next
    row of the batch; torch's AdamW, a linear schedule."""
    from transformers import AutoModelForCausalLM

    from inference.chat_format import ChatFormat
    from tests.supervised_steps import batches_of_epoch
    from training.config import DPOSettings

    form, policy = ChatFormat.load(sft), AutoModelForCausalLM.from_pretrained(sft).eval()
    reference = AutoModelForCausalLM.from_pretrained(sft).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), RATE, (0.9, 0.95), 1e-5, weight_decay=0)
    first = [(row["prompt"], row.get("response", row.get("chosen")), row.get("label", True)) for row in TRAINED]
    rest = [(row["prompt"], row["rejected"], False) for row in TRAINED if "rejected" in row]
    answers = [(form.prompt_ids(x, 24), form.response_ids(y, 12), good) for x, y, good in first + rest]

    def logratio(prompt: list[int], response: list[int]) -> torch.Tensor:
        with torch.no_grad():
            before = logprobs_by_hand(reference, prompt, response).sum()
        found = logprobs_by_hand(policy, prompt, response).sum() - before
        return found / len(response) if normalized else found

    settings = DPOSettings(batch_size=BATCH)
    batches = [b for epoch in range(EPOCHS) for b in batches_of_epoch(len(answers), settings, SEED, epoch)]
    found = []
    for number, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = RATE * (1 - number / len(batches))
        with torch.no_grad():
            ratios = [
                logratio(answers[row][0], answers[batch[(place + 1) % len(batch)]][1])
                for place, row in enumerate(batch)
            ]
        z0 = max(0.0, float(sum(ratios)) / len(ratios))
        losses, rewards = [], {True: [], False: []}
        for row in batch:
            prompt, response, good = answers[row]
            r = logratio(prompt, response)
            rewards[good].append(BETA * float(r.detach()))
            weight, sign = (1.0, 1) if good else (bad_weight, -1)
            losses.append(weight - weight / (1 + (-sign * BETA * (r - z0)).exp()))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        means = {f"reward/{name}": rewards[kind] for name, kind in (("good", True), ("bad", False)) if rewards[kind]}
        found.append({"loss": float(loss.detach()), "kl": z0} | {k: sum(v) / len(v) for k, v in means.items()})
    return found


@pytest.mark.parametrize(("name", "bad_weight", "normalized"), [("plain", 5 / 6, False), ("weighed", 0.1, True)])
def test_training_is_that_of_a_second_implementation(runs, name, bad_weight, normalized):
    expected = train_by_hand(runs / "sft", bad_weight, normalized)
    rows = training(runs, name)
    assert len(rows) == len(expected) == 4
    for row, by_hand in zip(rows, expected, strict=True):
        assert {key for key in row if key.startswith("reward/")} == {key for key in by_hand if "reward" in key}
        for key, value in by_hand.items():
            assert row[key] == pytest.approx(value, rel=2e-3, abs=2e-5), (row["number"], key)
    assert name == "plain" or expected[-1]["kl"] > 1e-3


def test_the_policy_begins_as_its_reference(runs):
    first = at_start(runs, "plain")
    assert first["eval/reward/good"] == first["eval/reward/bad"] == first["eval/kl"] == first["eval/margin"] == 0
    assert first["eval/accuracy"] == 0.5
    good, bad = 3, 3  # of the held-out answers
    assert first["eval/loss"] == pytest.approx(0.5 * (good + bad * 5 / 6) / (good + bad), abs=1e-6)


@pytest.mark.parametrize(("name", "ranks"), [("small micro-batches", 1), ("zero 3", 1), ("weighed", 2)])
def test_training_does_not_depend_on_micro_batches_stage_or_ranks(runs, name, ranks):
    base, other = lines(runs, "weighed"), lines(runs, name, ranks)
    assert len(base) == len(other)
    for ours, theirs in zip(base, other, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5)


def test_a_reward_model_refuses_answers_with_a_label():
    stage = SimpleNamespace(directory=SimpleNamespace(step=REWARD), run=RunDirectory(Path("runs/liked")))
    with pytest.raises(UserError, match=r"Step 2 needs pairs, and runs/liked/data has .* --from runs/liked --fork"):
        Stage.token_pairs(stage, TRAINED, None)


def test_a_resumed_run_is_an_uninterrupted_one_to_the_bit(runs):
    assert lines(runs, "killed") == lines(runs, "whole")
    ours, theirs = (runs / "1" / name / "step2_dpo" for name in ("killed", "whole"))
    for file in ("model/model.safetensors", "reference.safetensors"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes()


def test_a_model_learns_from_labels_alone_which_answers_people_like(runs):
    """Of 28 answers to questions of their own three quarters are good; held-out ones are told apart."""
    before, *_, after = lines(runs, "taught")
    assert before["eval/accuracy"] == 0.5 and after["eval/accuracy"] > 0.9
    assert after["eval/reward/good"] > BETA * after["eval/kl"] > after["eval/reward/bad"]
    assert after["eval/loss"] < before["eval/loss"] - 0.1
    result = json.loads((runs / "1" / "taught" / "step2_dpo" / "result.json").read_text())
    assert 0 < result["held_out"] < 6 and result["rows"] > 20
