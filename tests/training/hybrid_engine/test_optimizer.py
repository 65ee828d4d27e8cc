"""The optimiser step: weight decay on matrices alone, gradients that are no numbers, the ZeRO stage."""

import itertools
import math

import pytest
import torch
from torch import nn

from tests.ranks import run_ranks
from training.deepspeed_config import effective_zero_stage
from training.hybrid_engine.zero_engine import make_optimizer
from training.role_settings import LoRASettings, OptimizerSettings


class Small(nn.Module):
    """A matrix, a bias, a norm, an embedding, an adapter."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.table = nn.Linear(3, 2), nn.LayerNorm(2), nn.Embedding(4, 3)
        self.lora_A = nn.Linear(3, 1, bias=False)


def test_weight_decay_shrinks_matrices_and_leaves_biases_and_norms():
    """With gradients of zero an AdamW step is the decay alone: times 1 - learning rate * decay."""
    model = Small()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 2.0)
        parameter.grad = torch.zeros_like(parameter)
    settings = OptimizerSettings(learning_rate=0.5, weight_decay=0.2, lora=LoRASettings(learning_rate=0.25))
    make_optimizer(model, settings).step()
    shrunk, adapter = 2 * (1 - 0.5 * 0.2), 2 * (1 - 0.25 * 0.2)
    expected = {"linear.weight": shrunk, "table.weight": shrunk, "lora_A.weight": adapter}
    for name, parameter in model.named_parameters():
        assert parameter.flatten().tolist() == pytest.approx([expected.get(name, 2.0)] * parameter.numel()), name


def norms_of_broken_gradients(ranks, directory):
    """By stage and number format: the norm that this rank reports where the gradient of one rank is broken."""
    from inference.families import build_tiny_model
    from tests.training.hybrid_engine.test_moving_average import make_engine
    from training.data.batching import MicroBatch, TokenBatch

    model = directory / "tiny"
    if ranks.is_first:
        build_tiny_model(model)
    ranks.barrier()
    row = (torch.tensor([5, 6]), torch.tensor([7, 8]))
    found = {}
    for stage, dtype in itertools.product(range(4), (torch.float32, torch.bfloat16)):
        if stage == 0 and dtype != torch.float32:
            continue  # such runs take stage 1
        for broken in (math.nan, math.inf):
            engine = make_engine(ranks, model, stage, dtype=dtype)

            def loss(_, engine=engine, broken=broken):
                value = engine(TokenBatch.of([row], ranks.device))[0].sum()
                factor = broken if ranks.rank == 1 else 1.0
                value.register_hook(lambda gradient: gradient * factor)  # the loss itself is a number
                return value

            norm = engine.update([MicroBatch([0])], loss)["grad_norm"]
            found[f"{stage} {dtype} {broken}"] = repr(norm)
    return found


def test_gradients_that_are_no_numbers_are_noticed_at_every_stage_by_every_rank(tmp_path):
    """Where one rank alone has them: steps 1 to 3 stop on such a norm."""
    for found in run_ranks(__file__, "norms_of_broken_gradients", 2, tmp_path):
        assert len(found) == 14
        assert all(not math.isfinite(float(norm)) for norm in found.values()), found


@pytest.mark.parametrize(("dtype", "masters", "stage"), [("float32", 1, 0), ("float16", 0, 1), ("bfloat16", 1, 1)])
def test_master_weights_raise_stage_0_and_no_other(dtype, masters, stage):
    settings = [OptimizerSettings(zero_stage=at, master_weights=masters) for at in (0, 2)]
    assert [effective_zero_stage(each, getattr(torch, dtype)) for each in settings] == [stage, 2]
