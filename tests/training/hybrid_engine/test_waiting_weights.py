"""Frozen weights wait on the host and lie on the GPU in their calls. `test_plans.py` has the calls, on any machine."""

import pytest
import torch
from torch import nn

from training.hybrid_engine.stored_weights import WaitingWeights


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_weights_come_for_the_call_and_leave_after_it():
    device = torch.device("cuda")
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval().to(device)
    module.register_parameter("again", module[0].weight)
    inputs = torch.randn(2, 3, device=device)
    expected = module[1](module[0](inputs))
    waiting = WaitingWeights(module, device)
    for _ in range(2):
        held = [*module.parameters(), *module.buffers()]
        assert all(each.device.type == "cpu" for each in held)
        assert all(each.is_pinned() for each in module.parameters())
        with waiting.present():
            assert module.again is module[0].weight and module.again.is_cuda
            assert torch.equal(module[1](module[0](inputs)), expected)
    with pytest.raises(ValueError, match="a call"), waiting.present():
        raise ValueError("a call")
    assert not module.again.is_cuda
