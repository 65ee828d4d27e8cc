"""Plan files given to a run: what is refused, each in one sentence before anything starts, and what a dry run says."""

import re
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from applications.cli import app
from inference.errors import UserError
from training.step3_rlhf import planned

GOOD = """
actor_generate: {mesh: 0-1, data: 2}
reference_score: {mesh: 0}
reward_score: {mesh: 1}
critic_score: {mesh: 0-1, tensor: 2}
actor_train: {mesh: 1, micro_batches: 2}
critic_train: {mesh: 0-1, data: 2, zero_stage: 3}
"""
TRAINS = "actor_train: {mesh: 1, micro_batches: 2}"


def dry_run(tmp_path, text: str, *options: str):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    given = ["run", "--model", "opt-125m", "--processes", "2", "--plan", str(file), "--dry-run", *options]
    return CliRunner().invoke(app, given)


def test_a_dry_run_says_where_calls_run_and_what_the_fullest_rank_holds(tmp_path):
    done = dry_run(tmp_path, GOOD, "--set", "dtype=fp32")
    assert done.exit_code == 0, done.output
    said = re.sub(r"\s+", " ", done.output)
    assert "critic_score on ranks 0-1, tensor 2, micro-batches 1" in said
    assert "critic_train on ranks 0-1, data 2, ZeRO stage 3, micro-batches 1" in said
    assert "critic all weights, learning rate 9e-06, ZeRO stage 3" in said
    step_3 = said[said.index("Step 3: PPO") :]
    assert "actor optimiser states" in step_3 and "actor weights to generate" not in step_3  # rank 1 is the fullest
    assert "reference weights" not in step_3 and "critic weights to score, 1 of 2 parts" in step_3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "The plan is empty"),
        ("a: [1", "The plan is not YAML"),
        (GOOD.replace("mesh: 0}", "mesh: 5}"), "reference_score uses rank 5, but the cluster has ranks 0 to 1"),
        (GOOD.replace(TRAINS, ""), "no line for the call 'actor_train'"),
        (GOOD.replace("actor_train", "actor_trian"), "no line for the call 'actor_train'"),
        (GOOD + "foo_train: {mesh: 0}", "There is no call 'foo_train'"),
        (GOOD.replace("micro_batches: 2", "micro_batch: 2"), "unknown key 'micro_batch'"),
        (GOOD.replace("micro_batches: 2", "micro_batches: 0"), "has 0 micro-batches"),
        (GOOD.replace("data: 2}", "data: 3}"), "does not fill 2 ranks"),
        (GOOD.replace("mesh: 0-1, tensor: 2", "mesh: [0, 0], tensor: 2"), "names a rank twice"),
        (GOOD.replace(TRAINS, "actor_train: {mesh: 0-1, tensor: 2}"), "actor_train is tensor-parallel"),
        (GOOD.replace(TRAINS, "actor_train: {mesh: 0-1, pipeline: 2, layers: [1, 2]}"), "3 together, of a model of"),
        (GOOD.replace("mesh: 0-1, data: 2}", "mesh: 0-1, pipeline: 2}"), "actor_generate has 2 pipeline stages"),
        (GOOD.replace("0-1, tensor: 2", "0-1, data: 2, zero_stage: 1"), "critic_score has no optimiser states"),
        (GOOD.replace("mesh: 0-1, data: 2}", "mesh: 0-1, data: 2, zero_stage: 3}"), "actor_generate has a zero_stage"),
        (GOOD.replace("micro_batches: 2", "micro_batches: 4000"), "leaves ranks without work"),
        (GOOD.replace("{mesh: 1, m", "{mesh: x, m"), "names no ranks"),
    ],
)
def test_each_mistake_is_one_sentence(tmp_path, text, sentence):
    done = dry_run(tmp_path, text, "--set", "dtype=fp32")
    assert isinstance(done.exception, UserError), done.output
    assert sentence in str(done.exception) and str(done.exception).count("\n") == 0


def test_the_documented_plan_runs_in_every_number_format(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/plans.md").read_text(encoding="utf-8")
    text = textwrap.dedent(page.partition("  plan:\n")[2].partition("```")[0])
    for dtype, exact, scores in (("fp32", False, False), ("bf16", False, True), ("bf16", True, False)):
        monkeypatch.setattr(planned, "multiplies_bf16", lambda exact=exact: exact)
        divided = text.replace("{mesh: 0}  # in", "{mesh: 0-1, tensor: 2}  # in")
        done = dry_run(tmp_path, divided, "--set", f"dtype={dtype}")
        assert done.exit_code == 0 and ("actor_score " in done.output) == scores, done.output
        assert ("actor weights to score" in done.output) == scores
    assert "no line for the call 'actor_score'" in str(dry_run(tmp_path, GOOD, "--set", "dtype=bf16").exception)
    assert dry_run(tmp_path, GOOD, "--set", "dtype=bf16", "--set", "rlhf.exact=true").exit_code == 0


def test_models_of_unknown_size(tmp_path):
    """Calls and ranks are judged all the same."""
    for setting in ("model", "reward_model", "trained_reward_model"):
        options = ["--set", "dtype=fp32", "--set", f"{setting}=someone/unknown"]
        done = dry_run(tmp_path, GOOD, *options)
        assert done.exit_code == 0 and "unknown without the hub" in done.output, done.output
        assert "'foo_train'" in str(dry_run(tmp_path, GOOD + "foo_train: {mesh: 0}", *options).exception)
        no_reference = GOOD.replace("reference_score: {mesh: 0}", "")
        done = dry_run(tmp_path, no_reference, *options, "--set", "rlhf.actor.lora.rank=4")
        assert "no line for the call 'reference_score'" in str(done.exception)


def test_what_a_plan_replaces_is_not_judged(tmp_path):
    """Stages and slots of the settings, which would exclude fusion."""
    whole = GOOD.replace("mesh: 0}", "mesh: 0-1, data: 2}").replace("mesh: 1}", "mesh: 0-1, data: 2}")
    whole = whole.replace("tensor: 2", "data: 2")
    settings = ["rlhf.fusion.mode=inter", "rlhf.reward.zero_stage=3", "rlhf.fusion.rows=8", "rlhf.generation_batch=2"]
    settings.append("rlhf.scoring_tensor_parallel.reward=2")
    done = dry_run(tmp_path, whole, *(word for one in ("dtype=fp32", *settings) for word in ("--set", one)))
    assert done.exit_code == 0, done.exception


def test_a_plan_says_where_weights_lie(tmp_path):
    """Offload is judged by its stages; its frozen roles wait where it says so."""
    divided = GOOD.replace(TRAINS, "actor_train: {mesh: 0-1, data: 2, zero_stage: 1}")
    divided = divided.replace("reference_score: {mesh: 0}", "reference_score: {mesh: 0, offload: yes}")
    settings = ["actor.offload=optimizer", "critic.offload=optimizer+parameters", "reward.offload=parameters"]
    for rank in (0, 4):
        asked = ["dtype=fp32", f"rlhf.actor.lora.rank={rank}", *(f"rlhf.{setting}" for setting in settings)]
        done = dry_run(tmp_path, divided, *(word for one in asked for word in ("--set", one)))
        assert done.exit_code == 0, done.exception
        lines = {line.split()[0]: line for line in done.output.splitlines() if line.strip()}
        assert "ZeRO stage 1, offload of optimizer" in lines["actor"]
        assert "offload of parameters" in lines["reference"] and "offload" not in lines["reward"]


def test_a_plan_that_another_method_has_no_use_for_or_that_leaves_ranks_idle(tmp_path):
    assert "method dpo does not have" in str(dry_run(tmp_path, GOOD, "--method", "dpo").exception)
    assert "method dpo does not have" in str(
        CliRunner().invoke(app, ["run", "--model", "opt-125m", "--method", "dpo", "--plan", "auto"]).exception
    )
    said = dry_run(tmp_path, GOOD, "--set", "dtype=fp32", "--processes", "4").output
    assert "rlhf.plan leaves 2 of 4 ranks without a call in step 3 (2, 3)" in re.sub(r"\s+", " ", said)
    assert "without a call" not in dry_run(tmp_path, GOOD, "--set", "dtype=fp32").output


def test_settings_and_a_plan_that_exclude_each_other(tmp_path):
    for setting, sentence in (
        ("rlhf.fusion.mode=inter", "rlhf.fusion.mode=inter needs generation on all ranks"),
        ("rlhf.actor.offload=optimizer", "actor_train has zero_stage 0, and rlhf.actor.offload=optimizer needs"),
        ("rlhf.fusion.rows=65", "rlhf.fusion.rows=65 is more than the 64 slots of actor_generate"),
        ("rlhf.old_logprobs=recompute", "no line for the call 'actor_score'"),
    ):
        done = dry_run(tmp_path, GOOD, "--set", "dtype=fp32", "--set", setting)
        assert isinstance(done.exception, UserError) and sentence in str(done.exception), done.output
    done = CliRunner().invoke(app, ["run", "--model", "opt-125m", "--plan", str(tmp_path / "none.yaml"), "--dry-run"])
    assert isinstance(done.exception, UserError) and "cannot be read" in str(done.exception)
