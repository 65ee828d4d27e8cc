"""Two models on held-out prompts; the expected values come from plain transformers, one row at a time."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from inference.chat_format import ChatFormat
from inference.errors import UserError
from tests.tiny_runs import QUESTIONS, messages
from training.evaluation.answers import Answers, same_tokens
from training.evaluation.candidates import Request
from training.evaluation.comparison import Comparison
from training.evaluation.ranking import accuracy_by_length


@pytest.fixture(scope="module")
def measured(finished, tmp_path_factory):
    """The run's own evaluation: result and answers."""
    from training.distributed import Ranks
    from training.stage import make_stage

    stage = make_stage(finished, 3, finished.read_config(), Ranks(0, 1, torch.device("cpu")))
    stage.display.quiet = True
    out = tmp_path_factory.mktemp("out")
    result = Comparison(stage).run(out / "result.json", out / "answers.jsonl")
    assert json.loads((out / "result.json").read_text()) == result
    return result, [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


def plain_logprobs(directory, prompt_ids: list[int], response_ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + response_ids])).logits[0] / temperature
    places = torch.arange(len(prompt_ids) - 1, len(prompt_ids) + len(response_ids) - 1)
    return logits.log_softmax(-1)[places, torch.tensor(response_ids)]


def response_of(chat_format: ChatFormat, text: str, ended: bool) -> list[int]:
    ids = chat_format.response_ids(text)
    return ids if ended else ids[:-1]


def test_the_runs_own_pair_is_rlhf_against_sft(measured):
    result, answers = measured
    assert result["pair"] == {"sft": "SFT", "rlhf": "RLHF"} and result["prompts"] == len(answers) == 6
    assert [row["prompt"] for row in answers] == [messages(text) for text in QUESTIONS]
    assert result["win_rate"]["judge"] == "learned reward"  # no true score is known


def test_the_win_rate_is_that_of_the_scores_beside_the_answers(measured):
    result, answers = measured
    outcomes = [
        (row["rlhf_score"] > row["sft_score"]) + 0.5 * (row["rlhf_score"] == row["sft_score"]) for row in answers
    ]
    assert result["win_rate"]["rate"] == pytest.approx(sum(outcomes) / 6)
    for key in ("sft", "rlhf"):
        mean = sum(row[f"{key}_score"] for row in answers) / 6
        assert result[key]["learned_reward"] == pytest.approx(mean)


def test_perplexity_of_the_demonstrations_is_that_of_plain_transformers(measured, finished):
    result, _ = measured
    chat_format = ChatFormat.load(finished.step(1).model)
    for key, step in (("sft", 1), ("rlhf", 3)):
        found = torch.cat(
            [
                plain_logprobs(
                    finished.step(step).model,
                    chat_format.prompt_ids(messages(text), 48),
                    chat_format.response_ids(f"I say {text.lower()}", 12),
                )
                for text in QUESTIONS[:4]  # evaluation.rows
            ]
        )
        expected = math.exp(-float(found.mean()))
        assert result[key]["perplexity_demonstrations"] == pytest.approx(expected, rel=1e-4)


def test_kl_is_the_mean_sum_of_logratios_at_the_sampling_temperature(stage, finished):
    comparison = Comparison(stage)
    from training.evaluation.scoring import reading

    with reading(stage, comparison.model.directory) as reader:
        ours = comparison.answer(reader, comparison.model)
    sums = []
    for sample in ours.samples:
        rows = [
            plain_logprobs(finished.step(step).model, sample.prompt_ids.tolist(), sample.response_ids, 0.7)
            for step in (3, 1)
        ]
        sums.append(float((rows[0] - rows[1]).sum()))
    result = comparison.run(finished.path / "again.json", finished.path / "again.jsonl")
    assert result["rlhf"]["kl"] == pytest.approx(sum(sums) / 6, rel=1e-3) and result["sft"]["kl"] == 0.0


def test_rewards_are_scaled_scores_at_the_last_token(stage, finished):
    comparison = Comparison(stage)
    from training.evaluation.scoring import RewardModel, reading

    with reading(stage, comparison.model.directory) as reader:
        ours = comparison.answer(reader, comparison.model)
    plain = AutoModelForSequenceClassification.from_pretrained(finished.step(2).model).eval()
    expected = []
    for sample in ours.samples:
        ids = torch.cat([sample.prompt_ids, torch.tensor(sample.response_ids)])
        with torch.no_grad():
            hidden = plain.model(ids[None]).last_hidden_state[0, -1]
            expected.append((float(plain.score(hidden)) - 0.5) / 2.0)
    assert RewardModel(stage, finished.step(2).model).scores_of(ours) == pytest.approx(expected, abs=1e-5)


def test_a_model_against_the_base_model_by_another_judge(stage, finished, tmp_path):
    request = Request(model="sft", against="base", judge=str(finished.step(2).model), prompts=3)
    result = Comparison(stage, request).run(tmp_path / "r.json", tmp_path / "a.jsonl")
    assert result["pair"] == {"base": "base model", "sft": "SFT"} and result["prompts"] == 3
    assert result["win_rate"]["judge"] == "reward of model"
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert set(rows[0]) == {"prompt", "base", "sft", "base_score", "sft_score"}


def test_a_run_or_a_directory_can_be_measured(stage, finished, tmp_path):
    request = Request(model=str(finished.path), against=str(finished.step(1).model), prompts=2)
    result = Comparison(stage, request).run(tmp_path / "r.json", tmp_path / "a.jsonl")
    assert result["pair"] == {"against": "model", "model": "run (RLHF)"}


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Request(model="sft", against="sft"), "the same model"),
        (Request(judge="true"), "no true score"),
        (Request(judge="BASE"), "is no trained reward model"),
        (Request(model="REWARD"), "is a reward model"),
    ],
)
def test_what_cannot_be_compared_is_a_sentence(stage, finished, request_, expected):
    places = {"BASE": str(finished.path.parent / "base"), "REWARD": str(finished.step(2).model)}
    given = {name: places.get(value, value) for name, value in vars(request_).items()}
    with pytest.raises(UserError, match=expected):
        Comparison(stage, Request(**given))


def test_answers_are_read_by_their_text_where_tokens_differ(finished):
    ours = ChatFormat.load(finished.step(1).model)
    tokenizer = AutoTokenizer.from_pretrained(finished.step(1).model)
    tokenizer.chat_template = ours.tokenizer.chat_template.replace("Human: ", "Person: ")
    other = ChatFormat(tokenizer)
    assert same_tokens(ours, ChatFormat.load(finished.step(3).model)) and not same_tokens(ours, other)
    from inference.generation.sample import Sample
    from training.config import DataSettings

    prompt = messages("Hello?")
    told = [("Good day", True), ("Good day", False)]
    samples = [
        Sample(i, torch.tensor(ours.prompt_ids(prompt)), 12, response_of(ours, text, ended), [], ended)
        for i, (text, ended) in enumerate(told)
    ]
    answers = Answers(ours, [prompt, prompt], samples, [text for text, _ in told])
    rows = answers.rows(other, DataSettings())
    assert [row[1].tolist()[-1] == other.end_of_turn_id for row in rows] == [True, False]
    assert "Person: Hello?" in tokenizer.decode(rows[0][0])
    assert [row[0].tolist() for row in answers.rows(ours, DataSettings())] == [s.prompt_ids.tolist() for s in samples]


def test_accuracy_falls_into_the_bucket_of_the_longer_answer():
    found = accuracy_by_length([True, False, True, True], [8, 9, 16, 1000], [False, True, False, False])
    counts = {name: (each["pairs"], each["rate"]) for name, each in found.items()}
    assert counts == {
        "all": (4, 0.75),
        "up_to_8_tokens": (1, 1.0),
        "up_to_16_tokens": (2, 0.5),
        "up_to_256_tokens": (1, 1.0),  # the last bucket holds all longer ones
        "unseen_questions": (1, 0.0),
    }
