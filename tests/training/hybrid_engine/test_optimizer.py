"""Which weights decay, and at which rate they learn; one update by hand."""

import pytest
import torch
from torch import nn

from training.hybrid_engine.zero_engine import make_optimizer
from training.role_settings import LoRASettings, OptimizerSettings

RATE, ADAPTER_RATE, DECAY = 0.1, 0.3, 0.5


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        self.linear = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)
        self.lora_A = nn.Linear(2, 2, bias=False)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


@pytest.mark.parametrize("adapter_rate", [0.0, ADAPTER_RATE])
def test_matrices_decay_and_biases_and_norms_do_not(adapter_rate):
    """Where the gradient is 0, AdamW does nothing but decay: a weight loses rate * decay of itself."""
    model = Model()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    settings = OptimizerSettings(learning_rate=RATE, weight_decay=DECAY, lora=LoRASettings(learning_rate=adapter_rate))
    make_optimizer(model, settings).step()
    left = {name: float(parameter.mean()) for name, parameter in model.named_parameters()}
    kept = 1 - RATE * DECAY
    assert left == pytest.approx(
        {
            "embedding.weight": kept,
            "linear.weight": kept,
            "lora_A.weight": 1 - (adapter_rate or RATE) * DECAY,
            **dict.fromkeys(("linear.bias", "norm.weight", "norm.bias", "frozen.weight", "frozen.bias"), 1.0),
        }
    )


def test_every_trained_weight_is_in_one_group():
    model = Model()
    groups = make_optimizer(model, OptimizerSettings(weight_decay=DECAY)).param_groups
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


def test_a_first_update_moves_every_weight_by_its_rate():
    model = Model()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    settings = OptimizerSettings(learning_rate=RATE, lora=LoRASettings(learning_rate=ADAPTER_RATE))
    make_optimizer(model, settings).step()
    moved = {name: -float(p.mean()) for name, p in model.named_parameters() if p.requires_grad}
    assert moved == pytest.approx({name: ADAPTER_RATE if "lora_" in name else RATE for name in moved}, rel=1e-5)
