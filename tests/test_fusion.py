"""`--fusion` on the real command: the same learning, and ranks that die while samples move or stages train."""

import shutil

import pytest
import yaml

from benchmarks.kill_and_resume import compare, metrics
from tests.conftest import rlhf_chat
from tests.test_pipeline import assert_like_metrics
from training.metrics import Journal
from training.run_directory import RunDirectory
from training.steps import PPO

DIES_ONCE = """
import os
if os.environ.get("RANK") == "1" and not os.path.exists({marker!r}):
    from training.fusion.fused_rollout import FusedRollout
    give = FusedRollout._give

    def die(self, moves):
        if moves:
            open({marker!r}, "w").close()
            os.kill(os.getpid(), 9)
        give(self, moves)

    FusedRollout._give = die
"""

DIES_IN_AN_UPDATE = """
import os
if os.environ.get("RANK") == "1" and not os.path.exists({marker!r}):
    from training.pipelines.stage_engine import TrainingWork
    backward, passes = TrainingWork.backward, iter(range({passes}))

    def die(self, place, gradient):
        if next(passes, None) is None:
            open({marker!r}, "w").close()
            os.kill(os.getpid(), 9)
        return backward(self, place, gradient)

    TrainingWork.backward = die
"""
ALL, FORWARDS, BACKWARDS = (
    {"mesh": "0-1", "data": 2},
    {"mesh": [0, 1], "pipeline": 2, "micro_batches": 2},
    {"mesh": [1, 0], "pipeline": 2, "micro_batches": 2},
)
STAGES = {
    "actor_generate": ALL,
    "reference_score": FORWARDS,
    "reward_score": BACKWARDS,
    "critic_score": BACKWARDS,
    "actor_train": FORWARDS,
    "critic_train": BACKWARDS,
}


def run_with_two_processes(tiny_run, directory, **settings):
    """Steps 1 and 2 of the tiny run; step 3 is to come, with a tail that moves."""
    shutil.copytree(tiny_run, directory, ignore=shutil.ignore_patterns("step3_rlhf", "evaluation.json", "comparison*"))
    config = yaml.safe_load((directory / "config.yaml").read_text())
    config["processes"] = 2
    config["rlhf"]["fusion"] = {"mode": "auto", "threshold": 7, "rows": 8, "move": "cache"}
    config["rlhf"] |= settings
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory


def test_a_fused_run_learns_what_a_plain_one_does(tiny_run, workplace):
    run = run_with_two_processes(tiny_run, workplace / "runs" / "fused")
    done = rlhf_chat("rlhf", run, "--fusion", "inter", cwd=workplace)
    assert done.code == 0, done.out[-2000:] + done.err[-3000:]
    assert "fusion: inter, threshold 7, 8 rows an instance" in done.out and "1 repackings moved" in done.out
    assert_like_metrics(metrics(RunDirectory(tiny_run), PPO), metrics(RunDirectory(run), PPO))
    plain, fused = (Journal(RunDirectory(path).step(PPO).rollouts_file).read() for path in (tiny_run, run))
    assert len(plain) == 3 * 8 == len(fused)
    for one, other in zip(plain, fused, strict=True):
        assert one.keys() == other.keys() >= {"kl", "values", "advantages", "logprobs", "reward/model", "reward/total"}
        for key, value in one.items():
            is_measured = key in ("kl", "values", "advantages", "logprobs") or key.startswith("reward/")
            assert other[key] == (pytest.approx(value, abs=1e-3) if is_measured else value), key


def test_a_rank_that_dies_while_samples_move_ends_the_run_with_a_sentence_and_the_run_goes_on(
    tiny_run, workplace, tmp_path
):
    run = run_with_two_processes(tiny_run, workplace / "runs" / "dying")
    marker = tmp_path / "died"
    (tmp_path / "sitecustomize.py").write_text(DIES_ONCE.format(marker=str(marker)))
    alone = {"PYTHONPATH": str(tmp_path), "RLHF_CHAT_GRACE": "2"}  # the other rank waits so long for its samples
    killed = rlhf_chat("rlhf", run, "--fusion", "inter", cwd=workplace, **alone)
    assert marker.exists() and killed.code not in (0, None)
    assert "Traceback" not in killed.err and "rlhf-chat rlhf" in killed.err, killed.err[-2000:]
    again = rlhf_chat("rlhf", run, "--fusion", "inter", cwd=workplace)
    assert again.code == 0, again.err[-2000:]
    assert_like_metrics(metrics(RunDirectory(tiny_run), PPO), metrics(RunDirectory(run), PPO))


def test_a_stage_that_dies_in_an_update_ends_the_run_with_a_sentence_and_the_run_goes_on_to_the_same_bits(
    tiny_run, workplace, tmp_path
):
    settings = {"plan": STAGES, "fusion": {"mode": "none", "training": "fused"}, "iterations": 2}
    straight, run = (
        run_with_two_processes(tiny_run, workplace / "runs" / name, **settings) for name in ("stages", "dying-stages")
    )
    done = rlhf_chat("rlhf", straight, cwd=workplace)
    assert done.code == 0, done.out[-2000:] + done.err[-3000:]
    marker = tmp_path / "died"
    an_iteration = 2 * 2 * 2  # mini-batches, roles, micro-batches
    (tmp_path / "sitecustomize.py").write_text(
        DIES_IN_AN_UPDATE.format(marker=str(marker), passes=an_iteration + an_iteration // 4 + 1)
    )
    killed = rlhf_chat("rlhf", run, cwd=workplace, PYTHONPATH=str(tmp_path), RLHF_CHAT_GRACE="2")
    assert marker.exists() and killed.code not in (0, None)
    assert "Traceback" not in killed.err and killed.err.count("rlhf-chat rlhf") == 1, killed.err[-2000:]
    again = rlhf_chat("rlhf", run, cwd=workplace)
    assert again.code == 0 and "going on after iteration 1" in again.out, again.err[-2000:]
    compare(RunDirectory(straight), RunDirectory(run), [PPO])


def test_a_mode_that_there_is_not(workplace):
    done = rlhf_chat("run", "--model", "tiny", "--fusion", "inner", cwd=workplace)
    assert done.code == 2 and "none, inter, intra, both, auto" in done.err and len(done.err.strip().splitlines()) == 1


def test_fusion_needs_whole_roles(workplace):
    done = rlhf_chat("run", "--model", "tiny", "--fusion", "inter", "--set", "rlhf.critic.zero_stage=3", cwd=workplace)
    assert done.code == 2 and "critic has zero_stage 3" in done.err and len(done.err.strip().splitlines()) == 1
