"""A response may end with another token than the one that training teaches: who reads which."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from inference.chat_format import ChatFormat
from inference.generation.sampler import Sample
from tests.inference.templates import FAMILIES, bytes_tokenizer
from training.calls import rlhf_calls
from training.data_settings import DataSettings
from training.evaluation.candidates import ModelAnswers
from training.step3_rlhf.experience import Experience, total_score
from training.step3_rlhf.rollout import Rollouts

PROMPT = torch.tensor([65, 66])
TAUGHT, OTHER = 258, 256  # <|im_end|>, <|endoftext|>


@pytest.fixture(scope="module")
def chat_format() -> ChatFormat:
    made = ChatFormat(bytes_tokenizer(FAMILIES["chatml"]))
    assert made.end_ids == (TAUGHT, OTHER)
    return made


def samples() -> list[Sample]:
    """Ended as taught, ended otherwise, not ended."""
    ended = [([70, TAUGHT], True), ([71, 72, OTHER], True), ([73, 74], False)]
    return [Sample(i, PROMPT, 8, ids, [-1.0] * len(ids), done) for i, (ids, done) in enumerate(ended)]


def test_the_reward_model_reads_the_end_that_it_was_taught_and_the_others_what_was_drawn(chat_format):
    read = {}

    def score(role, batches):
        (batch,) = batches
        read[role] = batch.ids.tolist()
        return [torch.zeros(3 if role == "reward" else 7)]

    rollouts: Any = SimpleNamespace(
        stage=SimpleNamespace(
            ranks=SimpleNamespace(device=torch.device("cpu")),
            config=SimpleNamespace(rlhf=SimpleNamespace(has_reward_model=True)),
        ),
        chat_format=chat_format,
        scoring=[call for call in rlhf_calls(with_critic=True) if call.kind == "score"],
        roles=SimpleNamespace(score=score),
    )
    rollouts.as_taught = lambda rows: Rollouts.as_taught(rollouts, rows)
    rollouts.read = lambda rows, is_taught: Rollouts.read(rollouts, rows, is_taught)
    rows = Rollouts.begin_scoring(rollouts, [Experience.of(sample) for sample in samples()])()
    drawn = [65, 66, 70, TAUGHT, 65, 66, 71, 72, OTHER, 65, 66, 73, 74]
    assert read["reference"] == read["critic"] == drawn
    assert read["reward"] == [TAUGHT if token == OTHER else token for token in drawn]
    assert [e.response.tolist() for e in rows] == [[70, TAUGHT], [71, 72, OTHER], [73, 74]]


def test_evaluation_scores_as_training_does(chat_format):
    answers = ModelAnswers(chat_format, [[]] * 3, samples(), ["", "", ""])
    drawn = [ids.tolist() for _, ids in answers.rows(chat_format, DataSettings())]
    scored = [ids.tolist() for _, ids in answers.rows(chat_format, DataSettings(), to_score=True)]
    assert drawn == [[70, TAUGHT], [71, 72, OTHER], [73, 74]]
    assert scored == [[70, TAUGHT], [71, 72, TAUGHT], [73, 74]]


def test_whatever_ended_a_response_it_is_not_punished_for_not_ending():
    settings: Any = SimpleNamespace(score_clip=0, missing_end_penalty=1.0)
    rows = [Experience.of(sample) for sample in samples()]
    assert [total_score(row, settings) for row in rows] == [0.0, 0.0, -1.0]
