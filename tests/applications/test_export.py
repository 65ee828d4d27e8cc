"""Exported directories open in plain transformers and peft, and answer as the run's models do."""

import ast
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from applications import model_card as cards
from applications.export import export
from applications.model_card import Exported, model_card, preferences_line, trained_elsewhere
from applications.prefer import find_model
from inference.chat_format import ChatFormat
from inference.errors import UserError
from inference.generation.engine import GenerationEngine
from inference.generation.sampler import SamplingKey, SamplingSettings
from inference.preferences import PreferenceFile
from tests.families import build, narrow_config
from tests.inference.templates import FAMILIES, Family, bytes_tokenizer
from tests.older_transformers import raw_scores
from tests.plain_reader import scores
from tests.tiny_runs import QUESTIONS, make_tiny_run, messages, shaken_weights
from tests.training.evaluation.preferences import preference
from training.config import RunConfig
from training.evaluation.candidates import find_candidate
from training.hybrid_engine.fragments import Fragment, write_fragments
from training.role_settings import LoRASettings
from training.run_directory import RunDirectory
from training.steps import PPO, REWARD, SFT


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


def test_a_checkpoint_is_a_model_too_with_its_adapter_and_a_card_that_claims_no_more(run, tmp_path):
    sft = run.step(SFT).model
    trained = shaken_weights(sft, ChatFormat.load(sft), LoRASettings(rank=2, alpha=4), 7)
    sizes = {name: each.numel() for name, each in trained.items()}
    parts = [Fragment(f"model.{name}", size, 0, size, at, 0) for at, (name, size) in enumerate(sizes.items())]
    for number in (7, 8):
        checkpoint = run.step(PPO).checkpoints / str(number)
        write_fragments(checkpoint / "actor" / "0.safetensors", parts, {"weight": list(trained.values())}, {})
        (checkpoint / "state.json").write_text("{}")
    (checkpoint / "actor" / "0.safetensors").write_bytes(b"12345678")
    named = Path(f"{run.path}@7")
    export(named, tmp_path / "whole", "merged", "", "")
    export(named, tmp_path / "adapter", "adapter", "", "")
    plain = AutoModelForCausalLM.from_pretrained(run.path.parent / "base")
    ids = torch.tensor([ChatFormat.load(sft).prompt_ids(messages(QUESTIONS[5]))])
    with torch.no_grad():
        ours, theirs, end = (
            AutoModelForCausalLM.from_pretrained(directory).eval()(ids).logits
            for directory in (run.step(PPO).checkpoints / "7" / "model", tmp_path / "whole", run.step(PPO).model)
        )
        adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(ids).logits
    assert torch.equal(ours, theirs) and not torch.allclose(ours, end, atol=1e-3)
    torch.testing.assert_close(adapted, ours, rtol=1e-4, atol=1e-5)
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "It is that after iteration 7, no end of training, and was not measured." in card
    assert find_model(run.path, str(named), False).label == "run/rlhf@7"
    assert find_candidate(SimpleNamespace(model_directory=Path), str(named), "model").name == "run (RLHF@7)"
    for wrong, sentence in (
        ("@9", r"run has no checkpoint 9 of step3_rlhf; there are: .*run@7, .*run@8\.$"),
        ("/step1_sft@7", r"no checkpoint 7 of step1_sft; there are: .*run@7"),
        ("/step2_reward@7", "is a checkpoint of a reward model"),
        ("@8", "The checkpoint .*8 is damaged"),
    ):
        with pytest.raises(UserError, match=sentence):
            export(Path(f"{run.path}{wrong}"), tmp_path / "no", "merged", "", "")
    with pytest.raises(UserError, match="leave --step out"):
        export(named, tmp_path / "no", "merged", "", "sft")
    shutil.rmtree(run.step(PPO).checkpoints)


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
        "win_rate": {"prompts": 6, "rate": 0.75, "low": 0.51, "high": 1.0, "judge": "learned reward"},
    }
    run.comparison_of(PPO)[0].write_text(json.dumps(evaluation))
    PreferenceFile(run.preferences).add(
        preference("Ada L.", "other", one=("run/sft", "No."), other=("run/rlhf", "Yes!"))
    )
    export(run.path, tmp_path / "mine", "merged", "", "rlhf")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "run/rlhf wins against run/sft in 100.0% of prompts by 1 preference of 1 person" in card
    assert "Ada" not in card
    assert card.startswith("---\nlibrary_name: transformers\n") and "# mine\n" in card
    assert (
        "| KL to SFT (nats a reply) | 0.00 | 1.25 |" in card
        and "RLHF beats SFT in 75.0% of prompts" in card
        and "Out of bounds" not in card
    )
    for line in (
        "| 1 supervised fine-tuning |",
        "4 optimiser steps, 16 rows, 1:05 |",
        "| 3 PPO |",
        "3 iterations, 1:05 |",
    ):
        assert line in card
    assert str(run.path.parent) not in card and "`base`" in card
    run.comparison_of(PPO)[0].unlink()
    run.preferences.unlink()


def test_a_damaged_file_of_preferences_costs_the_card_one_line(run, capsys):
    run.preferences.write_text("{}\n")
    try:
        assert preferences_line(run, PPO) == "" and "no file of preferences (line 1: " in capsys.readouterr().err
    finally:
        run.preferences.unlink()


def test_the_card_names_other_runs_without_their_paths(run):
    said = "Of what is held out here, 2 prompts were trained on in {} (step 1)."
    config = RunConfig(model="tiny", sft_model=str(run.step(SFT).model))
    assert trained_elsewhere(config, {"trained_elsewhere": [said.format(run.path)]}) == [said.format(run.path.name)]
    assert "{% for sentence in trained_elsewhere %}" in Path(cards.__file__).with_suffix(".md.jinja").read_text()


@pytest.mark.parametrize(
    ("what", "dtype", "step", "expected"),
    [
        ("weights", "", "", "--what takes merged, adapter"),
        ("merged", "int8", "", "--dtype takes fp32, bf16, fp16"),
        ("merged", "", "ppo", "--step takes sft, reward, rlhf, dpo"),
        ("adapter", "", "reward", "exported whole"),
        ("adapter", "bf16", "", "--dtype is for"),
    ],
)
def test_what_cannot_be_exported_is_a_sentence(run, tmp_path, what, dtype, step, expected):
    with pytest.raises(UserError, match=expected):
        export(run.path, tmp_path / "out", what, dtype, step)
    assert not (tmp_path / "out").exists()


def test_the_reward_model_scores_the_same_in_transformers(run, tmp_path):
    export(run.path, tmp_path / "out", "merged", "bf16", "reward")
    weights = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype="auto")
    assert weights.dtype == torch.bfloat16
    dialogues = [[*messages(text), {"role": "assistant", "content": "Lovely."}] for text in QUESTIONS]
    shutil.rmtree(tmp_path / "out")
    export(run.path, tmp_path / "out", "merged", "", "reward")
    trained = raw_scores(run.step(REWARD).model, dialogues)
    assert max(trained) - min(trained) > 0.1
    found = scores(tmp_path / "out", dialogues)
    assert found.keys() == {"alone", "right", "left", "as saved", "pipeline"}
    for how, values in found.items():
        assert values == pytest.approx(trained, abs=1e-4), how


def test_what_an_older_version_saved_is_exported_as_today(run, tmp_path):
    """Of the reward model: the template of its base, no type of problem."""
    old = tmp_path / "old"
    shutil.copytree(run.path, old)
    model = RunDirectory(old).step(REWARD).model
    values = json.loads((model / "config.json").read_text())
    del values["problem_type"]
    (model / "config.json").write_text(json.dumps(values))
    (model / "chat_template.jinja").write_text(ChatFormat.load(run.step(SFT).model).tokenizer.chat_template)
    export(old, tmp_path / "out", "merged", "", "reward")
    for name in ("chat_template.jinja", "config.json"):
        assert (tmp_path / "out" / name).read_text() == (run.step(REWARD).model / name).read_text()


@pytest.mark.parametrize(("what", "step"), [("merged", "sft"), ("adapter", "rlhf"), ("merged", "reward")])
def test_the_code_of_the_card_runs(run, tmp_path, monkeypatch, capsys, what, step):
    export(run.path, tmp_path / "mine", what, "", step)
    card = (tmp_path / "mine" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {})  # by a reader's hand
    said = capsys.readouterr().out.strip()
    assert said
    if step == "reward":
        dialogue = [*messages(QUESTIONS[1]), {"role": "assistant", "content": "Lovely, thank you!"}]
        (raw,) = raw_scores(run.step(REWARD).model, [dialogue])
        assert float(said) == pytest.approx((raw - 0.5) / 2.0, abs=1e-4)
        assert front_matter(tmp_path / "mine")["pipeline_tag"] == "text-classification"
        assert "The reward model of a run" in card and "| 2 reward model |" in card and "KL to SFT" not in card
    assert "transformers 4.57 and later" in card


def test_the_card_writes_messages_as_the_template_reads_them(run, tmp_path, monkeypatch):
    copy = RunDirectory(shutil.copytree(run.path, tmp_path / "run"))
    (copy.step(PPO).model / "chat_template.jinja").write_text(FAMILIES["parts"].template)
    export(copy.path, tmp_path / "mine", "merged", "", "")
    code = (tmp_path / "mine" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    assert '[{"type": "text", "text": "How was your day?"}]' in code
    exec(code, {})


def test_an_adapter_on_a_base_whose_embeddings_grew(tmp_path):
    """One is added to GPT-2 to pad with; the adapter holds no embeddings, and names its base by a full path."""

    def build_base(directory):
        build(narrow_config("gpt2", vocab_size=257)).save_pretrained(directory)
        bytes_tokenizer(Family("", ("</s>",), "</s>")).save_pretrained(directory)

    run = make_tiny_run(tmp_path, 2, build_base)
    for number, name in ((SFT, "sft"), (PPO, "rlhf")):
        settings = json.loads((run.step(number).adapter / "adapter_config.json").read_text())
        assert Path(settings["base_model_name_or_path"]).is_absolute()
        export(run.path, tmp_path / name, "adapter", "", name)
        tokens = AutoTokenizer.from_pretrained(tmp_path / name)("How was your day?", return_tensors="pt")
        adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / name).eval()
        merged = AutoModelForCausalLM.from_pretrained(run.step(number).model).eval()
        with torch.no_grad():
            theirs, ours = adapted(**tokens).logits, merged(**tokens).logits
        assert theirs.shape == ours.shape
        torch.testing.assert_close(theirs[..., :257], ours[..., :257], rtol=1e-4, atol=1e-4)
    card = (tmp_path / "sft" / "README.md").read_text()
    assert "transformers 4.57 and later" in card and "4.57" not in change_base(run, tmp_path)


def change_base(run, tmp_path) -> str:
    """The card of an adapter on a base that only transformers 5 reads."""
    values = json.loads((tmp_path / "base" / "config.json").read_text())
    values["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "default"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(values))
    export(run.path, tmp_path / "again", "adapter", "", "sft")
    return (tmp_path / "again" / "README.md").read_text()


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


def test_names_of_others_are_text_in_the_card(run, tmp_path):
    """Not HTML, not Markdown, not another line of the card or of its YAML."""
    rude = '<script>alert(1)<b>[x](javascript:y)|`"*\n# Mine\n---\x1b[2J\u202e'
    evaluation = {
        "prompts": 6,
        "sampling": {"temperature": 0.7, "max_tokens": 12},
        "pair": {"sft": rude, "rlhf": rude},
        "sft": {"kl": 0.0},
        "rlhf": {"kl": 1.25},
        "win_rate": {"prompts": 6, "rate": 0.5, "low": 0.1, "high": 0.9, "judge": rude},
    }
    config = run.read_config()
    config.data.source = f"{tmp_path}/{rude}.jsonl"
    file, made = run.comparison_of(PPO)[0], run.config_file.read_text()
    file.write_text(json.dumps(evaluation))
    run.config_file.write_text(yaml.safe_dump({**yaml.safe_load(made), "versions": {rude: rude, "transformers": rude}}))
    exported = Exported(rude, run.step(PPO), "merged", "fp32", "")
    card = model_card(run, config.model_copy(update={"model": f"{tmp_path}/{rude}"}), exported, run.step(PPO).model)
    file.unlink()
    run.config_file.write_text(made)
    text, code = card.split("```")[0::2], card.split("```")[1]
    assert card.count("```") == 2 and card.count("# Mine") > 8 and not any(mark in card for mark in "\x1b\u202e")
    assert "\n# Mine" not in card and "\n---" not in card.replace("\n---\n", "", 1).replace("|---", "")
    for mark in ("<script", "<b>", "[x]", "|`", "`*"):
        assert not any(mark in part for part in text), mark
    strings = [
        node.value for node in ast.walk(ast.parse(code.removeprefix("python"))) if isinstance(node, ast.Constant)
    ]
    assert rude in strings
