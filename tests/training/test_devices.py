"""Losses on a GPU that is not there mix no devices and read nothing back: what they measure is read once a step."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from tests.inference.generation.test_engine import build_model
from tests.pretended_cuda import CUDA, pretended_cuda
from training.config import RunConfig
from training.data.batching import MicroBatch, TokenBatch
from training.data.token_cache import TokenPair
from training.models.policy import Policy, Scorer, at_last_token
from training.stage import read_at_once
from training.step1_sft.sft import SFTTask
from training.step2_dpo.dpo import DPOTask
from training.step2_reward.reward import RewardTask
from training.step3_rlhf.experience import Experience, Targets
from training.step3_rlhf.roles import response_values
from training.step3_rlhf.update import Batch, MiniBatch, Statistics, Updates

PROMPT, LONG, SHORT = torch.tensor([3, 4, 5]), torch.tensor([6, 7, 8, 9, 2]), torch.tensor([6, 2])
ROWS = [(PROMPT, LONG), (PROMPT, SHORT), (LONG, SHORT)]


def build_scorer() -> Scorer:
    model: Any = build_model("llama")
    model.score = torch.nn.Linear(model.config.hidden_size, 1, bias=False)
    return Scorer(model)


class Rows(list):
    sizes = torch.tensor([8, 5, 7])


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request) -> torch.dtype:
    return request.param


def test_scoring(dtype):
    policy, scorer = Policy(build_model("llama")), build_scorer()
    with pretended_cuda(policy, scorer, dtype=dtype), torch.no_grad():
        batch = TokenBatch.of(ROWS, CUDA)
        logprobs, scores = policy(batch)[0], scorer(batch)
        assert logprobs.shape == (9,) and {logprobs.device, scores.device} == {CUDA}
        assert response_values(scores, batch).shape == (9,) and at_last_token(scores, batch).shape == (3,)


@pytest.mark.parametrize("more", [{}, {"ratio": "sequence", "loss_mean": "sequence", "kl": {"place": "loss"}}])
def test_losses_of_step_3(dtype, more):
    config = RunConfig.model_validate({"model": "tiny", "rlhf": more})
    numbers = torch.linspace(-1, 0, 5)
    names = ("generation_logprobs", "logprobs", "reference_logprobs", "values")
    experience = [
        Experience(i, *row, ended=True, score=0.5, **dict.fromkeys(names, numbers[: len(row[1])]))
        for i, row in enumerate(ROWS)
    ]
    batch = Batch(1, experience, Targets.of(experience, config.rlhf, 0.1), [0, 1, 2], 0.1)
    ranks = SimpleNamespace(device=CUDA)
    stage = SimpleNamespace(config=config)
    updates: Any = SimpleNamespace(stage=stage, settings=config.rlhf, ranks=ranks)
    whole, statistics = MiniBatch(batch, [2, 0, 1], 0), Statistics()
    policy, scorer = Policy(build_model("llama")), build_scorer()
    with pretended_cuda(policy, scorer, dtype=dtype):
        for model, make in ((policy, Updates.actor_pass), (scorer, Updates.critic_pass)):
            loss = make(updates, whole, statistics, MicroBatch([0, 2])).of_whole(model)
            assert loss.device == CUDA and loss.dtype == torch.float32 and loss.ndim == 0
        with pytest.raises(DataDependentOutputException):  # here the host waits
            statistics.read()
    assert not statistics.sums


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_losses_of_rows(dtype, kind):
    stage: Any = SimpleNamespace(ranks=SimpleNamespace(device=CUDA), config=RunConfig(model="tiny"))
    stage.settings = stage.config.dpo
    pairs = [TokenPair(PROMPT, LONG, SHORT), TokenPair(LONG, SHORT, LONG)]
    model = build_scorer() if kind == "reward" else Policy(build_model("llama"))
    task: Any = {
        "sft": lambda: SFTTask(stage, model, Rows(ROWS), Rows(ROWS)),
        "reward": lambda: RewardTask(stage, model, pairs, pairs),
        "dpo": lambda: DPOTask(stage, model, {"train": pairs, "eval": pairs}, {"train": torch.zeros(2, 2)}),
    }[kind]()
    with pretended_cuda(model, dtype=dtype):
        loss, measured = task.loss([0, 1])
        assert {loss.device, *(each.device for each in measured.values())} == {CUDA}
        with pytest.raises(DataDependentOutputException):
            read_at_once([measured])
