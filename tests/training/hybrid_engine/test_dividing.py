"""Under ZeRO 3 only the first rank reads weights; every rank trains what it read."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.ranks import run_ranks

CASES = (("opt", "float32"), ("gpt2", "float32"), ("llama tied, 2 key heads", "bfloat16"))
STATUS = Path("/proc/self/status")
FORMAT = SimpleNamespace(pad_id=1, end_of_turn_id=2, vocabulary_size=104)  # three tokens more than the models have


def weights_of(model) -> dict[str, torch.Tensor]:
    """Whole parameters, gathered where they are divided, on every rank."""
    from training.hybrid_engine.deepspeed_setup import deepspeed

    found = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().float().clone()
    return found


def divide_what_the_first_rank_read(ranks, directory):
    """Largest differences from a model that this rank has read itself, before and after an update."""
    from tests.inference.tensor_parallel.families import build
    from training.data.batching import TokenBatch
    from training.hybrid_engine.stored_weights import freeze
    from training.hybrid_engine.zero_engine import ZeroEngine
    from training.models.loading import load_causal_lm, load_scorer
    from training.models.policy import Policy, Scorer
    from training.role_settings import FrozenSettings, LoRASettings, OptimizerSettings

    batch = TokenBatch.of([(torch.tensor([5, 6, 7]), torch.tensor([8, 102]))], ranks.device)
    results = {}
    for family, format_name in CASES:
        dtype = getattr(torch, format_name)
        whole, mine = directory / family, directory / f"{family} of {ranks.rank}"
        if ranks.is_first:
            build(family).save_pretrained(whole)
        ranks.barrier()
        shutil.copytree(whole, mine, dirs_exist_ok=True)
        if not ranks.is_first:
            (mine / "model.safetensors").unlink()  # nothing here can be read
        trained = []
        for place, with_weights in ((mine, ranks.is_first), (whole, True)):
            torch.manual_seed(0)  # of the adapters, on the first rank
            lora = LoRASettings(rank=2 if family == "opt" else 0)
            settings = OptimizerSettings(learning_rate=1e-2, warmup=0, zero_stage=3, lora=lora)
            policy = Policy(load_causal_lm(place, FORMAT, dtype, with_weights=with_weights), lora)
            engine = ZeroEngine(policy, settings, dtype, 10, ranks)
            states = [weights_of(engine.language_model)]
            engine.update([SimpleNamespace(weight=1.0)], lambda _, engine=engine: -engine(batch)[0].mean() / 2)
            trained.append([*states, weights_of(engine.language_model)])
        frozen = []
        for place, with_weights in ((mine, ranks.is_first), (whole, True)):
            torch.manual_seed(0)  # of the score head
            scorer = Scorer(load_scorer(place, FORMAT, dtype, with_weights=with_weights))
            frozen.append(freeze(scorer, FrozenSettings(zero_stage=3), dtype, ranks)(batch))
        (before, after), (expected, expected_after) = trained
        results[family] = {
            "names": sorted(before) == sorted(expected),
            "before": max(float((before[name] - expected[name]).abs().max()) for name in expected),
            "after": max(float((after[name] - expected_after[name]).abs().max()) for name in expected),
            "learned": max(float((after[name] - before[name]).abs().max()) for name in expected),
            "frozen": float((frozen[0] - frozen[1]).abs().max()),
        }
    return results


def test_what_the_first_rank_read_is_what_all_train(tmp_path):
    for results in run_ranks(__file__, "divide_what_the_first_rank_read", 2, tmp_path):
        assert len(results) == len(CASES)
        for name, found in results.items():
            assert found["names"] and found["before"] == found["after"] == found["frozen"] == 0.0, (name, found)
            assert found["learned"] > 1e-3, name


@pytest.mark.skipif(not STATUS.exists(), reason="needs /proc")
def test_uninitialised_weights_take_no_room(tmp_path):
    """A quarter of a gigabyte of them; and buffers are as they should be, tied weights tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from training.models.loading import load_causal_lm

    def resident() -> int:
        return int(STATUS.read_text(encoding="utf-8").split("VmRSS:")[1].split()[0]) * 1024

    config = LlamaConfig(
        vocab_size=104, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    load_causal_lm(tmp_path, FORMAT, torch.float32, with_weights=False)  # imports are done
    before = resident()
    model = load_causal_lm(tmp_path, FORMAT, torch.float32, with_weights=False)
    assert sum(p.numel() * 4 for p in model.parameters()) > 250e6
    assert resident() - before < 25e6
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    plain = dict(LlamaForCausalLM(config).named_buffers())
    assert plain and all(torch.equal(buffer, plain[name]) for name, buffer in model.named_buffers())
