"""Training computes what generation computed, to the bit: prefill, prefill at another batch, decoding, training."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from inference.errors import UserError
from inference.generation import attention, cpu, passes
from inference.generation.cpu import CausalAttention, Exactness
from inference.generation.engine import GenerationEngine
from inference.generation.sampler import SamplingKey, SamplingSettings
from tests.inference.generation.test_engine import PAD, build_model, make_prompts
from training.data.batching import TokenBatch
from training.distributed import Ranks
from training.models.policy import Policy
from training.rlhf_settings import RLHFSettings
from training.role_settings import LoRASettings
from training.step3_rlhf import exactness as of_step
from training.step3_rlhf import planned
from training.step3_rlhf.exactness import CANDIDATES, agrees, find_exactness, first_layers, settle_exactness

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
FAMILIES = ("opt", "opt-350m", "gpt2", "gpt_neox", "llama", "qwen2", "qwen3", "mistral", "cohere2")
DTYPES = (torch.bfloat16, torch.float32)
LONGEST = {torch.bfloat16: 80, torch.float32: 600}
"""Where a processor does not multiply bf16, it takes its time."""
ENDS = (2, 7, 9)
LORA = LoRASettings(rank=3)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def taught(family: str, dtype: torch.dtype, lora: LoRASettings | None, exact: Exactness) -> Policy:
    """A policy after two optimiser steps, its adapters not 0 any more."""
    policy = Policy(build_model(family).to(dtype), lora, exact).to(dtype)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    rows = [(prompt, prompt) for prompt in make_prompts([5, 9, 2])]
    for _ in range(2):
        policy(TokenBatch.of(rows, CPU))[0].mean().neg().backward()
        optimizer.step()
    return policy.eval()


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "adapters"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_pass_gives_the_bits_of_the_samples(family, dtype, lora):
    require_same_bits(family, dtype, lora)


def test_experts_have_products_of_any_number_of_rows():
    assert find_exactness(build_model("deepseek_v3"), None, torch.float32, 64, ALONE) is None


def require_same_bits(family: str, dtype: torch.dtype, lora: LoRASettings | None) -> None:
    exact = next(each for each in CANDIDATES[dtype] if agrees(first_layers(build_model(family), lora, dtype), each, 40))
    policy = taught(family, dtype, lora, exact)
    engine = GenerationEngine(policy.model, ENDS, PAD, slots=4, exact=exact)  # prompts come into running batches
    prompts = make_prompts([3, 31, 1, 7, 17, 2, 9, 4])
    prompts[2:2] = [prompts[1]] * 3  # what they begin with is prefilled once, and goes through training once
    samples = list(engine.generate(prompts, SamplingSettings(19, 0.7), SamplingKey(5)))
    assert len({len(sample.response_ids) for sample in samples}) > 2
    rows = [(sample.prompt_ids, torch.tensor(sample.response_ids)) for sample in samples]
    drawn = torch.tensor([logprob for sample in samples for logprob in sample.logprobs])
    trained, _ = policy(TokenBatch.of(rows, CPU), 0.7)
    assert trained.requires_grad and torch.equal(trained, drawn)
    with torch.no_grad():
        assert torch.equal(policy(TokenBatch.of(rows, CPU), 0.7)[0], drawn)
        alone = torch.cat([policy(TokenBatch.of([row], CPU), 0.7)[0] for row in rows])
    assert torch.equal(alone, drawn)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_trial_sees_what_is_not_equal(monkeypatch, dtype):
    shape = first_layers(build_model("llama"), LORA, dtype)
    longest = LONGEST[dtype]
    exact = find_exactness(build_model("llama"), LORA, dtype, longest, ALONE)
    assert agrees(shape, exact, longest)

    def fused(query, key, value, mask, exact):
        return scaled_dot_product_attention(query, key, value, torch.atleast_2d(mask), scale=1.0)

    with monkeypatch.context() as patched:
        patched.setattr(attention, "plain_attention", fused)
        assert not agrees(shape, exact, longest)
    with monkeypatch.context() as patched:
        patched.setattr(of_step, "plain_attention", fused)
        assert not agrees(shape, exact, longest)
    with monkeypatch.context() as patched:
        decode = passes.PackedPasses.decode
        patched.setattr(passes.PackedPasses, "decode", lambda *inputs: decode(*inputs).nextafter(torch.tensor(1.0)))
        assert not agrees(shape, exact, longest)


def test_a_trial_leaves_the_generator_of_random_numbers_as_it_is():
    model, before = build_model("opt"), torch.get_rng_state()
    find_exactness(model, None, torch.float32, 64, ALONE)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("exact", [Exactness(), Exactness(8, 8, 16, 16)], ids=["as it is", "filled up"])
def test_gradients_are_those_of_attention(monkeypatch, window, exact):
    monkeypatch.setattr(cpu, "QUERIES", 5)
    query, key, value = (torch.randn(2, *shape, 21, 4, requires_grad=True) for shape in ((3, 2), (3,), (3,)))
    place = torch.arange(21)
    seen = (place[:, None] >= place) & (place[:, None] - place < (window or 21))
    expected = scaled_dot_product_attention(query, key[:, :, None], value[:, :, None], seen, scale=0.3)
    found = CausalAttention.apply(query, key, value, 0.3, window, exact)
    onto = torch.randn_like(found)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(each, (query, key, value), onto) for each in (found, expected))
    torch.testing.assert_close(ours, theirs)


def saved(directory: Path, family: str) -> Path:
    """The configuration alone: weights are not looked at."""
    build_model(family).config.save_pretrained(directory)
    return directory


def a_stage(dtype: torch.dtype, device: torch.device = CPU, **settings) -> SimpleNamespace:
    said: list[str] = []
    return SimpleNamespace(
        config=SimpleNamespace(rlhf=RLHFSettings(**settings), data=SimpleNamespace(longest=32)),
        ranks=Ranks(0, 1, device),
        dtype=dtype,
        display=SimpleNamespace(say=said.append),
        said=said,
    )


@pytest.mark.parametrize("multiplies", [True, False])
def test_auto_is_exact_where_it_costs_nothing(monkeypatch, tmp_path, multiplies):
    monkeypatch.setattr(planned, "multiplies_bf16", lambda: multiplies)
    model = saved(tmp_path, "llama")
    assert settle_exactness(a_stage(torch.bfloat16), model) == (CANDIDATES[torch.bfloat16][0] if multiplies else None)
    assert settle_exactness(a_stage(torch.float32), model) is None
    assert settle_exactness(a_stage(torch.bfloat16, exact=False), model) is None
    assert settle_exactness(a_stage(torch.bfloat16, generation_tensor_parallel=2), model) is None
    plan = {"actor_generate": {"mesh": "0-1", "tensor": 2}}
    assert settle_exactness(a_stage(torch.bfloat16, plan=plan), model) is None


def test_auto_says_where_a_processor_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr(planned, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(of_step, "agrees", lambda *_: False)
    stage = a_stage(torch.bfloat16)
    assert settle_exactness(stage, saved(tmp_path, "llama")) is None
    assert stage.said == [
        "PPO: generation and training will be a rounding apart: this processor's products in torch.bfloat16 depend on "
        "what is computed beside them"
    ]


@pytest.mark.parametrize(
    ("stage", "family", "reason"),
    [
        (a_stage(torch.float32, torch.device("cuda"), exact=True), "llama", "on a GPU"),
        (a_stage(torch.float32, exact=True, generation_tensor_parallel=2), "llama", "the ranks that generate together"),
        (a_stage(torch.float32, exact=True), "bloom", "models of the family bloom"),
    ],
)
def test_what_is_asked_for_and_cannot_be_is_refused(tmp_path, stage, family, reason):
    with pytest.raises(UserError, match=rf"^rlhf\.exact=true, but {reason} .*; take rlhf\.exact=auto\.$"):
        settle_exactness(stage, saved(tmp_path, family))


def test_the_ranks_agree_on_what_holds_for_all(monkeypatch):
    others = iter([False, True, False, False])
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, next(others)])
    found = [find_exactness(build_model("opt"), None, torch.float32, 64, ALONE) for _ in range(2)]
    assert found == [CANDIDATES[torch.float32][1], None]
