"""One stage read from a model's files is the whole model's, cut; no other weights are looked at."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from inference.chat_format import ChatFormat
from inference.errors import UserError
from inference.families import VOCABULARY_SIZE, build_tiny_model
from tests.families import build, narrow_config
from tests.training.pipelines.test_stage_model import FAMILIES
from training.hybrid_engine.layout import StageCut
from training.models.loading import load_causal_lm, load_scorer
from training.models.policy import Policy, Scorer
from training.pipelines.stage_model import held_weights, stages_of
from training.role_settings import LoRASettings

READ = ("llama", "llama tied", "opt", "opt-350m", "gpt2", "gpt_neox")
LORA = LoRASettings(rank=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> ChatFormat:
    directory = tmp_path_factory.mktemp("tokenizer")
    build_tiny_model(directory)
    return ChatFormat.load(directory)


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    """Models of three layers, whose embeddings are those of the tokenizer, in several files each."""
    places = {}
    for family in READ:
        kind, values = FAMILIES[family]
        values = {**values, "vocab_size": VOCABULARY_SIZE}
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values, num_hidden_layers=3))
        places[family] = tmp_path_factory.mktemp("model")
        model.save_pretrained(places[family], max_shard_size="40KB")
        assert len(list(places[family].glob("*.safetensors"))) > 1
    return places


def made(load: Any, make: Any, cut: StageCut | None, lora: LoRASettings | None) -> Any:
    torch.manual_seed(11)
    return make(load(cut=cut), lora, cut=cut).model


def require_same(load: Any, make: Any, layers: tuple[int, ...], lora: LoRASettings | None = None) -> None:
    """Adapters and a fresh head are drawn after the weights are read."""
    whole = made(load, make, None, lora)
    weights, stages = dict(whole.named_parameters()), stages_of(whole, layers)
    for stage in range(len(layers)):
        held = held_weights(made(load, make, StageCut(stage, layers), lora))
        assert held.keys() == {name for name in weights if stage in stages[name]}
        assert all(value.device.type == "cpu" and torch.equal(value, weights[name]) for name, value in held.items())


@pytest.mark.parametrize("family", READ)
def test_a_language_model(directories, tokenizer, family):
    require_same(partial(load_causal_lm, directories[family], tokenizer, torch.bfloat16), Policy, (1, 1, 1))


@pytest.mark.parametrize("family", ["llama", "opt-350m", "gpt2"])
def test_a_scorer_with_a_fresh_head(directories, tokenizer, family):
    require_same(partial(load_scorer, directories[family], tokenizer, torch.float32), Scorer, (1, 2))


@pytest.mark.parametrize("make", [Policy, Scorer])
def test_adapters_are_those_that_the_whole_model_would_have(directories, tokenizer, make):
    load = load_causal_lm if make is Policy else load_scorer
    require_same(partial(load, directories["llama tied"], tokenizer, torch.bfloat16), make, (2, 1), LORA)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_the_first_layers_alone(directories, tokenizer, family):
    require_same(partial(load_scorer, directories[family], tokenizer, torch.float32, layers=2), Scorer, (1, 1))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_a_trained_scorer_and_files_without_the_names_of_heads(directories, tokenizer, family, tmp_path):
    scorer: Any = load_scorer(directories[family], tokenizer, torch.float32)
    scorer.save_pretrained(tmp_path)
    require_same(partial(load_scorer, tmp_path, tokenizer, torch.float32, trained=True), Scorer, (2, 1))
    scorer.base_model.save_pretrained(tmp_path / "bare")
    require_same(partial(load_scorer, tmp_path / "bare", tokenizer, torch.float32), Scorer, (2, 1))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_with_more_tokens_than_the_files_have(tokenizer, family, tmp_path):
    """New rows are made on the stages that have a table; what is drawn after them stays the same."""
    kind, values = FAMILIES[family]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values, num_hidden_layers=3)).save_pretrained(
        tmp_path
    )
    require_same(partial(load_causal_lm, tmp_path, tokenizer, torch.float32), Policy, (1, 1, 1), LORA)


def test_what_the_files_know_beside_parameters(tokenizer, tmp_path):
    """A mixture's router has a bias that is no parameter."""
    whole: Any = build(narrow_config("deepseek_v3", first_k_dense_replace=0))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    whole.get_buffer(name).uniform_(-1, 1)
    whole.save_pretrained(tmp_path)
    cut = StageCut(1, (1, 1))
    stage = Policy(load_causal_lm(tmp_path, tokenizer, torch.float32, cut=cut), cut=cut).model
    assert torch.equal(stage.get_buffer(name), whole.get_buffer(name))


def test_weights_of_other_stages_are_not_looked_at(directories, tokenizer, tmp_path):
    """Theirs have other shapes here, and one is missing."""
    model = AutoModelForCausalLM.from_pretrained(directories["llama"])
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in list(weights):
        if ".layers.1." in name:
            weights[name] = torch.zeros(3)
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    load = partial(load_causal_lm, tmp_path, tokenizer, torch.float32)
    layers = (1, 1, 1)
    held = held_weights(made(load, Policy, StageCut(0, layers), None))
    assert torch.equal(held["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])
    with pytest.raises(UserError, match=r"layers\.1\..* has the shape \(3,\)"):
        load(cut=StageCut(1, layers))
    with pytest.raises(UserError, match=r"missing \(model\.layers\.2\.mlp\.up_proj\.weight\)"):
        load(cut=StageCut(2, layers))


def test_weights_that_no_stage_has_a_place_for_are_refused_by_each(directories, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(directories["llama"])
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for stage in range(2):
        with pytest.raises(UserError, match=r"no place for \(model\.layers\.3\.mlp\.up_proj\.weight\)"):
            load_causal_lm(tmp_path, tokenizer, torch.float32, cut=StageCut(stage, (1, 2)))


def test_without_weights_a_stage_has_room_for_its_own(directories, tokenizer):
    load = partial(load_causal_lm, directories["opt"], tokenizer, torch.float32)
    cut = StageCut(1, (1, 2))
    read, empty = (held_weights(Policy(load(with_weights=w, cut=cut), LORA, cut=cut).model) for w in (True, False))
    shapes = [{name: (w.shape, w.device, w.requires_grad) for name, w in held.items()} for held in (read, empty)]
    assert shapes[0] == shapes[1]
    absent = load(with_weights=False, cut=cut).model.decoder.layers[0]
    assert all(weight.is_meta for weight in absent.parameters())
