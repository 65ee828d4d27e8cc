"""What stands in the small files of a saved model, for transformers 4 and for 5 (`make older` asks 4 itself)."""

import json

import pytest
from transformers import AutoConfig, AutoTokenizer

from inference.chat_format import ChatFormat
from inference.weights import has_old_names, old_names, rewrite_config
from tests.families import narrow_config
from tests.inference.templates import FAMILIES as TEMPLATES
from tests.inference.templates import bytes_tokenizer

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("kind", "rope", "expected"),
    [
        ("llama", {"rope_theta": 5e5, "rope_type": "default"}, {"rope_theta": 5e5}),
        ("llama", {"rope_theta": 5e5, **LLAMA3}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        (
            "phi3",
            {"rope_theta": 1e4, "rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "factor": 4.0},
            {"rope_theta": 1e4, "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        ),
        ("phi", {"rope_theta": 1e4, "partial_rotary_factor": 0.4}, {"rope_theta": 1e4, "partial_rotary_factor": 0.4}),
        ("gpt_neox", {"rope_theta": 2e4, "partial_rotary_factor": 0.5}, {"rotary_emb_base": 2e4, "rotary_pct": 0.5}),
        (
            "gemma3_text",
            {
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 1e4},
            },
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
    ],
)
def test_the_old_names_of_rotary_positions(kind, rope, expected):
    values = {"model_type": kind, "rope_parameters": rope, "hidden_size": 64}
    assert old_names(values) == values | expected
    whole = old_names({"model_type": "vision", "text_config": values, "_name_or_path": "/home/me/base"})
    assert whole == {"model_type": "vision", "text_config": values | expected}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt_neox", "phi"])
def test_this_version_reads_the_same_beside_old_names(tmp_path, kind):
    """With a base that is no default, and a scaled rope."""
    config = narrow_config(kind, rope_parameters={"rope_theta": 54321.0, "rope_type": "linear", "factor": 2.0})
    config.save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert not has_old_names(tmp_path)
    rewrite_config(tmp_path)
    assert has_old_names(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == before


def test_a_saved_tokenizer_is_one_of_both_versions(tmp_path):
    tokenizer = bytes_tokenizer(TEMPLATES["chatml"], additional_special_tokens=["<|tool|>"])
    tokenizer.save_pretrained(tmp_path / "base")
    chat_format = ChatFormat.load(tmp_path / "base")
    chat_format.save(tmp_path / "saved")
    values = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert values["additional_special_tokens"] == ["<|tool|>"]
    assert values["model_input_names"] == ["input_ids", "attention_mask"]
    assert values.keys().isdisjoint(["extra_special_tokens", "is_local", "local_files_only"])
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "Use <|tool|> and ünïcode<|im_end|>"
    assert again.encode(text) == chat_format.tokenizer.encode(text)
    assert again.all_special_ids == chat_format.tokenizer.all_special_ids
