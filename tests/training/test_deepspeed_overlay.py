"""DeepSpeed values of a user's own, as in microsoft/DeepSpeedExamples #281: taken, or refused by name."""

import pytest
import torch

from inference.errors import UserError
from training.config_files import load_config
from training.deepspeed_config import deepspeed_config, require_overlays
from training.preparation.prepare import prepare
from training.run_directory import RunDirectory


def judge(overlay: str, *settings: str, dtype: torch.dtype = torch.float32) -> None:
    given = ["model=m", f"sft.optimizer.deepspeed={overlay}", *settings]
    require_overlays(load_config([], given), dtype)


@pytest.mark.parametrize(
    ("overlay", "said"),
    [
        ("{train_batch_size: 8}", "'train_batch_size' is not for DeepSpeed to say: the setting is batch_size"),
        ("{train_micro_batch_size_per_gpu: 4}", "the setting is micro_batch_tokens"),
        ("{gradient_accumulation_steps: 4}", "the setting is batch_size and micro_batch_tokens"),
        ("{gradient_clipping: 0.001}", "the setting is gradient_clipping"),
        ("{optimizer: {type: SGD, params: {lr: 1.0}}}", "'optimizer' is not .* the setting is learning_rate"),
        ("{optimizer.type: SGD}", "'optimizer' is not .* the setting is learning_rate"),
        ("{scheduler: {type: WarmupLR}}", "the setting is schedule and warmup"),
        ("{fp16: {enabled: true}}", "'fp16.enabled' is not .* the setting is dtype"),
        ("{fp16: {loss_scale_window: 9}}", "DeepSpeed ignores 'fp16', for the run computes in fp32"),
        ("{bf16: {check_grad_overflow: true}}", "DeepSpeed ignores 'bf16', for the run computes in fp32"),
        ("{zero_optimization: {stage: 3}}", "'zero_optimization.stage' is not .* the setting is zero_stage"),
        ("{zero_optimization: {reduce_bucket_size: 9}}", "ignores 'zero_optimization' at zero_stage=0"),
        ("{zero_optimzation: {stage: 2}}", "ignores 'zero_optimzation' here; did you mean 'zero_optimization'"),
        ("{wall_clock_breakdwn: true}", "here; did you mean 'wall_clock_breakdown'"),
        ("{compile: {}}", "ignores 'compile' here: leave it out"),
        ("{flops_profiler: {enable: true}}", "ignores 'flops_profiler.enable'; did you mean 'enabled'"),
        ("{flops_profiler: true}", "'flops_profiler' is a group of keys"),
    ],
)
def test_what_would_do_nothing_or_something_else_is_refused(overlay, said):
    with pytest.raises(UserError, match=f"sft.optimizer.deepspeed: .*{said}"):
        judge(overlay)


def test_a_plan_has_stages_of_its_own():
    plan = "rlhf.plan={actor_train: {mesh: 0-1, data: 2, zero_stage: %d}}"
    overlay = "rlhf.actor.deepspeed={zero_optimization: {reduce_bucket_size: 9}}"
    judge("{}", plan % 1, overlay)
    with pytest.raises(UserError, match="ignores 'zero_optimization' at zero_stage=0"):
        judge("{}", plan % 0, overlay, "rlhf.actor.zero_stage=1")


@pytest.mark.parametrize(
    ("overlay", "stage", "said"),
    [
        (
            "{zero_optimization: {reduce_bucketsize: 9}}",
            1,
            "does not know .*bucketsize'; did you mean 'reduce_b",
        ),
        ("{zero_optimization: {overlap_comm: perhaps}}", 1, "does not take 'zero_optimization.overlap_comm'"),
        ("{zero_optimization: {stage3_max_live_parameters: 9}}", 2, "below zero_stage=3"),
        ("{zero_optimization: {round_robin_gradients: true}}", 2, "takes one weight for another .*; leave it out"),
        ("{zero_optimization: {offload_optimizer: {device: cpu}}}", 1, "the setting is offload"),
        ("{zero_optimization: {offload_optimizer: {pin_memry: true}}}", 3, "the setting is offload"),
        ("{zero_optimization: {cpu_offload: true}}", 3, "the setting is offload"),
    ],
)
def test_keys_of_zero_go_by_the_stage_and_by_what_deepspeed_knows(overlay, stage, said):
    with pytest.raises(UserError, match=said):
        judge(overlay, f"sft.optimizer.zero_stage={stage}")


def test_misspelt_keys_deep_down_and_number_formats():
    offload = ["sft.optimizer.zero_stage=3", "sft.optimizer.offload=optimizer"]
    with pytest.raises(UserError, match=r"does not know 'zero_optimization\.offload_optimizer\.pin_memry'"):
        judge("{zero_optimization: {offload_optimizer: {pin_memry: true}}}", *offload)
    with pytest.raises(UserError, match=r"does not know 'fp16\.loss_scale_windw'; did you mean 'loss_scale_window'"):
        judge("{fp16: {loss_scale_windw: 9}}", dtype=torch.float16)


def test_what_has_no_setting_is_taken_and_reaches_deepspeed():
    overlay = "{wall_clock_breakdown: true, zero_optimization: {reduce_bucket_size: 9}, comms_logger: {enabled: true}}"
    judge(overlay, "sft.optimizer.zero_stage=1")
    judge("{fp16: {loss_scale_window: 9}}", dtype=torch.float16)
    judge("{zero_optimization: {offload_optimizer: {device: nvme, nvme_path: /x}}}", "sft.optimizer.zero_stage=3",
          "sft.optimizer.offload=optimizer")  # fmt: skip
    settings = load_config([], ["model=m", f"sft.optimizer.deepspeed={overlay}", "sft.optimizer.zero_stage=1"])
    whole = deepspeed_config(settings.sft.optimizer, torch.float32)
    assert whole["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 9} and whole["wall_clock_breakdown"] is True


@pytest.mark.parametrize("role", ["reward.optimizer", "dpo.optimizer", "rlhf.actor", "rlhf.critic"])
def test_every_role_is_looked_at_before_anything_is_made(tmp_path, role):
    config = load_config([], ["model=tiny", f"{role}.deepspeed={{train_batch_size: 8}}"])
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(UserError, match=rf"{role}\.deepspeed: 'train_batch_size'"):
        prepare(config, run, 1, lambda line: None)
    assert not run.data.exists()
    run.data.mkdir(parents=True)  # of a run that began before: it goes on
    (run.data / "counts.json").write_text('{"rows": {}}')
    prepare(config, run, 1, lambda line: None)
