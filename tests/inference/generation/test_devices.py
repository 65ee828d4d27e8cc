"""Generation on a GPU that is not there mixes no devices and reads nothing back but the tokens of a run."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from inference.generation.kv_cache import KVCache
from inference.generation.passes import PackedPasses, Replay
from inference.generation.sampler import Draw, Sample, SamplingSettings
from tests.inference.generation.test_engine import KEY, build_model
from tests.pretended_cuda import CUDA, pretended_cuda

DRAWN = SamplingSettings(max_tokens=20, temperature=1.3, top_k=30, top_p=0.9, min_tokens=4)
PROMPTS = [torch.tensor([3, 4, 5]), torch.tensor([3, 4, 5, 6, 7])]


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_prompts_and_steps_stay_on_the_device(family, dtype):
    model = build_model(family)
    samples = [Sample(row, prompt, 20, [8]) for row, prompt in enumerate(PROMPTS)]
    with pretended_cuda(model, dtype=dtype):
        passes = PackedPasses(model, KVCache(4, 32))
        logits = passes.prefill(PROMPTS, [0, 1])
        replay, draw = Replay(passes), Draw(DRAWN, KEY, (1, 2), may_end=True)
        replay.captures = False
        replay._load(samples, 2, draw)
        replay.step(2, 16, draw)
        assert {each.device for each in (logits, replay.drawn, *passes.cache.keys.values())} == {CUDA}
        assert logits.shape == (2, model.config.vocab_size) and passes.cache.keys[0].dtype == dtype
        with pytest.raises(DataDependentOutputException):  # here the host waits
            replay.run(samples, 3, draw)
