"""Evaluation while PPO learns: what it measures, that it changes nothing, and what a resumed run does alike."""

import hashlib
import json
from unittest.mock import patch

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.step3_rlhf.test_ppo_loop import BASE, learning, run_step
from tests.training.step3_rlhf.test_ppo_updates import make_models
from training.steps import PPO

SETTINGS = {**BASE, "iterations": 3, "checkpoint_every": 2, "ema": 0.5, "temperature": 0.9, "kl": {"coefficient": 0.1}}
EVALUATED = {**SETTINGS, "eval_every": 2, "eval_prompts": 4}
STEADY = {"learning_rate": 1e-2, "warmup": 0, "schedule": "constant"}
"""So that a shorter run learns the same."""
BEST = {**EVALUATED, "iterations": 4, "eval_every": 1, "actor": STEADY, "critic": STEADY, "keep": "best"}
BEST["kl"] = {"coefficient": 0.1, "keep": 1.0}
TOLD = [{"eval/reward": r, "eval/kl": kl} for r, kl in ((0.1, 0.0), (0.2, 0.2), (0.9, 0.9), (0.5, 0.5), (2.0, 1.1))]
KEPT = 2
"""The last evaluation of TOLD is over the bound."""
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
    digest = digest_of(model) if model.exists() else ""
    file = seen.stage.directory.metrics_file
    metrics = [json.loads(line) for line in file.read_text().splitlines()]
    found = {"model": digest, "metrics": metrics, "said": seen.stage.said}
    if seen.stage.directory.is_finished:
        found["result"] = seen.stage.directory.read_result()
        found["average"] = digest_of(seen.stage.directory.ema_model / "model.safetensors")
    return found


def digest_of(file) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def run_best(ranks, directory, models, settings: dict) -> dict:
    """A run that keeps the best within a bound, one that is killed, and one that ends where the best was; by what
    evaluations are told to find."""
    from training.step3_rlhf.ppo import PPO
    from training.step3_rlhf.watch import HeldOut

    evaluate, found = PPO.evaluate, {}

    def told(trainer, number: int, stopped: bool) -> None:
        with patch.object(HeldOut, "measure", lambda held_out: TOLD[number]):
            evaluate(trainer, number, stopped)

    with patch.object(PPO, "evaluate", told):
        found["best"] = left(run_step(ranks, directory / "best", models, settings))
        if ranks.size == 1:
            run_step(ranks, directory / "killed best", models, settings, killed_in=4)
            found["killed"] = left(run_step(ranks, directory / "killed best", models, settings))
    shorter = {**settings, "iterations": KEPT, "keep": "last", "eval_every": 0}
    return found | {"shorter": left(run_step(ranks, directory / "shorter", models, shorter))}


def run_together(ranks, directory):
    models = make_models(ranks, directory)
    found = {}
    for zero, lora in ((1, 0), (3, 4)):
        actor = {**STEADY, "zero_stage": zero, "lora": {"rank": lora}}
        found[f"{zero} {lora}"] = run_best(ranks, directory / f"{zero}{lora}", models, {**BEST, "actor": actor})
    return found


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
    found["kept"] = run_best(ranks, directory, models, BEST)
    return found | {"by hand": by_hand(models, directory / "with" / PPO.folder / "model")}


@torch.no_grad()
def by_hand(models, directory) -> dict[str, float]:
    """The last evaluation, by plain models: what is answered is drawn by the engine alone."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from inference.generation.engine import GenerationEngine
    from inference.generation.sampler import SamplingKey, SamplingSettings
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


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    return run_ranks(__file__, "run_together", 2, tmp_path_factory.mktemp("held-out"))[0]


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


@pytest.mark.parametrize("case", ["alone", "1 0", "3 4"])
def test_the_best_within_the_bound_is_left_with_its_average(request, case):
    found = request.getfixturevalue("alone")["kept"] if case == "alone" else request.getfixturevalue("together")[case]
    best, shorter = found["best"], found["shorter"]
    assert best["result"]["kept"] == KEPT
    assert (best["model"], best["average"]) == (shorter["model"], shorter["average"])
    assert "kept" not in shorter["result"] and best["result"]["iterations"] == 4


def test_a_killed_run_keeps_the_same_model(alone):
    best, killed = alone["kept"]["best"], alone["kept"]["killed"]
    assert (killed["model"], killed["average"]) == (best["model"], best["average"])
    assert killed["result"]["kept"] == best["result"]["kept"]
    assert learning(killed["metrics"]) == learning(best["metrics"])
