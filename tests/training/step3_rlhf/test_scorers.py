"""What reward model and critic start as: one that has learned has its head in its files."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from inference.chat_format import ChatFormat
from inference.errors import UserError
from inference.families import build_tiny_model
from training.config_files import load_config
from training.distributed import Ranks
from training.models.loading import load_scorer
from training.step3_rlhf import roles

RANKS = Ranks(0, 1, torch.device("cpu"))
WITHOUT_MODEL = ("rlhf.reward_url=http://127.0.0.1:9", "rlhf.reward_weights.model=0")


def stage_with(*settings: str) -> Any:
    return SimpleNamespace(config=load_config([], ["model=tiny", *settings]), dtype=torch.float32, ranks=RANKS)


def load_critic(stage: Any, scorer: Path, chat_format: ChatFormat) -> Any:
    return roles.load_critic(stage, scorer, chat_format, torch.float32, True)


def load_reward(stage: Any, scorer: Path, chat_format: ChatFormat) -> Any:
    return roles.load_reward(stage, scorer, chat_format, True)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    build_tiny_model(directory := tmp_path_factory.mktemp("language_model"))
    return directory


@pytest.mark.parametrize("load", [load_reward, load_critic])
def test_a_language_model_is_neither_reward_model_nor_its_critic(language_model, load):
    with pytest.raises(UserError, match="is no trained reward model"):
        load(stage_with(), language_model, ChatFormat.load(language_model))


def test_a_critic_without_a_reward_model_begins_with_a_fresh_head_and_as_many_layers(language_model):
    chat_format = ChatFormat.load(language_model)
    critic = load_critic(stage_with(*WITHOUT_MODEL, "reward.layers=1"), language_model, chat_format)
    assert critic.model.config.num_hidden_layers == 1
    with pytest.raises(UserError, match="is no trained reward model"):
        named = stage_with(*WITHOUT_MODEL, f"trained_reward_model={language_model}")
        load_critic(named, language_model, chat_format)


def test_both_have_the_head_of_the_files(language_model, tmp_path):
    chat_format = ChatFormat.load(language_model)
    model = load_scorer(language_model, chat_format, torch.float32)
    model.save_pretrained(tmp_path)
    for load in (load_reward, load_critic):
        assert torch.equal(load(stage_with(), tmp_path, chat_format).score_head.weight, model.score.weight)
