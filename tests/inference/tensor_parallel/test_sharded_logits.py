"""A model cut over 2 and 4 ranks gives the logits (scores) of the whole model, in every family."""

import pytest
import torch

from tests.inference.tensor_parallel.families import FAMILIES, build, randomise
from tests.ranks import run_ranks

SCORERS = ("opt", "gpt2", "gpt_neox", "bloom", "llama")
ADAPTED = ("opt", "opt post-norm, projections", "gpt2", "gpt_neox", "bloom", "llama tied, 2 key heads", "qwen2", "gptj")


def shard_of(whole, tensor_parallel):
    from inference.tensor_parallel.shard import empty_shard

    shard, pieces = empty_shard(whole, tensor_parallel)
    parameters = dict(whole.named_parameters())
    for piece in pieces:
        whole_values = parameters[piece.name].data
        piece.local.copy_(whole_values if piece.cut is None else piece.cut(whole_values))
    return shard, sum(piece.local.numel() for piece in pieces)


def left_padded():
    ids = torch.randint(4, 101, (3, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :1] = 0, 0
    return ids, mask


def outputs(model, with_mask=True):
    """Logits or scores, float32; of real tokens only."""
    ids, mask = left_padded()
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask if with_mask else None, use_cache=False).logits.float()
    return logits[mask.bool()] if with_mask and logits.ndim == 3 else logits


def is_tied(model):
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def compare(ranks, directory):
    from inference.tensor_parallel.shard import join_groups
    from training.models.policy import add_lora
    from training.role_settings import LoRASettings

    parts = {2: join_groups([(0, 1), (2, 3)]), 4: join_groups([(0, 1, 2, 3)])}
    cases = [(family, False, False) for family in FAMILIES] + [(family, False, True) for family in ADAPTED]
    cases += [(family, True, False) for family in SCORERS] + [("opt", True, True), ("llama", True, True)]
    results = {"fp32": {}, "bf16": {}}
    for family, scorer, lora in cases:
        whole = build(family, scorer)
        if lora:
            add_lora(whole, LoRASettings(rank=3))
            randomise(whole)
        exact, exact_unmasked = outputs(whole), outputs(whole, with_mask=False)
        for degree, part in parts.items():
            shard, size = shard_of(whole, part)
            found = outputs(shard)
            results["fp32"][f"{family}{' scorer' * scorer}{' lora' * lora} tp{degree}"] = {
                "off": float((found - exact).abs().max()),
                "off_unmasked": float((outputs(shard, with_mask=False) - exact_unmasked).abs().max()),
                "largest": float(exact.abs().max()),
                "sum": found.double().sum().item().hex(),
                "size": size / sum(p.numel() for p in whole.parameters()),
                "is_tied": [is_tied(whole), is_tied(shard)],
            }
        if not scorer and not lora:
            half = whole.bfloat16()
            results["bf16"][family] = {
                "whole": float((outputs(half) - exact).abs().max()),
                "shards": [float((outputs(shard_of(half, part)[0]) - exact).abs().max()) for part in parts.values()],
            }
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(__file__, "compare", 4, tmp_path_factory.mktemp("shards"))


def test_fp32_outputs_equal_the_whole_models(results):
    for name, case in results[0]["fp32"].items():
        assert case["largest"] > 0.1, name
        assert case["off"] <= 1e-5 * max(1.0, case["largest"]), name
        assert case["off_unmasked"] <= 1e-5 * max(1.0, case["largest"]), name


def test_bf16_logits_are_nearly_as_near_to_fp32_as_the_whole_models(results):
    for name, case in results[0]["bf16"].items():
        assert 0 < max(case["shards"]) <= 2 * case["whole"], name


def test_every_rank_gets_the_same_bits(results):
    for name, case in results[0]["fp32"].items():
        assert {other["fp32"][name]["sum"] for other in results} == {case["sum"]}, name


def test_a_shard_is_small_and_tied_embeddings_stay_one(results):
    fp32 = results[0]["fp32"]
    assert all(case["is_tied"][0] == case["is_tied"][1] for case in fp32.values())
    assert fp32["opt tp2"]["is_tied"] == [True, True] and fp32["opt untied tp2"]["is_tied"] == [False, False]
    assert fp32["opt tp2"]["size"] < 0.6  # positions and norms are whole
    assert fp32["llama tp4"]["size"] < 0.3
