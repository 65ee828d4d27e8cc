"""Evaluation while PPO learns: what it measures, that it changes nothing, and what a resumed run does alike."""

import hashlib
import json

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.step3_rlhf.test_ppo_loop import BASE, learning, run_step
from tests.training.step3_rlhf.test_ppo_updates import make_models
from training.steps import PPO

SETTINGS = {**BASE, "iterations": 3, "checkpoint_every": 2, "ema": 0.5, "temperature": 0.9, "kl": {"coefficient": 0.1}}
EVALUATED = {**SETTINGS, "eval_every": 2, "eval_prompts": 4}
SCORER = """
from pathlib import Path
evaluations = []
def score(prompts, responses, rows):
    evaluations.extend([1] * (len(prompts) == 4))
    if len(evaluations) == 2 and Path(__file__).with_name("fails").exists():
        raise ValueError("no answer")
    return [float(row["number"] + 7 * len(text)) for text, row in zip(responses, rows)]
"""


def left(seen) -> dict:
    """What goes back to the test."""
    if not seen.stage.ranks.is_first:
        return {}
    model = seen.stage.directory.model / "model.safetensors"
    digest = hashlib.sha256(model.read_bytes()).hexdigest() if model.exists() else ""
    file = seen.stage.directory.metrics_file
    metrics = [json.loads(line) for line in file.read_text().splitlines()]
    return {"model": digest, "metrics": metrics, "said": seen.stage.said}


def run_alone(ranks, directory):
    from training.reward_sources import RewardFailed

    models = make_models(ranks, directory)
    scorer = directory / "scorer.py"
    scorer.write_text(SCORER)
    more = {"reward_function": f"{scorer}:score", "reward_weights": {"model": 0.5, "function": 2.0}}
    found = {}
    for name, settings in (("without", SETTINGS), ("with", EVALUATED)):
        found[name] = left(run_step(ranks, directory / name, models, {**settings, **more}))
    run_step(ranks, directory / "killed", models, {**EVALUATED, **more}, killed_in=3)
    found["killed"] = left(run_step(ranks, directory / "killed", models, {**EVALUATED, **more}))
    (directory / "fails").touch()
    with pytest.raises(RewardFailed):
        run_step(ranks, directory / "failed", models, {**EVALUATED, **more, "checkpoint_every": 3})
    (directory / "fails").unlink()
    found["failed"] = left(run_step(ranks, directory / "failed", models, {**EVALUATED, **more, "checkpoint_every": 3}))
    return found | {"by hand": by_hand(models, directory / "with" / PPO.folder / "model")}


@torch.no_grad()
def by_hand(models, directory) -> dict[str, float]:
    """The last evaluation, by plain models: what is answered is drawn by the engine alone."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from inference.generation.engine import GenerationEngine
    from inference.generation.sample import SamplingKey, SamplingSettings
    from tests.training.step3_rlhf.test_ppo_loop import PROMPTS
    from tests.training.step3_rlhf.test_ppo_updates import SCALE, SHIFT, logprobs_by_hand

    sft, reward, chat_format = models
    policy, reference = (AutoModelForCausalLM.from_pretrained(each).eval() for each in (directory, sft))
    scorer = AutoModelForSequenceClassification.from_pretrained(reward).eval()
    numbers = range(PROMPTS)[-4:]
    texts = [[{"role": "user", "content": f"{'very ' * n}short?"}] for n in numbers]
    prompts = [torch.tensor(chat_format.prompt_ids(text, 24)) for text in texts]
    engine = GenerationEngine(policy, chat_format.end_ids, chat_format.pad_id)
    samples = engine.generate(prompts, SamplingSettings(6, 0.9), SamplingKey(1, 1_000_001))
    rewards, kls, lengths = [], [], []
    for sample in sorted(samples, key=lambda sample: sample.index):
        response = torch.tensor(sample.response_ids)
        ours, theirs = (logprobs_by_hand(model, sample.prompt_ids, response, 0.9) for model in (policy, reference))
        kls.append(float(((theirs - ours).exp() - 1 - (theirs - ours)).sum()))
        whole = torch.cat([sample.prompt_ids, torch.tensor(chat_format.as_taught(sample.response_ids))])
        score = (float(scorer(whole[None]).logits) - SHIFT) / SCALE
        text = chat_format.decode(sample.response_ids)
        rewards.append(0.5 * score + 2.0 * (numbers[sample.index] + 7 * len(text)))
        lengths.append(len(response))
    return {"eval/reward": sum(rewards) / 4, "eval/kl": sum(kls) / 4, "eval/length": sum(lengths) / 4}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_ranks(__file__, "run_alone", 1, tmp_path_factory.mktemp("held-out"))[0]


def evaluations(found: dict) -> list[dict]:
    return [line for line in learning(found["metrics"]) if "eval/reward" in line]


def test_it_changes_nothing_that_is_learned(alone):
    assert alone["with"]["model"] == alone["without"]["model"] != ""
    trained = [line for line in learning(alone["with"]["metrics"]) if "eval/reward" not in line]
    assert trained == learning(alone["without"]["metrics"])
    assert not evaluations(alone["without"])


def test_it_comes_before_the_first_iteration_every_so_many_and_at_the_end(alone):
    found = evaluations(alone["with"])
    assert [line["number"] for line in found] == [0, 2, 3]
    assert sum(text.startswith("PPO 2: held-out reward ") for text in alone["with"]["said"]) == 1
    assert found[0]["eval/kl"] < 1e-6 < found[1]["eval/kl"] and found[0]["eval/reward"] != found[1]["eval/reward"]


def test_the_numbers_are_those_of_a_second_implementation(alone):
    last = evaluations(alone["with"])[-1]
    for name, value in alone["by hand"].items():
        assert last[name] == pytest.approx(value, abs=2e-4), name


@pytest.mark.parametrize("name", ["killed", "failed"])
def test_a_run_that_was_killed_or_whose_reward_failed_evaluates_as_one_that_was_not(alone, name):
    assert alone[name]["model"] == alone["with"]["model"]
    assert learning(alone[name]["metrics"]) == learning(alone["with"]["metrics"])
    assert any(text == "PPO: going on after iteration 2" for text in alone[name]["said"])
