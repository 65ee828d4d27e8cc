"""Model directories that git or another tool left unusable: pointers of Git LFS, quantised weights, other formats."""

import json
import shutil

import pytest

from inference.chat_format import ChatFormat
from inference.chat_model import ChatModel
from inference.errors import UserError
from inference.model_store import check_model_directory

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


@pytest.fixture
def model(tmp_path, tiny_model_directory):
    return shutil.copytree(tiny_model_directory, tmp_path / "model")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer.model"])
def test_a_pointer_of_git_lfs_is_named(model, name):
    (model / name).write_text(POINTER)
    for refuse in (check_model_directory, ChatFormat.load, ChatModel.load):
        with pytest.raises(UserError, match=rf"^{name} of {model} is a pointer of Git LFS, .* git lfs pull"):
            refuse(model)


@pytest.mark.parametrize(
    ("where", "values"),
    [
        ("", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        ("", {"quantization_config": {"quant_method": "awq"}}),
        ("", {"quantization_config": {"load_in_4bit": True}}),
        ("", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}),
        ("", {"compression_config": {"quant_method": "compressed-tensors"}}),
        ("text_config", {"quantization_config": {"quant_method": "bitsandbytes"}}),
    ],
)
def test_quantised_weights_are_refused_by_name(model, where, values):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **({where: values} if where else values)}))
    key, method = next((key, how.get("quant_method", "")) for key, how in values.items())
    for refuse in (check_model_directory, ChatFormat.load, ChatModel.load):
        with pytest.raises(UserError, match=rf"^{model} has quantised weights \({key} in its config.json.*{method}\)"):
            refuse(model)


def test_a_setting_that_is_empty_says_nothing(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    check_model_directory(model)


@pytest.mark.parametrize("name", ["model-q4.gguf", "consolidated.safetensors", "tf_model.h5"])
def test_weights_of_another_format_are_named(model, name):
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(UserError, match=rf"has no weights .*, only {name}, which is not read here; "):
        check_model_directory(model)


@pytest.mark.parametrize("part", ["../other/model.safetensors", "/etc/weights.safetensors", "below/model.safetensors"])
def test_parts_of_weights_that_lie_elsewhere(model, part):
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": part}})
    )
    for refuse in (check_model_directory, ChatFormat.load, ChatModel.load):
        with pytest.raises(UserError, match=rf"names {part}, which does not lie beside it"):
            refuse(model)
