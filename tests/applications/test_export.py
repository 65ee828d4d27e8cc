"""Exported directories open in plain transformers and peft, and answer as the run's models do."""

import json

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from applications.export import export
from inference.chat_format import ChatFormat
from inference.errors import UserError
from inference.generation.engine import GenerationEngine
from inference.generation.sample import SamplingKey, SamplingSettings
from tests.tiny_runs import QUESTIONS, make_tiny_run, messages
from training.steps import PPO, SFT


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_tiny_run(tmp_path_factory.mktemp("export"), lora_rank=2)


def our_greedy_tokens(directory, dtype) -> list[list[int]]:
    """From our engine, with the run's own model."""
    chat_format = ChatFormat.load(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    engine = GenerationEngine(model, chat_format.end_ids, chat_format.pad_id)
    prompts = [torch.tensor(chat_format.prompt_ids(messages(text))) for text in QUESTIONS]
    samples = engine.generate(prompts, SamplingSettings(12, 0.0), SamplingKey(0))
    return [sample.response_ids for sample in sorted(samples, key=lambda sample: sample.index)]


def their_greedy_tokens(directory) -> list[list[int]]:
    """From transformers alone, with what was exported."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    found = []
    for text in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            messages(text), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**prompt, do_sample=False)  # its length comes from the generation config
        found.append(out[0, prompt["input_ids"].shape[1] :].tolist())
    return found


def front_matter(directory) -> dict:
    return yaml.safe_load((directory / "README.md").read_text().split("---\n")[1])


@pytest.mark.parametrize("step", [PPO, SFT])
def test_the_merged_model_generates_the_same_tokens_in_transformers(run, tmp_path, step):
    export(run.path, tmp_path / "out", "merged", "", step.command)
    assert their_greedy_tokens(tmp_path / "out") == our_greedy_tokens(run.step(step).model, torch.float32)
    assert front_matter(tmp_path / "out")["library_name"] == "transformers"
    values = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (values["temperature"], values["max_new_tokens"], values["do_sample"]) == (0.7, 12, True)


def test_another_number_format_is_in_the_files(run, tmp_path):
    export(run.path, tmp_path / "out", "merged", "bf16", "")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    original = AutoModelForCausalLM.from_pretrained(run.step(PPO).model)
    assert model.dtype == torch.bfloat16
    for ours, theirs in zip(original.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.to(torch.bfloat16), theirs)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


@pytest.mark.parametrize(("step", "rank"), [(SFT, 2), (PPO, 4)])
def test_the_adapter_on_the_base_model_is_the_merged_model(run, tmp_path, step, rank):
    """That of PPO lies on SFT's, so the two become one of twice the rank."""
    export(run.path, tmp_path / "out", "adapter", "", step.command)
    base = AutoModelForCausalLM.from_pretrained(run.path.parent / "base")
    adapted = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert adapted.peft_config["default"].r == rank
    ids = torch.tensor([ChatFormat.load(run.step(SFT).model).prompt_ids(messages(QUESTIONS[5]))])
    merged = AutoModelForCausalLM.from_pretrained(run.step(step).model).eval()
    plain = AutoModelForCausalLM.from_pretrained(run.path.parent / "base").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(plain(ids).logits, merged(ids).logits, atol=1e-3)
    assert front_matter(tmp_path / "out")["library_name"] == "peft"
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_card_tells_how_the_model_was_made_and_no_path(run, tmp_path):
    evaluation = {
        "prompts": 6,
        "sampling": {"temperature": 0.7, "max_tokens": 12},
        "sft": {"kl": 0.0, "length": 10.0},
        "rlhf": {"kl": 1.25, "length": 11.0},
        "win_rate": {"prompts": 6, "rate": 0.75, "low": 0.5, "high": 1.0, "judge": "learned reward"},
    }
    run.comparison_of(PPO)[0].write_text(json.dumps(evaluation))
    export(run.path, tmp_path / "mine", "merged", "", "rlhf")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "# mine\n" in card
    assert "| KL to SFT (nats a reply) | 0.00 | 1.25 |" in card and "RLHF beats SFT in 75.0 %" in card
    for line in (
        "| 1 supervised fine-tuning |",
        "4 optimiser steps, 16 rows, 1:05 |",
        "| 3 PPO |",
        "3 iterations, 1:05 |",
    ):
        assert line in card
    assert str(run.path.parent) not in card and "`base`" in card
    run.comparison_of(PPO)[0].unlink()


@pytest.mark.parametrize(
    ("what", "dtype", "step", "expected"),
    [
        ("weights", "", "", "--what takes merged, adapter"),
        ("merged", "int8", "", "--dtype takes fp32, bf16, fp16"),
        ("merged", "", "reward", "--step takes sft, rlhf"),
        ("adapter", "bf16", "", "--dtype is for"),
    ],
)
def test_what_cannot_be_exported_is_a_sentence(run, tmp_path, what, dtype, step, expected):
    with pytest.raises(UserError, match=expected):
        export(run.path, tmp_path / "out", what, dtype, step)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(run, tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="not empty"):
        export(run.path, tmp_path, "merged", "", "")
    assert (tmp_path / "thesis.txt").read_text() == "all of it"
    (tmp_path / "empty").mkdir()
    export(run.path, tmp_path / "empty", "merged", "", "")
    assert (tmp_path / "empty" / "README.md").exists()


def test_adapters_that_do_not_exist_or_fit_nothing_are_sentences(tmp_path):
    run = make_tiny_run(tmp_path)
    with pytest.raises(UserError, match="has no adapter"):
        export(run.path, tmp_path / "out", "adapter", "", "rlhf")
    run.step(PPO).adapter.mkdir()
    with pytest.raises(UserError, match="fits no model"):
        export(run.path, tmp_path / "out", "adapter", "", "rlhf")
    run.step(PPO).result_file.unlink()
    with pytest.raises(UserError, match=r"step3_rlhf of .* is not finished"):
        export(run.path, tmp_path / "out", "merged", "", "rlhf")
