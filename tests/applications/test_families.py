"""The dry run of every causal family: it ends well, or with one sentence."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from applications.dry_run import dry_run
from applications.fit import GIB, Machine, find_shape
from inference.errors import UserError
from inference.families import meta_model, require_supported_family
from tests.families import FAMILIES, UNBUILDABLE, narrow_config
from training.config_files import load_config
from training.steps import PPO, REWARD, SFT

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
LISTED = set(re.findall(r"[\w-]+", PAGE.partition("## Run")[2].partition("## Refused")[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dry_run_of_a_family_ends_well_or_with_a_sentence(family, tmp_path, monkeypatch):
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: Machine(cores=2, memory=24 * GIB)))
    if family == "gemma4_assistant":
        pytest.skip(UNBUILDABLE[family])  # not even a configuration
    config = narrow_config(family)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    settings = load_config([], [f"model={tmp_path}", "method=dpo"])
    try:
        text = dry_run(settings, [SFT], tmp_path / "run")
    except UserError as refused:
        assert "\n" not in str(refused) and family not in LISTED
        return
    assert family in LISTED and "Verdict: fits" in text
    # as many weights as the model that is opened then
    weights = {id(weight): weight.numel() for weight in meta_model(config).parameters()}
    shape = find_shape(str(tmp_path), None)
    assert shape is not None and shape.parameters == sum(weights.values())
    heads = shape.heads // shape.kv_heads
    assert shape.layers >= 2 and heads * shape.kv_heads == shape.heads and shape.head_dim * shape.hidden > 0


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt_neo"])
def test_fewer_layers_of_a_nested_or_listed_configuration(family, tmp_path):
    config = narrow_config(family)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    whole, cut = (find_shape(str(tmp_path), None, layers) for layers in (0, 1))
    assert (whole.layers, cut.layers) == (2, 1) and cut.parameters < whole.parameters


def test_a_reward_model_needs_a_head_in_the_dry_run_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(narrow_config("codegen").to_dict()))
    with pytest.raises(UserError, match="type 'codegen' cannot be reward models"):
        dry_run(load_config([], [f"model={tmp_path}"]), [SFT, REWARD, PPO], tmp_path / "run")


def test_what_is_no_language_model_is_refused():
    for family in ("t5", "vit", "clip"):
        with pytest.raises(UserError, match=f"type '{family}' are no causal language models"):
            require_supported_family(AutoConfig.for_model(family))
