"""Step 1 of ten families, through the door of preparation: nested, mixtures of experts, sinks, recurrent, padded."""

import random
import re
from pathlib import Path

import pytest
import torch

from inference.chat_format import ChatFormat
from inference.chat_model import ChatModel
from inference.families import build_tiny_model
from inference.weights import quiet_transformers
from tests.families import build, narrow_config
from tests.supervised_steps import make_run, metrics_of, prompt, result_of, settings_of, stage_of, text
from training.config_files import load_config
from training.preparation.prepare import prepare_models
from training.run_directory import RunDirectory
from training.step1_sft import sft
from training.steps import SFT

LORA = "sft.optimizer.lora.rank=4"
FAMILIES = {
    "bloom": "sft.optimizer.zero_stage=3",
    "deepseek_v3": "sft.optimizer.zero_stage=0",
    "falcon": LORA,
    "gemma3": "sft.optimizer.zero_stage=2",
    "gemma4": "sft.optimizer.zero_stage=0",
    "gpt_oss": "sft.optimizer.zero_stage=3",
    "hrm_text": "sft.optimizer.zero_stage=1",
    "llama4": LORA,
    "mixtral": "sft.optimizer.gradient_checkpointing=true",
    "mpt": "sft.optimizer.zero_stage=2",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> ChatFormat:
    directory = tmp_path_factory.mktemp("families") / "tiny"
    build_tiny_model(directory)
    return ChatFormat.load(directory)


def mean_loss(model, rows: list[dict], chat_format: ChatFormat) -> float:
    """Nats a response token by plain transformers, a row at a time."""
    losses = []
    for row in rows:
        ids = chat_format.prompt_ids(row["prompt"], 24)
        response = chat_format.response_ids(row["response"], 12)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + response]), use_cache=False).logits[0, len(ids) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits.float(), torch.tensor(response), reduction="none").tolist()
    return sum(losses) / len(losses)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_learns_and_its_saved_model_is_the_trained_one(family, tokenizer, tmp_path, one_rank):
    source: Path = tmp_path / "model"
    begun = build(narrow_config(family))
    with quiet_transformers():
        begun.save_pretrained(source)
    tokenizer.save(source)
    draw = random.Random(1)
    rows = [{"prompt": prompt(draw), "response": text(draw, 6)} for _ in range(8)]
    settings = [
        f"model={source}",
        *settings_of("sft"),
        "sft.optimizer.learning_rate=3e-3",
        "sft.optimizer.weight_decay=0.1",
        FAMILIES[family],
        "method=dpo",
    ]
    prepare_models(load_config([], settings), RunDirectory(tmp_path), 1, print)
    run = make_run(tmp_path / "run", "sft", rows, rows[:3])
    sft.train(stage_of(run, SFT, settings, one_rank))

    _, evaluations = metrics_of(run, SFT)
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"]
    saved = ChatModel.load(run.step(SFT).model).model
    assert mean_loss(saved, rows[:3], tokenizer) == pytest.approx(result_of(run, SFT)["eval/loss"], rel=1e-4)
    for name, weight in begun.named_parameters():
        if re.search("vision|multi_modal", name):  # weight decay alone would change them
            assert torch.equal(saved.get_parameter(name), weight), name
