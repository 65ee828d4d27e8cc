"""The door for scorers: a trained one has its head in the files, under its name; other weights are a sentence."""

import json
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    GPTNeoConfig,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from inference.chat_format import ChatFormat
from inference.chat_model import ChatModel
from inference.errors import UserError
from inference.families import build_tiny_model, require_supported_family, text_config
from inference.weights import read_weights
from training.models.loading import load_causal_lm, load_scorer, require_causal_lm, require_scorer
from training.models.policy import keep_layers

SMALL = {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    """A language model whose head is not tied, with a tokenizer."""
    directory = tmp_path_factory.mktemp("language_model")
    build_tiny_model(directory)
    (directory / "model.safetensors").unlink()
    config = Qwen3Config(**SMALL, num_hidden_layers=3, num_key_value_heads=2, tie_word_embeddings=False)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def reward_model(language_model, tmp_path_factory) -> Path:
    """The same as a scorer, its head all 0.25."""
    directory = shutil.copytree(language_model, tmp_path_factory.mktemp("reward_model") / "m")
    scorer = load_scorer(language_model, ChatFormat.load(language_model), torch.float32)
    torch.nn.init.constant_(scorer.score.weight, 0.25)
    scorer.save_pretrained(directory)
    return directory


def changed(directory: Path, place: Path, change) -> Path:
    """A copy whose weights `change` has changed."""
    shutil.copytree(directory, place)
    weights = load_file(place / "model.safetensors")
    change(weights)
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    return place


def renamed(new: str, weights) -> None:
    weights[new] = weights.pop("score.weight")


def of_two_layers(weights) -> None:
    renamed("score.2.weight", weights)
    weights["score.0.weight"] = torch.eye(16)


def with_value_head(weights) -> None:
    """As TRL leaves it on a language model."""
    weights["v_head.summary.weight"], weights["v_head.summary.bias"] = torch.ones(1, 16), torch.zeros(1)


def without_language_head(weights) -> None:
    """A bare backbone: its names have no `model.`."""
    del weights["lm_head.weight"]
    for key in list(weights):
        weights[key.removeprefix("model.")] = weights.pop(key)


HEADS = ["v_head.weight", "value_head.weight", "reward_head.weight", "regression_head.weight", "classifier.weight"]


@pytest.mark.parametrize("head", HEADS)
def test_a_head_under_another_name_is_named_and_no_other_is_drawn(reward_model, tmp_path, head):
    place = changed(reward_model, tmp_path / "m", partial(renamed, head))
    sentence = rf"mine is no trained reward model: .* no score head \(score\.weight\), but {head}\. "
    with pytest.raises(UserError, match=sentence):
        require_scorer(place, "mine", trained=True)
    with pytest.raises(UserError, match=f"no place for \\({head}\\)"):  # nor does step 2 begin with it
        require_scorer(place)


@pytest.mark.parametrize("change", [lambda weights: None, with_value_head, without_language_head])
def test_what_was_never_trained_to_score_is_no_reward_model(language_model, tmp_path, change):
    place = changed(language_model, tmp_path / "m", change)
    for refuse in (require_scorer, partial(load_scorer, chat_format=ChatFormat.load(place), dtype=torch.float32)):
        with pytest.raises(UserError, match=r"is no trained reward model: .*train one with rlhf-chat reward"):
            refuse(place, trained=True)


def test_a_scorer_may_begin_as_a_language_model_a_backbone_or_a_scorer(language_model, reward_model, tmp_path):
    backbone = changed(language_model, tmp_path / "backbone", without_language_head)
    for place in (language_model, backbone, reward_model):
        require_scorer(place)
        scorer = load_scorer(place, ChatFormat.load(place), torch.float32)
        assert torch.equal(
            scorer.model.norm.weight, load_file(language_model / "model.safetensors")["model.norm.weight"]
        )
    assert bool((scorer.score.weight == 0.25).all())


def test_a_trained_head_is_that_of_the_files(reward_model):
    require_scorer(reward_model, trained=True)
    scorer = load_scorer(reward_model, ChatFormat.load(reward_model), torch.float32, trained=True)
    assert bool((scorer.score.weight == 0.25).all())


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("labels", [2, 5])
def test_several_labels_are_no_score(reward_model, tmp_path, labels, trained):
    place = changed(
        reward_model, tmp_path / "m", lambda weights: weights.update({"score.weight": torch.ones(labels, 16)})
    )
    with pytest.raises(UserError, match=f"mine is a classifier of {labels} labels, and a reward model has one"):
        require_scorer(place, "mine", trained=trained)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (of_two_layers, r"no score head \(score\.weight\), but score\.0\.weight, score\.2\.weight"),
        (lambda weights: weights.update({"score.bias": torch.full((1,), 100.0)}), r"no place for \(score\.bias\)"),
        (lambda weights: weights.pop("model.norm.weight"), r"missing \(model\.norm\.weight\)"),
        (lambda weights: weights.update({"score.weight": torch.ones(16)}), r"score\.weight has the shape \(16,\), not"),
    ],
)
def test_a_trained_scorer_with_other_weights_is_refused(reward_model, tmp_path, change, expected):
    place = changed(reward_model, tmp_path / "m", change)
    for refuse in (require_scorer, partial(load_scorer, chat_format=ChatFormat.load(place), dtype=torch.float32)):
        with pytest.raises(UserError, match=expected):
            refuse(place, trained=True)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (with_value_head, r"no place for \(v_head\.summary\.bias, v_head\.summary\.weight\)"),
        (lambda weights: weights.update({"model.layers.0.mlp.up_proj.bias": torch.ones(32)}), r"up_proj\.bias"),
        (lambda weights: weights.update({"model.layers.3.mlp.up_proj.weight": torch.ones(32, 16)}), r"layers\.3\."),
        (lambda weights: weights.pop("model.layers.2.mlp.up_proj.weight"), r"missing \(model\.layers\.2\.mlp\.up_proj"),
        (lambda weights: weights.pop("lm_head.weight"), r"missing \(lm_head\.weight\)"),
        (
            lambda weights: weights.update({"lm_head.weight": torch.ones(7, 16)}),
            r"shape \(7, 16\), not \(512, 16\)",
        ),
    ],
)
def test_a_language_model_with_other_weights_is_refused_everywhere(language_model, tmp_path, change, expected):
    place = changed(language_model, tmp_path / "m", change)
    load = partial(load_causal_lm, chat_format=ChatFormat.load(place), dtype=torch.float32)
    for refuse in (require_causal_lm, load, ChatModel.load):
        with pytest.raises(UserError, match=expected):
            refuse(place)


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_should_be_the_embeddings_is_refused_where_it_differs(language_model, tmp_path, equal):
    """One rank alone would load it untied, as transformers does; those that read no weights would tie it."""

    def change(weights) -> None:
        if equal:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    place = changed(language_model, tmp_path / "m", change)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    load = partial(load_causal_lm, chat_format=ChatFormat.load(place), dtype=torch.float32)
    refused = pytest.raises(UserError, match=r'lm_head\.weight .* differ: .*embeddings": false')
    for refuse in (require_causal_lm, load):
        with nullcontext() if equal else refused:
            refuse(place)


def test_a_reason_of_several_lines_is_told_whole(language_model, tmp_path):
    place = changed(language_model, tmp_path / "m", lambda weights: None)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(UserError, match=r"\(2\) must be equal to the number of `layer_types` \(3\)") as raised:
        require_causal_lm(place)
    assert "\n" not in str(raised.value)


def test_buffers_of_older_versions_are_no_weights(language_model, tmp_path):
    old = {f"model.layers.0.self_attn.{name}": torch.ones(1) for name in ("rotary_emb.inv_freq", "attn.masked_bias")}
    require_causal_lm(changed(language_model, tmp_path / "m", lambda weights: weights.update(old)))


def test_the_check_reads_no_weights(language_model):
    """So preparation can afford it for any size."""

    model, _ = read_weights(AutoModelForCausalLM, language_model, device_map="meta")
    assert isinstance(model.lm_head.weight, torch.Tensor) and model.lm_head.weight.is_meta


# The first layers alone


@pytest.mark.parametrize("layers", [1, 2])
def test_the_first_layers_of_a_family_with_a_list_of_layers_are_saved_and_load_again(language_model, tmp_path, layers):
    chat_format = ChatFormat.load(language_model)
    require_scorer(language_model, layers=layers)
    scorer = load_scorer(language_model, chat_format, torch.float32, layers)
    scorer.save_pretrained(tmp_path)
    again = load_scorer(tmp_path, chat_format, torch.float32, trained=True)
    assert len(again.model.layers) == again.config.num_hidden_layers == len(again.config.layer_types) == layers
    ids = torch.arange(9)[None]
    assert torch.equal(again.model(ids).last_hidden_state, scorer.model(ids).last_hidden_state)


def test_more_layers_than_there_are():
    with pytest.raises(UserError, match=r"reward\.layers=4: the model has 3 layers"):
        keep_layers(Qwen3Config(num_hidden_layers=3), 4)


def test_lists_that_hold_nothing_for_a_layer_stay():
    config = Qwen3Config(num_hidden_layers=2, eos_token_id=[7, 8])
    keep_layers(config, 1)
    assert config.eos_token_id == [7, 8] and len(config.layer_types) == 1


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_kinds_of_layers_stay_with_their_layers(layers):
    neo = GPTNeoConfig(num_layers=4, attention_types=[[["global", "local"], 2]])
    kinds = ["full_attention", "sliding_attention"] * 2
    gemma = Gemma3Config(text_config={"num_hidden_layers": 4, "layer_types": kinds})
    keep_layers(neo, layers)
    keep_layers(gemma, layers)
    assert GPTNeoConfig(**neo.to_dict()).attention_layers == (["global", "local"] * 2)[:layers]
    assert gemma.text_config.layer_types == kinds[:layers]


def test_every_family_is_cut_to_what_it_can_save(tmp_path):
    cut = 0
    for kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.keys() & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys():
        config = AutoConfig.for_model(kind)
        try:
            require_supported_family(config)
        except UserError:
            continue
        keep_layers(config, 2)
        config.save_pretrained(tmp_path)
        again = text_config(AutoConfig.from_pretrained(tmp_path))
        assert again.num_hidden_layers == 2 and len(getattr(again, "layer_types", None) or "ab") == 2, kind
        cut += 1
    assert cut > 50
