"""Step 3 without critic and reward model, on the real command: a user's own rewards, their scale and estimator, an
average, demonstrations."""

import json
import shutil

import pytest
import yaml

from benchmarks.kill_and_resume import metrics
from tests.conftest import rlhf_chat
from training.opening import read_starts
from training.run_directory import RunDirectory
from training.steps import PPO

FUNCTION = """
import os

def score(prompts, responses, rows):
    counter = os.environ.get("COUNTER")
    if counter:
        with open(counter, "a") as file:
            file.write("x")
        if os.path.getsize(counter) == 4:  # iteration 3, after the trial before training
            raise RuntimeError("the judge has left")
    assert len(prompts) == len(responses) in (4, 8) and prompts[0][-1]["role"] == "user"
    return [len(set(response)) / 10 for response in responses]

from training.formulas.estimators import Estimator
from training.formulas.estimators import Shaping

def others(scored):
    return (scored.by_prompt - scored.by_prompt.flip(1)).flatten()

def halved(scores, so_far):
    return so_far.mean, 2.0

pairwise = Estimator(others, samples=2)
half = Shaping(halved, clip=False)
"""
SETTINGS = {
    "samples_per_prompt": 2,
    "prompts_per_iteration": 4,
    "reward_weights": {"model": 0},
    "ema": 0.5,
    "ptx": {"coefficient": 1.0, "rows": 3},
    "checkpoint_every": 10,
    "samples_every": 10,
    "rollouts_every": 2,
}


def new_run(tiny_run, directory, function):
    """Step 1 of the tiny run; step 3 is to come, without a step 2."""
    shutil.copytree(
        tiny_run, directory, ignore=shutil.ignore_patterns("step2*", "step3_rlhf", "evaluation.json", "comparison*")
    )
    config = yaml.safe_load((directory / "config.yaml").read_text())
    own = {"reward_function": "score", "advantage": "pairwise", "reward_normalization": "half"}
    config["rlhf"] = {**config["rlhf"], **SETTINGS, **{key: f"{function}:{name}" for key, name in own.items()}}
    config["evaluation"] = {"prompts": 8, "true_score": "none"}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory


def drop_comparison(run) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["evaluation"]["prompts"] = 0
    (run / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def runs(tiny_run, workplace, tmp_path_factory):
    """A run that nobody stopped; the same one whose function failed in iteration 3, then went on; what was said."""
    place = tmp_path_factory.mktemp("options")
    function = place / "mine.py"
    function.write_text(FUNCTION)
    whole, halted = (new_run(tiny_run, workplace / "runs" / name, function) for name in ("free", "halted"))
    drop_comparison(halted)
    said = rlhf_chat("run", "--name", "free", "--trust", cwd=workplace)
    assert said.code == 0, said.out[-2000:] + said.err[-3000:]
    failed = rlhf_chat("rlhf", halted, "--trust", cwd=workplace, COUNTER=str(place / "counter"))
    kept = [entry.name for entry in (halted / "step3_rlhf" / "checkpoints").iterdir()]
    error = json.loads((halted / "step3_rlhf" / "error.json").read_text())
    again = rlhf_chat("rlhf", halted, cwd=workplace)
    assert again.code == 0, again.err[-2000:]
    return whole, halted, said, failed, kept, error


def test_step_2_is_left_out_and_the_comparison_uses_the_function(runs):
    whole, _, said, *_ = runs
    assert "Step 2 is left out" in said.out and not (whole / "step2_reward").exists()
    evaluation = json.loads((whole / "evaluation.json").read_text())
    assert evaluation["win_rate"]["judge"] == "reward" and "reward, all sources" in said.out
    rows = [json.loads(line) for line in (whole / "comparison.jsonl").read_text().splitlines()]
    assert [row["rlhf_score"] for row in rows] == [len(set(row["rlhf"])) / 10 for row in rows]


def test_no_critic_is_kept_and_the_average_is_a_model_of_its_own(runs):
    step = runs[0] / "step3_rlhf"
    assert {entry.name for entry in (step / "checkpoints" / "3").iterdir()} == {"actor", "ema", "state.json"}
    assert (step / "ema_model" / "tokenizer.json").exists()
    weights = [(step / name / "model.safetensors").read_bytes() for name in ("model", "ema_model")]
    assert weights[0] != weights[1]
    row = metrics(RunDirectory(runs[0]), PPO)[-1]
    assert row["reward/function_mean"] == pytest.approx(row["reward/score_mean"]) and row["ptx/loss"] > 0
    assert not [name for name in row if name.startswith("value/")]


def test_the_scale_of_rewards_is_the_user_s_and_so_is_the_estimator(runs):
    row = metrics(RunDirectory(runs[0]), PPO)[-1]
    assert row["reward/scaled_std"] == pytest.approx(row["reward/score_std"] / 2, rel=1e-5)
    starts = [each for each in read_starts(RunDirectory(runs[0])) if each["what"] == PPO.folder]
    assert list(starts[-1]["formulas"]) == ["mine.py"]


def test_a_function_that_fails_loses_nothing(runs):
    whole, halted, _, failed, kept, error = runs
    assert failed.code == 2 and "Traceback" not in failed.err and len(failed.err.strip().splitlines()) == 1
    assert "mine.py:score failed (RuntimeError: the judge has left)" in failed.err
    assert "in score" in error["traceback"]
    assert kept == ["2"]  # although checkpoints are due every 10 iterations
    assert metrics(RunDirectory(halted), PPO) == metrics(RunDirectory(whole), PPO)
    for name in ("model", "ema_model"):
        files = [run / "step3_rlhf" / name / "model.safetensors" for run in (whole, halted)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    for name, lines in (("updates.jsonl", 3 * 2), ("rollouts.jsonl", 8)):
        journals = [(run / "step3_rlhf" / name).read_text() for run in (whole, halted)]
        assert journals[0] == journals[1] and len(journals[0].splitlines()) == lines
