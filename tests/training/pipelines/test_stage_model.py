"""The stages of a model, one after the other, give what the whole model gives, bit for bit: outputs and gradients."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from inference.errors import UserError
from inference.families import meta_model
from inference.generation.cpu import Exactness
from inference.generation.passes import Prefixes
from tests.families import narrow_config
from training.data.batching import TokenBatch
from training.hybrid_engine.layout import StageCut
from training.models.policy import Policy, Scorer, hidden_shape
from training.pipelines.stage_model import held_weights, keep_stage, require_stages, stages_of, tied_table
from training.role_settings import LoRASettings

SMALL: dict[str, Any] = {"vocab_size": 101, "hidden_size": 32, "num_attention_heads": 4, "pad_token_id": 0}
GATED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
OPT = {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "dropout": 0.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GATED),
    "llama tied": ("llama", {**GATED, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {**GATED, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", GATED),
    "mistral": ("mistral", {**GATED, "sliding_window": 5}),
    "gemma": ("gemma", GATED),
    "opt": ("opt", OPT),
    "opt-350m": ("opt", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt untied": ("opt", {**OPT, "tie_word_embeddings": False}),
    "gpt2": ("gpt2", {**SMALL, "n_positions": 64, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt_neox": ("gpt_neox", {**SMALL, "intermediate_size": 48, "max_position_embeddings": 64}),
    "bloom": ("bloom", {"vocab_size": 101, "hidden_size": 32, "n_head": 4, "pad_token_id": 0}),  # padded
}
BOTH = ("llama", "opt-350m")
CPU = torch.device("cpu")


def tokens(length: int, seed: int) -> Tensor:
    return torch.randint(5, 101, (length,), generator=torch.Generator().manual_seed(seed))


MIXED = [(tokens(7, 1), tokens(5, 2)), (tokens(3, 3), tokens(2, 4)), (tokens(12, 5), tokens(9, 6))]
SHARED = [*MIXED, (tokens(7, 1), tokens(4, 7)), (tokens(12, 5), torch.cat([tokens(9, 6)[:4], tokens(3, 8)]))]


def build(family: str, layers: int = 3, dtype: torch.dtype = torch.float32, scorer: bool = False) -> Any:
    kind, values = FAMILIES[family]
    loader: Any = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
    torch.manual_seed(0)
    model = loader.from_config(AutoConfig.for_model(kind, **values, num_hidden_layers=layers, num_labels=1))
    for parameter in model.parameters():  # the default initialisation makes layers that hardly matter
        nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval()


def randomised(module: nn.Module) -> nn.Module:
    """With adapters that change what the model says: they begin as zeros."""
    torch.manual_seed(1)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return module


def stages(module: Any, layers: tuple[int, ...]) -> list[Any]:
    found = []
    for stage in range(len(layers)):
        part = copy.deepcopy(module)
        keep_stage(part.model, StageCut(stage, layers))
        found.append(part)
    return found


def first_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def trained(module: Any, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """What it says, and the gradients of a sum that weighs tokens unlike each other."""
    output = first_of(module(batch))
    output.backward(torch.linspace(-1, 1, len(output)))
    return output.detach(), {name: p.grad for name, p in module.model.named_parameters() if p.grad is not None}


def chained(parts: list[Any], batch: TokenBatch) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The same of stages: each is handed a copy of what the one before has sent, as from another process."""
    received: list[Tensor | None] = [None]
    outputs = []
    for part in parts:
        inputs = {} if received[-1] is None else {"received": received[-1]}
        outputs.append(first_of(part(batch, **inputs)))
        if part is not parts[-1]:
            assert outputs[-1].shape == hidden_shape(part.model, batch)
        received.append(outputs[-1].detach().clone().requires_grad_())
    gradient: Tensor = torch.linspace(-1, 1, len(outputs[-1]))
    for output, its_input in zip(reversed(outputs), reversed(received[:-1]), strict=True):
        output.backward(gradient)
        if its_input is not None:
            assert its_input.grad is not None
            gradient = its_input.grad.clone()
    gradients: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, parameter in held_weights(part.model).items():
            if parameter.grad is not None:
                gradients.setdefault(name, []).append(parameter.grad)
    return outputs[-1].detach(), gradients


def require_equal(module: Any, layers: tuple[int, ...], rows: list = MIXED) -> None:
    parts = stages(module, layers)
    batch = TokenBatch.of(rows, CPU)
    expected, gradients = trained(module, batch)
    found, in_stages = chained(parts, batch)
    assert torch.equal(found, expected)
    assert in_stages.keys() == gradients.keys()
    for name, grads in in_stages.items():
        if len(grads) == 1:
            assert torch.equal(grads[0], gradients[name]), name
        else:  # of a tied table, in another order
            tolerance = 1e-6 if grads[0].dtype == torch.float32 else 2**-7
            assert torch.allclose(sum(grads), gradients[name], rtol=tolerance, atol=tolerance), name
    held = [held_weights(part.model) for part in parts]
    assert set().union(*held) == dict(module.model.named_parameters()).keys()
    assert {name: tuple(s for s in range(len(parts)) if name in held[s]) for name in set().union(*held)} == (
        stages_of(module.model, layers)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_are_the_whole_model(family):
    require_equal(Policy(build(family)), (2, 1))


@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize("layers", [(1, 4), (4, 1), (2, 1, 2), (1, 1, 2, 1)])
def test_an_odd_number_of_layers_in_unequal_runs(family, layers):
    require_equal(Policy(build(family, layers=5)), layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16(family):
    require_equal(Policy(build(family, dtype=torch.bfloat16)), (1, 2), SHARED)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_rows_begin_with_together_is_sent_once(family, monkeypatch):
    policy = Policy(build(family))
    require_equal(policy, (1, 1, 1), SHARED)
    if family == "bloom":
        return
    scorer, batch = Scorer(build(family, scorer=True)), TokenBatch.of(SHARED, CPU)
    for _ in range(2):
        assert hidden_shape(policy.model, batch) == (68 - 6 - 11, 32)  # not the last tokens of prompts
        assert hidden_shape(scorer.model, batch) == (68 - 7 - 16, 32)
        monkeypatch.setattr(Prefixes, "of", None)  # looked for once


@pytest.mark.parametrize("family", BOTH)
def test_where_no_bit_depends_on_other_tokens(family):
    require_equal(Policy(build(family), exact=Exactness(4, 4, 16)), (2, 1), SHARED)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bloom"])
def test_a_scorer(family):
    require_equal(Scorer(build(family, scorer=True)), (1, 2), SHARED)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_adapters(family):
    policy = randomised(Policy(build(family), LoRASettings(rank=2)))
    require_equal(policy, (2, 1), SHARED)
    require_equal(randomised(Scorer(build(family, scorer=True), LoRASettings(rank=2))), (1, 2))


@pytest.mark.parametrize("family", BOTH)
def test_with_adapters_off_the_stages_are_the_model_before_them(family):
    policy: Any = randomised(Policy(build(family), LoRASettings(rank=2)))
    batch = TokenBatch.of(MIXED, CPU)
    with torch.no_grad():
        expected, adapted = Policy(build(family))(batch)[0], policy(batch)[0]
        received = None
        for part in stages(policy, (1, 2)):
            with part.without_adapter():
                received = first_of(part(batch, received=received))
    assert torch.equal(received, expected) and not torch.equal(expected, adapted)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_makes_the_same_inside_each_stage(family):
    policy = Policy(build(family)).train()
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    require_equal(policy, (1, 2))


@pytest.mark.parametrize("family", ["llama", "llama tied", "opt", "gpt2"])
def test_a_tied_table_is_on_the_first_and_the_last_stage(family):
    policy = Policy(build(family))
    is_tied = policy.model.config.tie_word_embeddings
    inputs = policy.model.get_input_embeddings().weight
    name = next(name for name, parameter in policy.model.named_parameters() if parameter is inputs)
    assert stages_of(policy.model, (1, 1, 1))[name] == ((0, 2) if is_tied else (0,))
    first, middle, last = (part.model for part in stages(policy, (1, 1, 1)))
    assert tied_table(middle) is None and name not in held_weights(middle)
    if is_tied:
        assert tied_table(first) is held_weights(first)[name] and tied_table(last) is held_weights(last)[name]
        assert last.get_output_embeddings().weight is tied_table(last)
    else:
        assert tied_table(first) is None and tied_table(last) is None and name not in held_weights(last)


def test_a_stage_holds_its_share_and_no_more():
    whole = build("opt-350m", layers=5)
    parts = stages(Policy(whole), (1, 3, 1))
    counts = [sum(p.numel() for p in part.model.parameters()) for part in parts]
    table = whole.get_input_embeddings().weight.numel()
    assert sum(counts) == sum(p.numel() for p in whole.parameters()) + table
    layer = sum(p.numel() for p in whole.model.decoder.layers[0].parameters())
    assert counts[1] == 3 * layer


class UsesEmbeddingsAgain(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        table, norm = self.model.embed_tokens, self.model.norm
        norm.register_forward_hook(lambda *given: given[-1] + table.weight.mean())


class HasWeightsOutside(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.scale = nn.Parameter(torch.ones(1))


class ScalesBetweenLayers(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1].register_forward_pre_hook(lambda _, given: (given[0] * 2, *given[1:]))


class RunsALayerTwice(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.layers[2] = self.model.layers[1]


class KeepsFp32(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].register_forward_hook(lambda *given: given[-1].float())


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (UsesEmbeddingsAgain, "weights are used before their layers and behind them"),
        (HasWeightsOutside, "some of their weights are in no layer"),
        (ScalesBetweenLayers, "something is done between their layers"),
        (RunsALayerTwice, "they do not call each layer once, in order"),
        (KeepsFp32, "another number format than the weights"),
    ],
)
def test_what_a_family_may_not_do(family, reason):
    with pytest.raises(UserError, match=f"Models of type 'llama' cannot be cut into pipeline stages .*{reason}"):
        require_stages(family(AutoConfig.for_model("llama", **GATED, num_hidden_layers=3)), 2)


def test_too_few_layers_and_families_that_cannot_be_cut_are_refused():
    with pytest.raises(UserError, match="A model of 3 layers cannot be cut into 4 pipeline stages: choose 3 or less"):
        require_stages(build("llama"), 4)
    with pytest.raises(UserError, match=r"Stages of \[1, 1\] layers do not make up a model of 3 layers"):
        keep_stage(build("llama"), StageCut(0, (1, 1)))
    with pytest.raises(UserError, match=r"Stages of \[3, 0\] layers do not"):
        stages_of(build("llama"), (3, 0))
    config = narrow_config("gemma3n_text")
    refused = r"of type 'gemma3n_text' cannot be cut into pipeline stages \(more passes .*\): use pipeline degree 1"
    for given in (config, meta_model(config)):
        with pytest.raises(UserError, match=refused):
            require_stages(given, 2)
        require_stages(given, 1)
