"""The real command on the `tiny` preset: files, lines, resume, two processes, two machines, chat."""

import json
import math
import os
import re
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.kill_and_resume import metrics
from tests.conftest import rlhf_chat
from tests.pages import ROOT, written_metrics
from training.evaluation.panel import panel_agreement
from training.opening import read_starts
from training.run_directory import RunDirectory
from training.steps import DPO, METHODS, PPO, REWARD


def test_one_command_leaves_everything(tiny_run, workplace):
    out = (workplace / "output.txt").read_text()
    for line in ("Step 1 of 3", "Step 2 of 3", "Step 3 of 3", "held-out", "rlhf-chat chat runs/demo"):
        assert line in out
    assert "No difference is shown: RLHF" in out or "answers tie by" in out  # of 8 prompts
    for step in METHODS["ppo"]:
        directory = RunDirectory(tiny_run).step(step)
        assert directory.is_finished and directory.metrics_file.exists() and directory.checkpoints.is_dir()
    assert {"config.yaml", "data", "evaluation.json", "comparison.jsonl", "report.html"} <= set(os.listdir(tiny_run))
    assert "SFT: before training, the answer to" in out and "first update checked" in out
    assert out.index("Reward model: ") < out.index("Step 3 of 3")  # its accuracy, before PPO relies on it
    evaluation = json.loads((tiny_run / "evaluation.json").read_text())
    assert evaluation["prompts"] == 8 and 0 <= evaluation["win_rate"]["rate"] <= 1
    names = {"true_score", "learned_reward", "kl", "length", "ended_fraction", "distinct_bigrams"}
    assert names <= set(evaluation["rlhf"])


def test_the_accuracy_of_the_reward_model_is_one_figure(tiny_run, workplace):
    said = re.findall(r"([\d.]+% of \d+) held-out pairs", (workplace / "output.txt").read_text())
    assert len(said) == 3 and len(set(said)) == 1  # after step 2, before PPO, in the table
    assert said[0] in (tiny_run / "report.html").read_text()


def test_the_table_says_how_far_the_reward_model_agrees_with_people(tiny_run, workplace):
    panel = json.loads((tiny_run / "evaluation.json").read_text())["panel"]
    assert list(panel) == ["tweets", "product reviews", "editorials", "film reviews"]
    assert panel == RunDirectory(tiny_run).step(REWARD).read_result()["panel"]
    said, rate = " ".join((workplace / "output.txt").read_text().split()), f"{panel['tweets']['learned']['rate']:.1%}"
    assert said.count(f"the reward model agrees with the panel in {rate} of pairs") == 2  # after step 2, in the table
    assert f"tweets ({panel['tweets']['texts']} texts) │ {rate} (" in said and "No reward saw the lexicon" in said
    assert "reward model agrees with people on tweets</span>" in (tiny_run / "report.html").read_text()
    scores = [json.loads(line) for line in (tiny_run / "step2_reward" / "panel.jsonl").read_text().splitlines()]
    assert panel_agreement([row | {"ratings": [0]} for row in scores], [row["learned"] for row in scores])["tweets"][
        "learned"
    ] == pytest.approx(panel["tweets"]["learned"])


def test_what_ran_each_step_is_kept(tiny_run):
    starts = read_starts(RunDirectory(tiny_run))
    steps = [step.folder for step in METHODS["ppo"]]
    assert [start["what"] for start in starts] == ["preparation", *steps, "evaluation"]
    assert all("run --model tiny" in start["command"] and start["versions"]["torch"] for start in starts)
    for step in METHODS["ppo"]:
        rows = [json.loads(line) for line in RunDirectory(tiny_run).step(step).metrics_file.read_text().splitlines()]
        times = [row["time/unix"] for row in rows]
        assert times == sorted(times) and abs(times[-1] - RunDirectory(tiny_run).step(step).path.stat().st_mtime) < 600
        assert len({row["number"] for row in rows}) == len(rows)


def test_models_open_in_plain_transformers(tiny_run):
    ids = torch.tensor([[5, 6, 7]])
    for step in ("step1_sft", "step3_rlhf"):
        directory = tiny_run / step / "model"
        assert torch.isfinite(AutoModelForCausalLM.from_pretrained(directory)(ids).logits).all()
        tokenizer = AutoTokenizer.from_pretrained(directory)
        assert tokenizer.chat_template and tokenizer.pad_token_id != tokenizer.eos_token_id
    reward = AutoModelForSequenceClassification.from_pretrained(tiny_run / "step2_reward" / "model")
    assert reward(ids).logits.shape == (1, 1)


def test_metrics_have_the_names_people_know(tiny_run):
    rows = metrics(RunDirectory(tiny_run), PPO)
    expected = """reward/score_mean reward/score_std reward/score_min reward/score_max reward/total kl/reference
        kl/reference_per_token kl/old_k1 kl/old_k3 policy/loss policy/clip_fraction policy/entropy policy/ratio_mean
        policy/ratio_max policy/grad_norm policy/lr value/loss value/clip_fraction value/explained_variance value/mean
        value/grad_norm value/lr returns/mean advantage/mean advantage/std response/length_mean response/length_max
        response/ended_fraction""".split()
    assert set(expected) <= set(rows[0])
    raw = [json.loads(line) for line in (tiny_run / "step3_rlhf" / "metrics.jsonl").read_text().splitlines()]
    assert {"time/generate", "time/score", "time/train", "tokens_per_second", "memory/peak_gb"} <= set(raw[0])


def test_every_metric_is_on_its_page_and_found_in_the_trainers(tiny_run):
    for step in ("step1_sft", "step2_reward", "step3_rlhf"):
        lines = (tiny_run / step / "metrics.jsonl").read_text().splitlines()
        names = {name for line in lines for name in json.loads(line)} - {"number"}
        text = (ROOT / "docs" / f"{step}.md").read_text(encoding="utf-8")
        assert names and names <= written_metrics(), step
        assert not [name for name in names if f"`{name}`" not in text], step


def test_first_update_invariants(tiny_run):
    first = metrics(RunDirectory(tiny_run), PPO)[0]
    assert first["kl/reference"] == pytest.approx(0, abs=1e-6)  # the actor still is the reference
    checked = json.loads((tiny_run / "step3_rlhf" / "first_update.json").read_text())
    assert checked["generation_logprob_difference"] < 1e-4
    assert checked["ratio_error"] < 1e-4 and abs(checked["kl_old"]) < 1e-6


def test_dpo_in_one_command(workplace):
    """SFT, DPO, comparison without a reward model, chat; again, nothing is left to do."""
    command = ("run", "--model", "tiny", "--name", "direct", "--method", "dpo")
    done = rlhf_chat(*command, cwd=workplace)
    assert done.code == 0, done.out[-3000:] + done.err[-3000:]
    for line in (
        "Step 1 of 2",
        "Step 2 of 2: direct preference",
        "by upbeat score (lexicon)",
        "rlhf-chat chat runs/direct",
    ):
        assert line in done.out
    assert "Step 3" not in done.out and "learned reward" not in done.out
    run = RunDirectory(workplace / "runs" / "direct")
    first, *_, last = [row for row in metrics(run, DPO) if "eval/loss" in row]
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-6) and first["eval/margin"] == 0
    assert last["eval/reward/chosen"] != 0
    evaluation = json.loads((run.path / "evaluation_dpo.json").read_text())
    assert evaluation["sft"]["kl"] == 0 and "learned_reward" not in evaluation["dpo"]
    assert not (run.path / "step2_reward").exists() and not (run.path / "evaluation.json").exists()
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(run.step(DPO).model)(torch.tensor([[5]])).logits).all()
    again = rlhf_chat("run", "--name", "direct", cwd=workplace)
    assert again.code == 0 and again.out.count("done already") == 2
    talk = rlhf_chat("chat", run.path, "--compare", "--max-tokens", 12, cwd=workplace, stdin="hello\n")
    assert talk.code == 0 and "SFT" in talk.out and "DPO" in talk.out, talk.err


def test_any_two_models_are_evaluated_and_the_data_stand_alone_on_stdout(tiny_run, workplace):
    kept = (tiny_run / "evaluation.json").read_bytes()
    asked = ("eval", "runs/demo", "--model", "sft", "--against", "tiny", "--judge", "learned", "--prompts", 3, "--json")
    done = rlhf_chat(*asked, cwd=workplace)
    assert done.code == 0, done.err[-2000:]
    found = json.loads(done.out)
    assert found["pair"] == {"against": "tiny", "sft": "SFT"} and found["win_rate"]["prompts"] == 3
    assert found["reward_accuracy"]["all"]["pairs"] > 8 and found["sft"]["perplexity_demonstrations"] > 1
    (written,) = (tiny_run / "evaluations").glob("*.json")
    assert json.loads(written.read_text()) == found and kept == (tiny_run / "evaluation.json").read_bytes()


def test_what_is_done_is_skipped(tiny_run, workplace):
    before = (tiny_run / "step1_sft" / "result.json").stat().st_mtime
    done = rlhf_chat("run", "--name", "demo", cwd=workplace)
    assert done.code == 0 and done.out.count("done already") == 3
    assert (tiny_run / "step1_sft" / "result.json").stat().st_mtime == before


def test_two_processes_train_as_one_does(tiny_run, workplace):
    done = rlhf_chat("run", "--model", "tiny", "--name", "two", "--processes", 2, cwd=workplace)
    assert done.code == 0, done.out[-2000:] + done.err[-3000:]
    for step in METHODS["ppo"]:
        assert_like_metrics(*(metrics(RunDirectory(workplace / "runs" / name), step) for name in ("demo", "two")))


def assert_like_metrics(ours: list[dict], theirs: list[dict]) -> None:
    """Within rounding; pairs give no gradient to what their two scores have in common, which may drift a little."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if isinstance(a[name], float) and not name.startswith("work/"):  # two ranks may have twice the slots
                drifts = 10 if name in ("eval/chosen", "eval/rejected") else 1
                assert b[name] == pytest.approx(a[name], rel=drifts * 1e-4, abs=1e-5), name


def test_tensor_parallel_generation_under_zero_3_trains_as_one_process_does(tiny_run, workplace):
    run = workplace / "runs" / "tensor"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("step3_rlhf", "evaluation.json", "comparison.jsonl"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["processes"], config["rlhf"]["generation_tensor_parallel"] = 2, 2
    config["rlhf"]["actor"]["zero_stage"] = 3
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    done = rlhf_chat("rlhf", run, cwd=workplace)
    assert done.code == 0, done.out[-2000:] + done.err[-3000:]
    assert_like_metrics(metrics(RunDirectory(tiny_run), PPO), metrics(RunDirectory(run), PPO))


def test_chat_in_a_pipe(tiny_run, workplace):
    done = rlhf_chat("chat", "runs/demo", "--max-tokens", 12, cwd=workplace, stdin="hello\nand now?\n")
    assert done.code == 0 and len(done.out.splitlines()) >= 2, done.err
    again = rlhf_chat("chat", "runs/demo", "--max-tokens", 12, cwd=workplace, stdin="hello\nand now?\n")
    assert again.out == done.out
    both = rlhf_chat("chat", "runs/demo", "--compare", "--max-tokens", 12, cwd=workplace, stdin="hello\n")
    assert both.code == 0 and "SFT" in both.out and "RLHF" in both.out


def test_a_fork_trains_what_changes_and_takes_over_the_rest(tiny_run, workplace):
    """Another seed of step 3, from a copy that is deleted then."""
    parent, run = workplace / "runs" / "parent", RunDirectory(workplace / "runs" / "seed2")
    shutil.copytree(tiny_run, parent)
    command = "run", "--from", "runs/parent", "--name", "seed2", "--steps", "3", "--seed", "2", "--trust"
    done = rlhf_chat(*command, cwd=workplace)
    assert done.code == 0, done.out[-2000:] + done.err[-3000:]
    said = done.out.partition("Step 3 of 3")[0]
    assert said.count("that of parent, unchanged") == 2 and "(PPO): trained, as rlhf.seed is 2, and 1 in parent" in said
    assert "a fork of runs/parent" in done.err
    weights = "step2_reward/model/model.safetensors"
    assert (run.path / weights).read_bytes() == (parent / weights).read_bytes()
    ours, theirs = (metrics(RunDirectory(path), PPO) for path in (run.path, parent))
    assert len(ours) == len(theirs) and ours[0]["reward/total"] != theirs[0]["reward/total"]
    shutil.rmtree(parent)
    again = rlhf_chat("run", "--name", "seed2", cwd=workplace)
    assert again.code == 0 and again.out.count("done already") == 3, again.err
