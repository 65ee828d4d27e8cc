"""The whole step on the tiny model: against a second implementation, over micro-batches, stages and ranks, resumed."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from training.steps import DPO

RATE, BATCH, EPOCHS, SEED, BETA = 1e-3, 4, 2, 3, 0.5
SFT_WEIGHT = 0.7
PAIRS, HELD_OUT = 9, 3
OF_ONE = [0, 3, 5]
COMMON = [
    f"seed={SEED}",
    "dtype=fp32",
    "data.max_prompt_tokens=24",
    "data.max_response_tokens=12",
    f"dpo.beta={BETA}",
    f"dpo.batch_size={BATCH}",
    f"dpo.epochs={EPOCHS}",
    "dpo.eval_every=2",
    "dpo.checkpoint_every=0",
    f"dpo.optimizer.learning_rate={RATE}",
    "dpo.optimizer.warmup=0",
    "dpo.optimizer.epsilon=1e-5",
    "dpo.optimizer.gradient_clipping=0",
]
LORA = "dpo.optimizer.lora.rank=4"
CASES = {
    "plain": [],
    "small micro-batches": ["dpo.micro_batch_tokens=8"],
    "zero 3": ["dpo.optimizer.zero_stage=3"],
    "smoothed": ["dpo.label_smoothing=0.2"],
    "normalized": ["dpo.length_normalized=true"],
    "apo_zero": ["dpo.loss=apo_zero"],
    "ipo": ["dpo.loss=ipo", "dpo.length_normalized=true"],
    "sft": [f"dpo.sft_coefficient={SFT_WEIGHT}"],
    "sft, small micro-batches": [f"dpo.sft_coefficient={SFT_WEIGHT}", "dpo.micro_batch_tokens=8"],
    "by prompt": ["dpo.by_prompt=true"],
    "by prompt, small micro-batches": ["dpo.by_prompt=true", "dpo.micro_batch_tokens=8"],
    "lora": [LORA, f"dpo.optimizer.learning_rate={2 * RATE}"],
    "lora rate": [LORA, f"dpo.optimizer.lora.learning_rate={2 * RATE}"],
    "dropout": [LORA, "dpo.dropout=0.2", "dpo.checkpoint_every=2"],
    "killed": [LORA, "dpo.dropout=0.2", "dpo.checkpoint_every=2"],
    "bf16": ["dtype=bf16"],
    "short": ["dpo.max_steps=1"],
}
OWN = "reference_model={directory}/1/plain/step2_dpo/model"
OWN_CASES = {"own": [OWN], "own zero 3": [OWN, "dpo.optimizer.zero_stage=3"]}
"""The reference is what the case `plain` has trained."""
ALSO_ON_TWO_RANKS = ("plain", "zero 3", "lora", "sft", "by prompt", *OWN_CASES)


class Killed(Exception):
    pass


def make_rows(count: int, seed: int) -> list[dict]:
    words = "I you like rice sea story very good bad day tell me about the world today please sleep walk".split()
    draw = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, longest)))

    return [
        {"prompt": [{"role": "user", "content": text(9)}], "chosen": text(6), "rejected": text(6)} for _ in range(count)
    ]


def rows_of_case(case: str) -> list[dict]:
    """In "by prompt" three pairs (OF_ONE) of three answers to one prompt, two of another one, and four alone."""
    rows = make_rows(PAIRS, 1)
    if case.startswith("by prompt"):
        best, middle, worst = rows[0]["chosen"], rows[1]["rejected"], rows[0]["rejected"]
        for row, (chosen, rejected) in zip(OF_ONE, ((best, worst), (best, middle), (middle, worst)), strict=True):
            rows[row] = {"prompt": rows[0]["prompt"], "chosen": chosen, "rejected": rejected}
        rows[8] |= {"prompt": rows[1]["prompt"]}
    return rows


def write_data(run, case: str) -> None:
    run.data.mkdir(parents=True)
    for name, rows in (("train", rows_of_case(case)), ("eval", make_rows(HELD_OUT, 2))):
        (run.data / f"pairs_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.data / "counts.json").write_text("{}")


def train_everywhere(ranks, directory):
    """Each case in a run directory of its own, which is left for the tests to read."""
    from unittest.mock import patch

    from inference.families import build_tiny_model
    from training.config_files import load_config
    from training.hybrid_engine.zero_engine import ZeroEngine
    from training.run_directory import RunDirectory
    from training.stage import make_stage
    from training.step2_dpo import dpo, reference

    sft = directory / "sft"
    if ranks.is_first and not sft.exists():
        build_tiny_model(sft)

    def train(name: str) -> None:
        run = RunDirectory(directory / str(ranks.size) / name)
        if ranks.is_first and not run.data.exists():
            write_data(run, name)
            run.step(DPO).path.mkdir(parents=True)
        ranks.barrier()
        case = [each.format(directory=directory) for each in {**CASES, **OWN_CASES}[name]]
        config = load_config([], [f"model={sft}", f"sft_model={sft}", *COMMON, *case])
        dpo.train(make_stage(run, DPO, config, ranks))

    for name in (*CASES, "own") if ranks.size == 1 else ALSO_ON_TWO_RANKS:
        if name == "killed":
            step = ZeroEngine.step

            def until_the_fourth(engine, *arguments, step=step):
                if engine.updates == 3:
                    raise Killed
                return step(engine, *arguments)

            try:
                with patch.object(ZeroEngine, "step", until_the_fourth):
                    train(name)
            except Killed:
                pass
            with patch.object(reference, "score_pairs", side_effect=AssertionError("asked again")):
                train(name)
        else:
            train(name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("dpo")
    for size in (1, 2):
        run_ranks(__file__, "train_everywhere", size, directory)
    return directory


def lines(runs: Path, name: str, ranks: int = 1) -> list[dict]:
    """Of metrics.jsonl, without what a clock says."""
    file = runs / str(ranks) / name / "step2_dpo" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per_second"))} for row in rows]


def training(runs: Path, name: str, ranks: int = 1) -> list[dict]:
    return [row for row in lines(runs, name, ranks) if "loss" in row]


def at_start(runs: Path, name: str) -> dict:
    return lines(runs, name)[0]


def logprobs_by_hand(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits[torch.arange(len(response)), response] - logits.exp().sum(-1).log()


def train_by_hand(sft: Path, name: str, smoothing: float = 0.0, normalized: bool = False):
    """Plain model, one response at a time, the formula of the paper, torch's AdamW, a linear schedule."""
    from transformers import AutoModelForCausalLM

    from inference.chat_format import ChatFormat
    from tests.supervised_steps import batches_of_epoch
    from training.config import DPOSettings

    chat_format, policy = ChatFormat.load(sft), AutoModelForCausalLM.from_pretrained(sft).eval()
    reference = AutoModelForCausalLM.from_pretrained(sft).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), RATE, (0.9, 0.95), 1e-5, weight_decay=0)
    kinds = ("chosen", "rejected")
    units: dict[str, list] = {}
    for place, row in enumerate(rows_of_case(name)):
        pair = chat_format.prompt_ids(row["prompt"], 24), [chat_format.response_ids(row[kind], 12) for kind in kinds]
        units.setdefault(str(row["prompt"]) if name == "by prompt" else f"{place}", []).append(pair)
    pairs = list(units.values())
    batches = [b for e in range(EPOCHS) for b in batches_of_epoch(len(pairs), DPOSettings(batch_size=BATCH), SEED, e)]
    found = []
    for number, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = RATE * (1 - number / len(batches))
        losses, chosen_rewards, right_ones = [], [], 0
        for prompt, responses, share in [(*pair, 1 / len(pairs[row])) for row in batch for pair in pairs[row]]:
            rewards, likelihoods = [], []
            for response in responses:
                with torch.no_grad():
                    before = logprobs_by_hand(reference, prompt, response).sum()
                logprobs = logprobs_by_hand(policy, prompt, response)
                reward = BETA * (logprobs.sum() - before)
                rewards.append(reward / len(response) if normalized else reward)
                likelihoods.append(logprobs.mean())
            right = 1 / (1 + (rewards[1] - rewards[0]).exp())
            likelier = [1 / (1 + (-reward).exp()) for reward in rewards]
            dpo = -(1 - smoothing) * right.log() - smoothing * (1 - right).log()
            losses.append(
                share
                * {
                    "apo_zero": 1 - likelier[0] + likelier[1],
                    "ipo": ((rewards[0] - rewards[1]) / BETA - 1 / (2 * BETA)) ** 2,
                    "sft": dpo - SFT_WEIGHT * likelihoods[0],
                }.get(name, dpo)
            )
            chosen_rewards.append(share * float(rewards[0].detach()))
            right_ones += share * int(rewards[0] > rewards[1])
        loss = torch.stack(losses).sum() / len(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append((float(loss.detach()), sum(chosen_rewards) / len(batch), right_ones / len(batch)))
    return found, policy


@pytest.mark.parametrize(
    ("name", "smoothing", "normalized"),
    [
        ("plain", 0.0, False),
        ("smoothed", 0.2, False),
        ("normalized", 0.0, True),
        ("apo_zero", 0.0, False),
        ("ipo", 0.0, True),
        ("sft", 0.0, False),
        ("by prompt", 0.0, False),
    ],
)
def test_training_is_that_of_a_second_implementation(runs, name, smoothing, normalized):
    from transformers import AutoModelForCausalLM

    expected, policy = train_by_hand(runs / "sft", name, smoothing, normalized)
    rows = training(runs, name)
    assert len(rows) == len(expected) == (2 if name == "by prompt" else 4)
    for number, (row, (loss, chosen, accuracy)) in enumerate(zip(rows, expected, strict=True)):
        if number:  # before the first update all margins are 0, but for rounding
            assert row["accuracy"] == pytest.approx(accuracy)
        assert row["loss"] == pytest.approx(loss, rel=1e-4)
        assert row["reward/chosen"] == pytest.approx(chosen, rel=1e-3, abs=1e-5)
        assert row["margin"] == pytest.approx(row["reward/chosen"] - row["reward/rejected"], abs=1e-5)
    assert expected[-1][0] < expected[0][0] - 0.01  # something was learned
    saved = AutoModelForCausalLM.from_pretrained(runs / "1" / name / "step2_dpo" / "model")
    for (key, ours), theirs in zip(saved.named_parameters(), policy.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5), key


@pytest.mark.parametrize("name", CASES)
def test_the_policy_begins_as_its_reference(runs, name):
    first = at_start(runs, name)
    assert first["number"] == 0
    loss = 1.0 if name in ("apo_zero", "ipo") else math.log(2)
    assert first["eval/loss"] == pytest.approx(loss + SFT_WEIGHT * first.get("eval/nll", 0), abs=1e-5)
    assert ("eval/nll" in first) == name.startswith("sft")
    assert first["eval/margin"] == first["eval/reward/chosen"] == 0
    assert first["eval/accuracy"] == 0.5  # nothing but ties, and a tie counts half
    assert first["eval/logprobs/chosen"] < -1
    assert lines(runs, name)[-1]["eval/reward/chosen"] != 0


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        *[("small micro-batches", 1), ("zero 3", 1), ("sft, small micro-batches", 1)],
        ("by prompt, small micro-batches", 1),
        *((name, 2) for name in ALSO_ON_TWO_RANKS),
    ],
)
def test_training_does_not_depend_on_micro_batches_stage_or_ranks(runs, name, ranks):
    kinds = ("lora", "sft", "by prompt", "own")
    base = lines(runs, next((kind for kind in kinds if name.startswith(kind)), "plain"))
    other = lines(runs, name, ranks)
    assert len(base) == len(other)
    for ours, theirs in zip(base, other, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5)


def test_a_reference_of_its_own_is_what_rewards_count_from(runs):
    """The first loss there is that of a policy that has unlearned what `plain` learned."""
    first, trained = at_start(runs, "own"), lines(runs, "plain")[-1]
    assert first["eval/logprobs/chosen"] == at_start(runs, "plain")["eval/logprobs/chosen"]
    assert first["eval/margin"] == pytest.approx(-trained["eval/margin"], rel=1e-4) != 0


def test_the_sft_term_keeps_chosen_responses_likely(runs):
    """Without it DPO makes them less likely here than with it, on the pairs that are trained on."""
    plain, kept = (training(runs, name)[-1]["logprobs/chosen"] for name in ("plain", "sft"))
    assert kept > plain + 0.5


def test_a_resumed_run_is_an_uninterrupted_one_to_the_bit(runs):
    assert lines(runs, "killed") == lines(runs, "dropout")
    ours, theirs = (runs / "1" / name / "step2_dpo" for name in ("killed", "dropout"))
    for file in ("model/model.safetensors", "reference.safetensors"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes()


def test_dropout_is_on_in_updates_alone(runs):
    """Without it the first loss is log 2, and what held-out pairs get does not depend on it."""
    assert training(runs, "lora")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(training(runs, "dropout")[0]["loss"] - math.log(2)) > 1e-3
    assert at_start(runs, "dropout") == at_start(runs, "lora")


def test_adapters_have_a_learning_rate_of_their_own(runs):
    assert lines(runs, "lora rate") == lines(runs, "lora")
    assert training(runs, "lora rate")[0]["lr"] == 2 * RATE


def test_bf16_follows_fp32(runs):
    for ours, theirs in zip(training(runs, "plain"), training(runs, "bf16"), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=0.05)


def test_the_reference_is_asked_about_the_pairs_that_are_trained_on(runs):
    from safetensors.torch import load_file

    values = load_file(runs / "1" / "short" / "step2_dpo" / "reference.safetensors")
    assert values["train"].shape == (2, PAIRS) and values["eval"].shape == (2, HELD_OUT)
    assert int(values["train"].isfinite().all(0).sum()) == BATCH  # one optimiser step
    assert values["eval"].isfinite().all()
    assert training(runs, "short")[0]["loss"] == training(runs, "plain")[0]["loss"]


def test_a_prompt_with_all_its_pairs_is_asked_in_one_pass_and_each_response_once(runs):
    """Of three responses in three pairs the reference has three numbers, whatever the micro-batches."""
    from safetensors.torch import load_file

    names = ("by prompt", "by prompt, small micro-batches")
    files = [runs / "1" / name / "step2_dpo" / "reference.safetensors" for name in names]
    large, small = (load_file(file)["train"] for file in files)
    assert torch.allclose(large, small, atol=1e-4, equal_nan=True)  # of pairs that are not trained on
    for values in (large, small):
        chosen, rejected = values[:, OF_ONE]
        assert chosen[0] == chosen[1] and rejected[0] == rejected[2] and chosen[2] == rejected[1]


def test_the_result_says_how_it_went(runs):
    result = json.loads((runs / "1" / "plain" / "step2_dpo" / "result.json").read_text())
    assert result["optimizer_steps"] == 4 and result["rows"] == PAIRS
    assert result["eval/loss"] == lines(runs, "plain")[-1]["eval/loss"]
