"""Adapters on the tables of tokens: the saved model is the trained one, or the target is refused."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners import lora
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
)

from inference.errors import UserError
from training.checks import require_adapters
from training.config_files import load_config
from training.data.batching import TokenBatch
from training.models.adapters import AdaptedLinear, runs_as_products
from training.models.loading import save_model
from training.models.policy import Policy, Scorer, add_lora
from training.role_settings import LoRASettings

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
ENDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 1}
TABLES = {  # family: its configuration, and the name of its table of tokens
    "llama": (LlamaConfig(**SMALL, **ENDS, intermediate_size=48), "embed_tokens"),
    "opt": (OPTConfig(**SMALL, **ENDS, ffn_dim=48, word_embed_proj_dim=32), "embed_tokens"),
    "gpt2": (GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, **ENDS), "wte"),
    "gpt_neox": (GPTNeoXConfig(**SMALL, **ENDS, intermediate_size=48), "embed_in"),
    "bloom": (BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=4, **ENDS), "word_embeddings"),
    "phi": (PhiConfig(**SMALL, **ENDS, intermediate_size=48), "embed_tokens"),  # its head has a bias
}
ROWS = [(torch.arange(5, 12), torch.arange(20, 26)), (torch.arange(40, 43), torch.arange(60, 64))]
BATCH = TokenBatch.of(ROWS, torch.device("cpu"))
FORMAT: Any = SimpleNamespace(
    tokenizer=SimpleNamespace(bos_token_id=None),
    end_of_turn_id=2,
    end_ids=(2,),
    pad_id=1,
    save=lambda place, scored: None,
)


def make(config, tied: bool, loader=AutoModelForCausalLM):
    config = copy.deepcopy(config)
    config.tie_word_embeddings, config.num_labels = tied, 1
    torch.manual_seed(0)
    return loader.from_config(config).eval()


def trained_and_saved(directory, model, targets: list[str]):
    """What a policy or scorer with drawn adapters says, what the saved one says, and what the model said before."""
    scores = hasattr(model, "score")
    kind, loader = (Scorer, AutoModelForSequenceClassification) if scores else (Policy, AutoModelForCausalLM)
    lora, fresh, plain = LoRASettings(rank=4, targets=targets), copy.deepcopy(model), kind(copy.deepcopy(model))
    trained = kind(model, lora).eval()
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    weights = {name: p.detach().clone() for name, p in trained.model.named_parameters() if p.requires_grad}
    save_model(directory / "m", fresh, FORMAT, weights, lora, torch.float32)
    saved = kind(loader.from_pretrained(directory / "m").eval())
    with torch.no_grad():
        return [model(BATCH) if scores else model(BATCH)[0] for model in (trained, saved, plain)]


@pytest.mark.parametrize("family", TABLES)
@pytest.mark.parametrize("target", ["table", "head", "both"])
def test_untied_tables_are_saved_as_they_were_trained(tmp_path, family, target):
    config, table = TABLES[family]
    targets = {"table": [table], "head": ["lm_head"], "both": [table, "lm_head"]}[target]
    trained, saved, before = trained_and_saved(tmp_path, make(config, tied=False), targets)
    assert torch.allclose(trained, saved, atol=1e-4) and not torch.allclose(trained, before, atol=1e-2)


@pytest.mark.parametrize("family", TABLES)
def test_tied_tables_are_refused_by_name(family):
    config, table = TABLES[family]
    for targets in (["lm_head"], [table], [table, "lm_head"], rf".*({table}|lm_head)"):
        with pytest.raises(UserError, match=r"names \S+, whose weights are those of \S+ too, so that merging"):
            add_lora(make(config, tied=True), LoRASettings(rank=4, targets=targets))
    add_lora(make(config, tied=True), LoRASettings(rank=4))  # all-linear leaves both out


@pytest.mark.parametrize("family", TABLES)
def test_a_scorers_table_is_tied_to_nothing(tmp_path, family):
    config, table = TABLES[family]
    model = make(config, tied=True, loader=AutoModelForSequenceClassification)
    trained, saved, before = trained_and_saved(tmp_path, model, [table])
    assert torch.allclose(trained, saved, atol=1e-4) and not torch.allclose(trained, before, atol=1e-2)


@pytest.mark.parametrize(
    ("config", "target"),
    [
        (OPTConfig(**SMALL, **ENDS, ffn_dim=48), "embed_positions"),
        (Gemma2Config(**SMALL, **ENDS, intermediate_size=48, head_dim=8), "embed_tokens"),
    ],
)
def test_tables_that_a_family_computes_in_its_own_way_are_refused(config, target):
    """Gemma multiplies what it reads from its table, adapters do not."""
    with pytest.raises(UserError, match=rf"names model\..*{target}, an embedding that its family computes in a way"):
        add_lora(make(config, tied=False), LoRASettings(rank=4, targets=[target]))


def test_the_head_of_scores_gets_no_adapter():
    model = make(TABLES["llama"][0], tied=False, loader=AutoModelForSequenceClassification)
    with pytest.raises(UserError, match="names score, the head of scores, all of whose weights are trained anyway"):
        add_lora(model, LoRASettings(rank=4, targets=["q_proj", "score"]))


def test_tied_tables_are_refused_before_anything_trains(tmp_path):
    config = copy.deepcopy(TABLES["llama"][0])
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path)
    settings = ["model=any", "sft.optimizer.lora.rank=4", "sft.optimizer.lora.targets=[q_proj, lm_head]"]
    with pytest.raises(UserError, match=r"sft\.optimizer\.lora\.targets=.* names lm_head, whose weights are those of"):
        require_adapters(load_config([], settings), tmp_path, tmp_path)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_adapters_are_those_of_peft_and_so_are_their_gradients(family, dtype):
    def policy():
        trained = Policy(make(TABLES[family][0], tied=False), LoRASettings(rank=4, alpha=6)).to(dtype)
        torch.manual_seed(1)
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        return trained

    ours, of_peft = policy(), policy()
    layers = [module for module in ours.modules() if type(module) is AdaptedLinear]
    assert len(layers) == (7 if family == "llama" else 6)
    assert all(runs_as_products(layer, torch.empty(0, dtype=dtype)) for layer in layers)
    for module in of_peft.modules():
        if type(module) is AdaptedLinear:
            module.__class__ = lora.Linear
    found, expected = (model(BATCH)[0] for model in (ours, of_peft))
    assert torch.allclose(found, expected, atol=1e-5 if dtype == torch.float32 else 0.1)
    for logprobs in (found, expected):
        (logprobs * torch.arange(1.0, len(logprobs) + 1)).sum().backward()
    for (name, parameter), other in zip(ours.named_parameters(), of_peft.parameters(), strict=True):
        if parameter.requires_grad:
            size, error = float(other.grad.norm()), float((parameter.grad - other.grad).norm())
            assert size > 0, name
            assert error <= size * (1e-5 if dtype == torch.float32 else 0.2)  # in bf16 the model rounds so much
    with torch.no_grad(), ours.without_adapter(), of_peft.without_adapter():
        assert torch.equal(ours(BATCH)[0], of_peft(BATCH)[0])
