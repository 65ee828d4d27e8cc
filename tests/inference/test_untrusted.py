"""Model directories that would run code, or load another model: refused, and nothing was run."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from inference.chat_format import ChatFormat
from inference.chat_model import ChatModel
from inference.errors import UserError
from inference.model_store import resolve_model
from training.models.loading import load_causal_lm, load_scorer


class Payload:
    """What unpickling runs: a directory appears."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.fixture
def model(tmp_path, tiny_model_directory):
    return shutil.copytree(tiny_model_directory, tmp_path / "model")


def loaders(chat_format):
    return (
        ChatModel.load,
        lambda directory: load_causal_lm(directory, chat_format, torch.float32),
        lambda directory: load_scorer(directory, chat_format, torch.float32),
    )


def test_a_pickle_that_runs_code_is_refused_and_was_not_run(model, tmp_path):
    chat_format = ChatFormat.load(model)
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save({**weights, "more": Payload(tmp_path / "trace")}, model / "pytorch_model.bin")
    for load in loaders(chat_format):
        with pytest.raises(UserError, match=r"a pickle that is damaged or holds more than tensors.*as safetensors"):
            load(model)
    assert not (tmp_path / "trace").exists()
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "trace").exists()  # the payload works where it is let


def test_a_pickle_of_tensors_alone_loads(model):
    """OPT is published so."""
    chat_format = ChatFormat.load(model)
    whole = load_causal_lm(model, chat_format, torch.float32)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    again = load_causal_lm(model, chat_format, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("known", [True, False])
def test_a_model_with_code_of_its_own_is_refused_and_the_code_was_not_run(model, tmp_path, known):
    chat_format = ChatFormat.load(model)
    code = f"import os\nos.mkdir({str(tmp_path / 'trace')!r})\n"
    (model / "modeling_own.py").write_text(code)
    values = json.loads((model / "config.json").read_text())
    values["auto_map"] = {name: f"modeling_own.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}
    (model / "config.json").write_text(json.dumps(values | ({} if known else {"model_type": "own"})))
    for load in (resolve_model_of, ChatFormat.load, *loaders(chat_format)):
        with pytest.raises(UserError, match=r"brings code of its own \(auto_map in config.json\), which is never run"):
            load(model)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("way", ["cycler.__init__.__globals__.os", "''.__class__.__mro__[1].__subclasses__()[0]"])
def test_a_chat_template_reaches_nothing(model, tmp_path, way):
    (model / "chat_template.jinja").write_text(f"{{{{ {way}.mkdir('{tmp_path / 'trace'}') }}}}{{{{ messages }}}}")
    with pytest.raises(UserError, match="template"):
        ChatFormat.load(model)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_that_lies_on_the_hub_is_refused(model, key):
    """transformers would fetch its code, and run it, where the package `kernels` is installed."""
    chat_format = ChatFormat.load(model)
    values = json.loads((model / "config.json").read_text())
    for said in ({key: "someone/kernel"}, {"text_config": {key: {"": "someone/kernel@main"}}}):
        (model / "config.json").write_text(json.dumps(values | said))
        for load in (resolve_model_of, ChatFormat.load, *loaders(chat_format)):
            with pytest.raises(UserError, match=rf"code of its own \({key} in config.json\), which is never run"):
                load(model)
    (model / "config.json").write_text(json.dumps(values | {key: "sdpa"}))
    resolve_model_of(model)


def resolve_model_of(directory):
    return resolve_model(str(directory), lambda line: None)


def test_a_tokenizer_with_code_of_its_own_is_refused(model, tmp_path):
    (model / "tokenization_own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'trace')!r})\n")
    values = json.loads((model / "tokenizer_config.json").read_text())
    values["auto_map"] = {"AutoTokenizer": ["tokenization_own.Own", None]}
    (model / "tokenizer_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"auto_map in tokenizer_config\.json"):
        ChatFormat.load(model)
    assert not (tmp_path / "trace").exists()


def test_an_adapter_does_not_load_the_model_that_it_names(model, tmp_path):
    chat_format = ChatFormat.load(model)
    torch.save({"more": Payload(tmp_path / "trace")}, model / "adapter_model.bin")
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    for load in (resolve_model_of, *loaders(chat_format)):
        with pytest.raises(UserError, match=r"holds an adapter .* merge it"):
            load(model)
    (model / "config.json").unlink()  # as PEFT writes it
    with pytest.raises(UserError, match=r"holds an adapter .* merge it"):
        resolve_model_of(model)
    assert not (tmp_path / "trace").exists()
