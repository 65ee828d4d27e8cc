"""The dry run: its arithmetic, its verdict, and that it touches nothing."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from applications import fit
from applications.dry_run import dry_run, rough_duration, shell_lines
from applications.fit import GIB, Machine, Outlook, check_fits, disk_needed, find_shape, verdict
from applications.preset_store import load_preset, settings_for_model
from applications.profile import expected_time
from inference.errors import UserError
from tests.training.planner.test_machine import PROFILE
from training.config import RunConfig
from training.config_files import load_config
from training.metrics import size
from training.planner.hardware import profile_file
from training.steps import DPO, PPO, REWARD, SFT

LAPTOP = Machine(cores=2, memory=24 * GIB)
NODE = Machine(cores=96, memory=2048 * GIB, gpus=(("H100", 80 * GIB),) * 8)


@pytest.fixture
def laptop(monkeypatch):
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: LAPTOP))


def config_of(preset: str, *overrides: str) -> RunConfig:
    return load_config([], list(overrides), settings_for_model(preset))


def outlook_on(machine: Machine, config: RunConfig, monkeypatch, steps=(SFT, REWARD, PPO)) -> Outlook:
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: machine))
    return Outlook.of(config, steps)


def line_of(text: str, name: str, after: str = "") -> str:
    lines = text[text.index(after) :].splitlines()
    return next(line for line in lines if line.strip().startswith(name))


def test_models_batches_and_steps_of_opt_13b(laptop, tmp_path):
    text = dry_run(config_of("opt-13b", "processes=8"), [SFT, REWARD, PPO], tmp_path / "my run")
    assert "12.85 B parameters" in line_of(text, "actor")
    assert "331.2 M parameters" in line_of(text, "reward, critic")
    # 64 rows on 8 ranks: 8 each, and 4096 tokens hold 8 rows of 512
    assert "64 rows = 8 in a micro-batch x 1 accumulated x 8 ranks" in line_of(text, "batch", "Step 1")
    assert "1 x rows / 64" in line_of(text, "optimiser steps", "Step 1")
    assert "128 prompts x 1 = 128 samples, 16 at a time" in line_of(text, "iteration", "Step 3")
    assert "32 samples = 4 in a micro-batch x 1 accumulated x 8 ranks" in line_of(text, "mini-batch", "Step 3")
    assert "400 of each" in line_of(text, "optimiser steps", "Step 3")  # 100 x 1 x 4
    # 8 operations (with recomputation) x 12.853e9 weights x 64 x 512 tokens
    assert "3.4 PFLOP" in line_of(text, "compute", "Step 1")
    command = " ".join(text.replace("\\\n", "").split())
    assert "--nproc-per-node 8 " in command and "training/step1_sft/main.py" in command and "/my run'" in command


def test_uneven_batches_say_so(laptop, tmp_path):
    config = config_of("tiny", "sft.batch_size=10", "sft.micro_batch_tokens=320", "processes=2")
    text = dry_run(config, [SFT], tmp_path)
    # 5 rows a rank; 320 tokens hold 4 rows of 80: two micro-batches
    assert "10 rows <= 4 in a micro-batch x 2 accumulated x 2 ranks" in line_of(text, "batch")
    assert "6, or 1 x rows / 10 if that is less" in line_of(text, "optimiser steps")


def test_critic_warmup_and_lora_reference_are_shown(laptop, tmp_path):
    config = config_of("smollm2-135m", "rlhf.iterations=10", "rlhf.critic_warmup=3", "rlhf.mini_batches=2")
    text = dry_run(config, [PPO], tmp_path)
    assert "critic 20, actor 14" in (line := line_of(text, "optimiser steps")) and "at most" not in line
    masked = config_of("tiny", "rlhf.mask_truncated=true")
    assert "at most" in line_of(dry_run(masked, [PPO], tmp_path), "optimiser steps")
    assert "the actor with its adapters off" in line_of(text, "reference")
    assert "LoRA adapters of rank" in line_of(text, "actor", "Step 3")


def test_dpo_has_pairs_a_reference_and_no_reward_model(laptop, tmp_path):
    config = config_of("opt-13b", "method=dpo", "processes=8")
    text = dry_run(config, config.steps, tmp_path)
    assert "step2_dpo/main.py" in text and "reward, critic" not in text and "Step 3" not in text
    # 64 pairs on 8 ranks: 8 each, and 4096 tokens hold 4 pairs of twice 512
    assert "64 pairs = 4 in a micro-batch x 2 accumulated x 8 ranks" in line_of(text, "batch", "Step 2 (DPO)")
    assert "asked once" in line_of(text, "reference", "Step 2 (DPO)")
    # 8 operations (with recomputation) x 12.853e9 weights x 64 x 2 x 512 tokens
    assert "6.7 PFLOP" in line_of(text, "compute", "Step 2 (DPO)")
    assert "step2_dpo/model" in line_of(text, "step 2 (DPO)")
    with pytest.raises(UserError, match=r"Step 2 \(DPO\) cannot run here"):
        check_fits(config, [DPO])


def test_an_unpaired_loss_has_answers_and_a_reference_point(laptop, tmp_path):
    config = config_of("opt-1.3b", "method=dpo", "dpo.loss=kto", "processes=8")
    text = dry_run(config, [DPO], tmp_path)
    assert "64 answers = 8 in a micro-batch x 1 accumulated x 8 ranks" in line_of(text, "batch")
    assert "a forward pass more" in line_of(text, "reference point")
    assert "held-out answers" in line_of(text, "evaluations")


def test_time_comes_from_the_planner_where_rates_are_known(monkeypatch, tmp_path):
    """Eight H100 by their data sheet: what the plan of the trainer costs; twice the iterations take twice as long."""
    monkeypatch.setenv("RLHF_CHAT_CACHE", str(tmp_path))
    outlook = outlook_on(NODE, config_of("opt-1.3b", "processes=8"), monkeypatch)
    found = expected_time(outlook, PPO)
    assert found is not None and set(found.by_kind) == {"generate", "score", "train"} and "h100" in found.source
    assert found.seconds == pytest.approx(sum(found.by_kind.values()), rel=0.05)
    longer = expected_time(outlook.with_settings({"data": {"max_response_tokens": 512}}), PPO)
    assert longer is not None and longer.by_kind["generate"] > 1.5 * found.by_kind["generate"]
    pairs, dpo = (expected_time(outlook, step) for step in (REWARD, DPO))
    assert pairs is not None and set(pairs.by_kind) == {"train"}  # a reward model of 0.3 billion
    assert dpo is not None and set(dpo.by_kind) == {"score", "train"} and dpo.seconds > pairs.seconds
    kto = expected_time(outlook.with_settings({"dpo": {"loss": "kto"}}), DPO)
    assert kto is not None and 0.5 < kto.seconds / dpo.seconds < 0.9  # one answer a row, and a forward pass more
    text = dry_run(outlook.config, [SFT, REWARD, PPO], tmp_path)
    assert "an optimiser step" in line_of(text, "time", "Step 2") and "for all" in " ".join(text.split())
    # none on the way; two models answer 200 prompts, and an iteration draws 128 samples
    assert found.evaluations == pytest.approx(400 / 128 * (found.by_kind["generate"] + found.by_kind["score"]))
    often = outlook.with_settings({"rlhf": {"eval_every": 30, "eval_prompts": 32}, "evaluation": {"prompts": 0}})
    measured = expected_time(often, PPO)
    assert measured is not None and measured.evaluations == pytest.approx(5 * 32 / 400 * found.evaluations)
    assert "5 x 32 held-out prompts" in dry_run(often.config, [PPO], tmp_path)
    assert "200 prompts, answered also by the SFT model" in text and "every 50 optimiser steps" in text


def test_time_is_unknown_until_the_machine_is_profiled(laptop, monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_CHAT_CACHE", str(tmp_path))
    config = config_of("tiny", "processes=2")
    assert "rlhf-chat profile" in line_of(dry_run(config, [SFT], tmp_path), "time")
    file = profile_file(2)
    file.parent.mkdir()
    file.write_text(PROFILE.to_yaml())
    assert "measured" in dry_run(config, [SFT], tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "40 ms"), (0.42, "0.4 s"), (99, "99 s"), (130, "2.2 min"), (7200, "2.0 h")]
)
def test_durations(seconds, text):
    assert rough_duration(seconds) == text


def test_text_is_plain_and_narrow(laptop, tmp_path):
    text = dry_run(config_of("llama-3.1-70b"), [SFT, REWARD, PPO], Path("runs/demo"))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert text.isascii() and "\x1b" not in text


def test_nothing_is_touched(laptop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a dry run went to the network"))
    dry_run(config_of("opt-125m"), [SFT, REWARD, PPO], tmp_path / "runs" / "x")
    assert list(tmp_path.iterdir()) == []


def test_only_the_steps_asked_for(laptop, tmp_path):
    text = dry_run(config_of("tiny"), [REWARD], tmp_path)
    assert "Step 2" in text and "Step 1" not in text and "Step 3" not in text
    assert "step2_reward/main.py" in text and "step1_sft/main.py" not in text


def test_a_small_run_fits(laptop, tmp_path):
    text = dry_run(config_of("smollm2-135m"), [SFT, REWARD, PPO], tmp_path)
    assert "Verdict: fits" in text
    check_fits(config_of("smollm2-135m"), [SFT, REWARD, PPO])


@pytest.mark.parametrize(
    "setting", ["rlhf.fusion.mode=inter", "rlhf.scoring_tensor_parallel={reference: 2, reward: 2, critic: 2}"]
)
def test_ways_out_contradict_no_setting(laptop, tmp_path, setting):
    """LoRA has no reference to cut, and ZeRO 3 leaves no role whole."""
    whole = [f"rlhf.{role}.zero_stage=0" for role in ("actor", "critic", "reference", "reward")]
    text = dry_run(config_of("opt-13b", *whole, "processes=2", setting), [SFT, REWARD, PPO], tmp_path / "run")
    assert "does not fit" in text and "with ZeRO stage 3" in text


def test_a_large_run_does_not_fit_and_says_what_would(laptop, tmp_path):
    config = config_of("opt-13b")
    found = " ".join(dry_run(config, [SFT, REWARD, PPO], tmp_path).split())
    # a weight of the actor: 18 bytes, 2 for its copy that generates, 2 for the reference, 8 while saving: 30 x 12.853e9
    # critic 18 and reward 2 bytes x 331e6; keys and values 32 x 512 x 40 x 2 x 5120 x REWARD: together 406e9 = 378 GiB
    assert "Verdict: does not fit here: step 3 needs about 378 GiB per process, this machine has 24 GiB" in found
    assert "GPUs of 80 GiB with ZeRO stage 3" in found and "--model opt-" in found
    with pytest.raises(UserError, match=r"Step 1 cannot run here.*about 215 GiB per process, this machine has 24 GiB"):
        check_fits(config, [SFT, REWARD, PPO])  # 18 bytes x 12.85e9 = 215 GiB


def test_check_is_for_what_is_clearly_impossible(laptop):
    check_fits(config_of("opt-1.3b"), [SFT])  # 18 x 1.3e9 = 22 GiB held; the phases go over 24 GiB
    with pytest.raises(UserError, match="each of 2 processes 12 GiB"):
        check_fits(config_of("opt-1.3b", "processes=2", "sft.optimizer.zero_stage=1"), [SFT])


def test_gpus_count_apart_from_main_memory(monkeypatch, tmp_path):
    fits = outlook_on(NODE, config_of("opt-13b", "processes=8"), monkeypatch)
    assert verdict(fits, tmp_path).startswith(("Verdict: fits", "Verdict: does not fit here: the run directory"))
    offloaded = ["processes=8", "sft.optimizer.offload=optimizer"]
    small = Machine(NODE.cores, 128 * GIB, NODE.gpus)
    outlook = outlook_on(small, config_of("opt-13b", *offloaded), monkeypatch, steps=(SFT,))
    assert "of main memory, this machine has 128 GiB" in verdict(outlook, tmp_path)


def test_slots_follow_the_memory_of_the_gpus(monkeypatch, tmp_path):
    config = config_of("opt-13b", "processes=8", "rlhf.prompts_per_iteration=4096")
    small, large = (replace(NODE, gpus=(("GPU", gib * GIB),) * 8) for gib in (80, 192))
    slots = [outlook_on(machine, config, monkeypatch).config.rlhf.generation_batch for machine in (small, large)]
    assert 1 < slots[0] < slots[1] < 512
    text = dry_run(config, [PPO], tmp_path)
    assert f"{slots[1]} at a time on a rank" in line_of(text, "iteration")
    outlook = outlook_on(large, config, monkeypatch)
    assert outlook.memory(PPO).peak("device") <= 0.92 * 192 * GIB
    named = outlook_on(large, config_of("opt-13b", "rlhf.generation_batch=7"), monkeypatch)
    assert named.config.rlhf.generation_batch == 7
    assert outlook_on(LAPTOP, config_of("opt-13b"), monkeypatch).config.rlhf.generation_batch == "auto"


def test_ways_out_really_fit(monkeypatch):
    one = Machine(cores=16, memory=2048 * GIB, gpus=(("A100", 40 * GIB),))
    outlook = outlook_on(one, config_of("opt-1.3b", "dtype=bf16", "data.max_prompt_tokens=2000"), monkeypatch)
    alone = dict(fit._changes(outlook))
    for text, changed in alone.items():
        listed = f"{text} (" in fit.ways_out(outlook)
        largest = changed.largest()
        assert largest is not None and listed == (largest[1] <= 40 * GIB)
    assert any(f"{text} (" in fit.ways_out(outlook) for text in alone)


def test_a_full_disk_is_a_verdict(laptop, tmp_path, monkeypatch):
    monkeypatch.setattr(fit.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    text = dry_run(config_of("tiny"), [SFT], tmp_path)
    assert "Verdict: does not fit here: the run directory takes up to" in text


def test_disk_by_hand(monkeypatch):
    config = config_of("opt-125m", "sft.keep_checkpoints=2", "save_dtype=bf16")
    outlook = outlook_on(LAPTOP, config, monkeypatch, steps=(SFT,))
    weights = 125_239_296
    assert disk_needed(outlook) == 2 * weights + 3 * 14 * weights  # the model; two checkpoints and one in the making
    none = outlook_on(LAPTOP, config_of("opt-125m", "sft.checkpoint_every=0"), monkeypatch, steps=(SFT,))
    assert disk_needed(none) == 4 * weights


def test_an_unknown_hub_model_is_no_error(laptop, tmp_path):
    config = load_config([], [], {"model": "someone/their-model"})
    text = dry_run(config, [SFT, REWARD, PPO], tmp_path)
    assert "parameters unknown without the hub" in text
    assert "Verdict: unknown: the size of someone/their-model" in text
    check_fits(config, [SFT, REWARD, PPO])


def test_a_local_directory_tells_its_shape(laptop, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(load_preset("opt-125m")["architecture"]["model"]))
    assert "125.2 M" in line_of(dry_run(load_config([], [], {"model": str(tmp_path)}), [SFT], tmp_path), "actor")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="it holds no JSON object"):
        find_shape(str(tmp_path), None)


def test_another_reward_model_is_not_taken_for_the_presets(laptop, tmp_path):
    config = config_of("opt-1.3b", "reward_model=facebook/opt-125m")
    assert "125.2 M" in line_of(dry_run(config, [REWARD], tmp_path), "reward, critic")
    unknown = config_of("opt-1.3b", "reward_model=someone/their-model")
    assert "unknown without the hub" in line_of(dry_run(unknown, [REWARD], tmp_path), "reward, critic")
    own = {"architecture": {"model": {**load_preset("opt-125m")["architecture"]["model"], "num_hidden_layers": 2}}}
    told = load_config([], [], {"model": "someone/their-model", **own})
    # 50272 + 2050 rows of 768, two layers of 7,087,872, a last norm
    assert "54.4 M" in line_of(dry_run(told, [SFT], tmp_path), "actor")
    from_sft = config_of("opt-1.3b", "reward.initialize_from=sft")
    assert "1.32 B" in line_of(dry_run(from_sft, [REWARD], tmp_path), "reward, critic")


@pytest.mark.parametrize(
    ("bytes_", "text"),
    [(10, "10 B"), (1536, "1.5 KiB"), (212 * GIB, "212 GiB"), (1023.9 * 2**20, "1.0 GiB"), (0, "0 B")],
)
def test_size(bytes_, text):
    assert size(bytes_) == text


def test_idle_ranks_are_said(laptop, tmp_path):
    config = config_of("opt-125m", "processes=64", "rlhf.prompts_per_iteration=128", "rlhf.mini_batches=4")
    text = dry_run(config, [SFT, REWARD, PPO], tmp_path)
    assert "Warning: a mini-batch of 32 samples leaves 32 of 64 ranks idle" in text
    assert "Warning" not in dry_run(config, [SFT], tmp_path)


def test_reading_the_model_in_each_process_may_not_fit_the_main_memory(monkeypatch, tmp_path):
    node = Machine(cores=96, memory=96 * GIB, gpus=(("H100", 80 * GIB),) * 8)
    config = config_of("opt-13b", "processes=8", "sft.optimizer.zero_stage=2")
    outlook = outlook_on(node, config, monkeypatch, steps=(SFT,))
    assert "take up to 383 GiB of main memory" in verdict(outlook, tmp_path)  # 8 x 4 bytes x 12.85 B
    assert "of main memory" not in verdict(outlook_on(NODE, config, monkeypatch, steps=(SFT,)), tmp_path)


def test_a_reward_model_of_fewer_layers_is_counted_as_such():
    values = settings_for_model("smollm2-135m")
    whole = load_config([], ["reward.layers=0"], values)
    cut = load_config([], ["reward.layers=15"], values)
    layers = [Outlook.of(config, [REWARD]).scorer.layers for config in (whole, cut)]
    assert layers == [30, 15]


def test_only_the_roles_that_step_3_has_are_shown_and_counted(laptop, tmp_path):
    given = ["rlhf.advantage=grpo", "rlhf.samples_per_prompt=2", "rlhf.ema=0.9"]
    function = ["rlhf.reward_function=mine.py:score", "rlhf.reward_weights.model=0"]
    text = dry_run(config_of("opt-125m", *given, *function), [SFT, PPO], tmp_path)
    assert "none: advantages by grpo" in line_of(text, "critic") and "1 x mine.py:score" in line_of(text, "reward")
    assert "average with decay 0.9" in text and "actor average, fp32" in text
    assert "critic weights" not in text and "reward weights" not in text and "reward, critic" not in text
    by_name = ["rlhf.reward_function=[length:..40=0.5, json]", "rlhf.reward_weights={model: 0, function: 3}"]
    text = dry_run(config_of("opt-125m", *given, *by_name), [SFT, PPO], tmp_path)
    assert "1.5 x length:..40" in text and "3 x json" in text and "reward weights" not in text
    with_model = dry_run(config_of("opt-125m", *given), [SFT, PPO], tmp_path)
    assert "reward weights" in with_model and "critic weights" not in with_model
    for lora in ("0", "4"):
        no_kl = config_of("opt-125m", "rlhf.kl.coefficient=0", f"rlhf.actor.lora.rank={lora}")
        text = dry_run(no_kl, [PPO], tmp_path)
        assert "none: rlhf.kl has no coefficient, target or stop" in line_of(text, "reference")
        assert "reference weights" not in text


def test_a_command_is_whole_for_a_shell_at_any_width(monkeypatch):
    command = [
        "python",
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "8",
        "step 1/main.py",
        "runs/my run",
        "it's",
    ]
    for width in (40, 80, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = shell_lines(command)
        assert shlex.split("\n".join(lines).replace("\\\n", "")) == command and max(map(len, lines)) <= width
        assert all(line.endswith(" \\") for line in lines[:-1])
    assert len(lines) == 1
