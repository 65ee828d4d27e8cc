"""`reference_model`: what KL and log-ratios count from, where that is not the SFT model."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from inference.chat_format import ChatFormat
from tests.supervised_steps import make_run, metrics_of, stage_of
from tests.tiny_runs import make_tiny_run, messages
from training.config_files import load_config, with_absolute_paths
from training.data.batching import TokenBatch
from training.lineage import Origin, sources_of, trace
from training.step2_dpo import dpo
from training.step3_rlhf.roles import Roles
from training.steps import DPO, PPO, SFT


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A run whose SFT and RLHF models differ."""
    return make_tiny_run(tmp_path_factory.mktemp("models"), has_reward=False)


def by_hand(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(response)), response]


def settings(models, *more: str) -> list[str]:
    sft, own = models.step(SFT).model, models.step(PPO).model
    return [f"model={sft}", f"sft_model={sft}", f"reference_model={own}", "dtype=fp32", *more]


@torch.no_grad()
@pytest.mark.parametrize("rank", [0, 4])
def test_ppo_scores_with_it_also_where_adapters_are_trained(models, one_rank, rank):
    given = settings(models, f"rlhf.actor.lora.rank={rank}", "rlhf.advantage=reinforce++", "rlhf.temperature=2")
    config = load_config([], [*given, "rlhf.reward_weights.model=0", "rlhf.reward_function=a.py:f"])
    sft, own = models.step(SFT).model, models.step(PPO).model
    display = SimpleNamespace(say=print)
    stage = SimpleNamespace(config=config, ranks=one_rank, dtype=torch.float32, display=display, seed=1)
    roles = Roles(stage, sft, None, ChatFormat.load(sft), (1, 1), own)
    batch = TokenBatch.of([(torch.tensor([5, 6, 7]), torch.tensor([8, 9]))], one_rank.device)
    logits = AutoModelForCausalLM.from_pretrained(own)(torch.tensor([[5, 6, 7, 8, 9]])).logits[0, 2:-1] / 2
    expected = logits.log_softmax(-1)[[0, 1], [8, 9]]
    assert torch.allclose(roles.score("reference", [batch])[0], expected, atol=1e-5)


def test_dpo_asks_it_once_before_the_policy_is_there(models, one_rank, tmp_path, monkeypatch):
    texts = [f"Word number {n}" for n in range(5)]
    rows = [{"prompt": messages(t), "chosen": t, "rejected": t[:6]} for t in texts]
    given = settings(models, "method=dpo", "dpo.batch_size=2", "dpo.beta=0.5")
    run = make_run(tmp_path / "run", "pairs", rows[:4], rows[4:])
    dpo.train(stage_of(run, DPO, given, one_rank))
    form, own = ChatFormat.load(models.step(SFT).model), AutoModelForCausalLM.from_pretrained(models.step(PPO).model)
    kept = load_file(run.step(DPO).reference_file)
    with torch.no_grad():
        for name, part in (("train", rows[:4]), ("eval", rows[4:])):
            for place, key in enumerate(("chosen", "rejected")):
                sums = [
                    by_hand(own, form.prompt_ids(row["prompt"], 256), form.response_ids(row[key], 256)).sum()
                    for row in part
                ]
                assert torch.allclose(kept[name][place], torch.stack(sums), atol=1e-4)
    assert abs(metrics_of(run, DPO)[1][0]["eval/margin"]) > 1e-3  # counted from another model than it begins as
    run.step(DPO).result_file.unlink()
    monkeypatch.setattr(dpo, "load_own_reference", None)
    dpo.train(stage_of(run, DPO, given, one_rank))


def test_a_run_stands_for_its_newest_model_and_what_that_was_trained_on_is_known(models):
    config = with_absolute_paths(load_config([], ["model=m", f"reference_model={models.path}"]))
    assert config.reference_model == str(models.step(PPO).model)
    assert Origin(models, PPO) in trace(sources_of(config))[0]


def test_a_file_of_settings_in_the_working_directory_names_no_reference(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("model: m\n")
    monkeypatch.chdir(tmp_path)
    assert with_absolute_paths(load_config([], ["model=m"])).reference_model == ""
