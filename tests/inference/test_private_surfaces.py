"""The private surfaces of torch and transformers that `inference` relies on are as they were read."""

import sys
from importlib import import_module

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, LlamaForCausalLM, MambaForCausalLM, XGLMForCausalLM, models
from transformers.utils.import_utils import define_import_structure

from inference import private_surfaces
from inference.generation.attention import can_pack
from tests.families import build, narrow_config


@pytest.fixture(scope="module")
def model():
    return build(narrow_config("llama"))


def test_the_attention_is_what_the_configuration_names(model):
    called = []

    def counted(module, *inputs, **options):
        called.append(module)
        raise StopIteration

    AttentionInterface.register("of_a_test", counted)
    before = private_surfaces.attention_of(model.config)
    private_surfaces.set_attention(model.config, "of_a_test")
    with pytest.raises(StopIteration):
        model(input_ids=torch.zeros(1, 2, dtype=torch.long))
    private_surfaces.set_attention(model.config, before)
    assert called, "transformers no longer calls the attention that config._attn_implementation names"
    model(input_ids=torch.zeros(1, 2, dtype=torch.long))


def test_families_say_whether_their_attention_goes_through_the_interface():
    said = [hasattr(family, "_supports_attention_backend") for family in (LlamaForCausalLM, XGLMForCausalLM)]
    assert all(said), "transformers no longer has PreTrainedModel._supports_attention_backend"
    assert private_surfaces.goes_through_interface(LlamaForCausalLM)
    assert not private_surfaces.goes_through_interface(XGLMForCausalLM)


def test_families_say_whether_they_keep_a_state():
    assert private_surfaces.keeps_a_state(MambaForCausalLM), "transformers no longer marks states with _is_stateful"
    assert not private_surfaces.keeps_a_state(LlamaForCausalLM)


def test_modules_keep_parameters_and_hooks_where_we_take_them():
    module = nn.Linear(2, 2)
    for register, place in zip(
        ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
         "register_full_backward_pre_hook"), private_surfaces.HOOKS, strict=True,
    ):  # fmt: skip
        getattr(module, register)(lambda *_: None)
        assert len(getattr(module, place)) == 1, f"torch no longer keeps hooks in Module.{place}"

    class Gathering(dict):
        pass

    module._parameters = Gathering(module._parameters)
    before = dict(module.named_parameters())
    private_surfaces.put_plain_parameters(module)
    assert type(module._parameters) is dict, "torch no longer keeps parameters in Module._parameters"
    assert dict(module.named_parameters()).keys() == before.keys() == {"weight", "bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onednn_multiplies_by_blocked_weights(dtype):
    if dtype == torch.bfloat16 and not private_surfaces.blocks_bf16():
        pytest.skip("oneDNN does not compute in bf16 on this processor")
    inputs, weight, bias, other = (torch.randn(*shape).to(dtype) for shape in ((3, 8), (5, 8), (5,), (3, 5)))
    blocked = private_surfaces.in_blocked_order(weight, 32)
    product = private_surfaces.linear_on_blocked()(inputs, blocked, bias, "none", [], "")
    total = private_surfaces.linear_and_sum_on_blocked()(inputs, other, blocked, None, "add")
    close = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(product, nn.functional.linear(inputs, weight, bias), **close)
    torch.testing.assert_close(total, nn.functional.linear(inputs, weight) + other, **close)


def test_the_gradient_of_a_softmax_is_torchs():
    scores, onto = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7)
    weights = scores.softmax(-1)
    (expected,) = torch.autograd.grad(weights, scores, onto)
    assert torch.equal(private_surfaces.softmax_backward(onto, weights.detach()), expected)


def test_a_whole_parameter_has_its_own_shape(model):
    parameter = next(model.parameters())
    assert private_surfaces.whole_shape(parameter) == tuple(parameter.shape)
    assert not private_surfaces.is_divided(parameter)
    assert can_pack(model)


def test_the_deferred_compiler_leaves_functions_and_becomes_the_real_one_for_all_else(monkeypatch):
    import torch._dynamo

    real = {name: import_module(name) for name in (private_surfaces.COMPILER, private_surfaces.ITEMS)}
    compiler, items = (private_surfaces.Deferred(name) for name in real)
    for stand_in in (compiler, items):
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    monkeypatch.setattr(private_surfaces, "import_module", real.__getitem__)
    for mark in private_surfaces.MARKS:
        assert callable(getattr(torch._dynamo, mark)), f"torch._dynamo.{mark} is gone"
        assert getattr(compiler, mark)(len) is len
    assert compiler.disable(None, recursive=True, reason="")(len) is len
    assert sys.modules[compiler.__name__] is compiler
    assert type(items.TransformGetItemToIndex()) is real[private_surfaces.ITEMS].TransformGetItemToIndex
    assert private_surfaces.COMPILER not in sys.modules, "the stand-in must make way for the real module"
    assert compiler.config is real[private_surfaces.COMPILER].config


def test_transformers_remembers_what_the_files_of_its_families_define():
    assert private_surfaces.families_of_transformers() == define_import_structure(models.__file__), (
        "transformers no longer remembers under its `models.` names what its folder of families defines"
    )
