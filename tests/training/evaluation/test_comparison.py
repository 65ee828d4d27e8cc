"""Two models on held-out prompts; the expected values come from plain transformers, one row at a time."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from applications.report_table import table_rows
from inference.chat_format import ChatFormat
from inference.errors import UserError
from inference.generation.sampler import Sample
from inference.preferences import PreferenceFile
from tests.tiny_runs import QUESTIONS, messages
from tests.training.evaluation.preferences import preference
from training.config_files import validate_config
from training.data_settings import DataSettings
from training.evaluation.candidates import ModelAnswers, Request, RewardModel, find_pair, reading, same_tokens, sources
from training.evaluation.comparison import Comparison, accuracy_by_length, reward_accuracy, win_rate
from training.evaluation.statistics import share
from training.lineage import trained_elsewhere
from training.merging import merge
from training.run_directory import RunDirectory
from training.stage import Stage
from training.step2_reward.reward import RewardTask
from training.steps import PPO, REWARD, SFT


@pytest.fixture(scope="module")
def measured(finished, tmp_path_factory):
    """The run's own evaluation: result and answers."""
    from training.distributed import Ranks
    from training.stage import make_stage

    stage = make_stage(finished, PPO, finished.read_config(), Ranks(0, 1, torch.device("cpu")))
    stage.display.quiet = True
    for winner, other in (("other", "run/rlhf"), ("other", "run/rlhf"), ("one", "run/dpo")):
        PreferenceFile(finished.preferences).add(
            preference("ann", winner, one=("run/sft", "No."), other=(other, "Yes!"))
        )
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


def test_the_win_rate_by_preferences_is_that_of_the_two_models(measured, stage):
    result, _ = measured
    preferences = result["preferences"]
    assert (preferences["model"], preferences["against"]) == ("run/rlhf", "run/sft")
    assert (
        preferences["together"] == preferences["by"]["ann"] and preferences["together"]["preferences"] == 1
    )  # one pair, judged twice
    assert preferences["together"]["rate"] == 1.0
    assert Comparison(stage, Request("sft", "base")).preferences is None


def test_perplexity_of_the_demonstrations_is_that_of_plain_transformers(measured, finished):
    result, _ = measured
    chat_format = ChatFormat.load(finished.step(SFT).model)
    for key, step in (("sft", SFT), ("rlhf", PPO)):
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


def test_kl_is_the_mean_sum_of_logratios_at_the_sampling_temperature(measured, stage, finished):
    result, _ = measured
    comparison = Comparison(stage)
    with reading(stage, comparison.model.directory) as reader:
        ours = comparison.answer(reader, comparison.model)
    sums = []
    for sample in ours.samples[:4]:  # evaluation.rows
        rows = [
            plain_logprobs(finished.step(step).model, sample.prompt_ids.tolist(), sample.response_ids, 0.7)
            for step in (PPO, SFT)
        ]
        assert sample.logprobs == pytest.approx(rows[0].tolist(), abs=1e-4)  # it was drawn at that temperature
        sums.append(float((rows[0] - rows[1]).sum()))
    assert result["rlhf"]["kl"] == pytest.approx(sum(sums) / 4, rel=1e-3) and result["sft"]["kl"] == 0.0


def test_rewards_are_scaled_scores_at_the_last_token(stage, finished):
    comparison = Comparison(stage)
    with reading(stage, comparison.model.directory) as reader:
        ours = comparison.answer(reader, comparison.model)
    plain = AutoModelForSequenceClassification.from_pretrained(finished.step(REWARD).model).eval()
    expected = []
    for sample in ours.samples:
        ids = torch.cat([sample.prompt_ids, torch.tensor(sample.response_ids)])
        with torch.no_grad():
            hidden = plain.model(ids[None]).last_hidden_state[0, -1]
            expected.append((float(plain.score(hidden)) - 0.5) / 2.0)
    scores, _ = RewardModel(stage, finished.step(REWARD).model).scores_of_both(ours, ours)
    assert scores == pytest.approx(expected, abs=1e-5)


def plain_scores(directory, prompts, responses) -> list[float]:
    """One row at a time by plain transformers, less the shift, over the scale."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        with torch.no_grad():
            hidden = model.model(torch.tensor([prompt + response])).last_hidden_state[0, -1]
        found.append((float(model.score(hidden)) - 0.5) / 2.0)
    return found


def test_every_measure_is_of_the_models_own_answers(measured, stage, finished):
    result, rows = measured
    comparison = Comparison(stage)
    for candidate in (comparison.model, comparison.against):
        with reading(stage, candidate.directory) as reader:
            answers = comparison.answer(reader, candidate)
        assert [row[candidate.key] for row in rows] == answers.texts
        prompts, responses = zip(*((s.prompt_ids.tolist(), s.response_ids) for s in answers.samples), strict=True)
        scores = plain_scores(finished.step(REWARD).model, prompts, responses)
        assert [row[f"{candidate.key}_score"] for row in rows] == pytest.approx(scores, abs=1e-5)
        found = result[candidate.key]
        assert {name: found[name] for name in comparison.measure(answers)} == comparison.measure(answers)
        base = finished.path.parent / "base"
        read = [*zip(prompts, responses, strict=True)][:4]  # evaluation.rows
        logprobs = torch.cat([plain_logprobs(base, *ids) for ids in read])
        assert found["perplexity_untouched"] == pytest.approx(math.exp(-float(logprobs.mean())), rel=1e-4)


def test_measures_of_answers_by_hand(stage, finished):
    """The end token counts in the length; an empty answer is an answer."""
    chat_format = ChatFormat.load(finished.step(SFT).model)
    told = [
        ([7, 8, 9, chat_format.end_of_turn_id], "I am I am"),
        ([7] * 12, "I am"),
        ([chat_format.end_of_turn_id], ""),
    ]
    samples = [
        Sample(i, torch.tensor([5]), 12, ids, [], ended=ids[-1] == chat_format.end_of_turn_id)
        for i, (ids, _) in enumerate(told)
    ]
    found = Comparison(stage).measure(ModelAnswers(chat_format, [], samples, [text for _, text in told]))
    expected = {"length": 17 / 3, "ended_fraction": 2 / 3, "distinct_bigrams": 2 / 4, "most_frequent_share": 1 / 3}
    assert found == pytest.approx(expected)


def test_the_win_rate_of_unseen_questions_is_that_of_their_prompts(measured):
    result, rows = measured
    outcomes = [(row["rlhf_score"] > row["sft_score"]) + 0.5 * (row["rlhf_score"] == row["sft_score"]) for row in rows]
    found = result["win_rate_unseen_questions"]
    assert (found["prompts"], found["rate"]) == (2, sum(outcomes[:2]) / 2)
    assert sum(outcomes[:2]) / 2 != sum(outcomes[2:]) / 4  # the others'


def test_a_model_against_its_copy_is_a_tie_everywhere(stage, finished, tmp_path):
    """Also where prompts share questions: turns of one conversation, and one question under two system messages."""
    said = [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Why?"}]
    system = {"role": "system", "content": "Be kind."}
    prompts = [messages("Hello?"), messages("Hello? ") + said, [system, *messages("Hello?")], messages("Any plans?")]
    stage = with_rows(stage, "prompts", [{"prompt": prompt} for prompt in prompts], tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(finished.step(PPO).model, copy)
    result = Comparison(stage, Request("rlhf", str(copy))).run(tmp_path / "r.json", tmp_path / "a.jsonl")
    win = result["win_rate"]
    assert (win["prompts"], win["questions"], win["rate"]) == (4, 2, 0.5) and win["low"] < 0.5 < win["high"]
    assert result["rlhf"]["kl"] == pytest.approx(0, abs=1e-5)


def test_the_same_answer_has_the_same_score_whatever_it_shares_a_batch_with(stage, finished):
    model = RewardModel(stage, finished.step(REWARD).model)
    chat_format = model.chat_format
    rows = [
        (torch.tensor(chat_format.prompt_ids(messages(text))), torch.tensor(chat_format.response_ids(f"Well, {text}")))
        for text in QUESTIONS
    ]
    scores = model.scores([*rows, *rows[::-1]])
    assert scores[:6] == scores[6:][::-1] and len(set(scores)) == 6
    assert model.scores([]) == []


def test_a_judge_that_gives_no_number_is_refused(stage, finished, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(finished.step(REWARD).model, broken)
    weights = load_file(broken / "model.safetensors")
    save_file({**weights, "score.weight": weights["score.weight"] * math.nan}, broken / "model.safetensors")
    with pytest.raises(UserError, match="no finite numbers"):
        Comparison(stage, Request(judge=str(broken))).run(tmp_path / "r.json", tmp_path / "a.jsonl")


def with_rows(stage: Stage, kind: str, rows: list[dict], directory) -> Stage:
    """The run with other held-out rows of a kind."""
    run = RunDirectory(directory / "run")
    shutil.copytree(stage.run.path, run.path, symlinks=True)
    (run.data / f"{kind}_eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dataclasses.replace(stage, run=run)


def test_each_prompt_is_drawn_once(stage, tmp_path):
    rows = [{"prompt": messages(text)} for text in (*["Hello?"] * 5, "Why not?", "Hello?", "Any plans?")]
    comparison = Comparison(with_rows(stage, "prompts", rows, tmp_path), Request(prompts=3))
    assert [row["prompt"][0]["content"] for row in comparison.held_out] == ["Hello?", "Why not?", "Any plans?"]


def test_prompts_of_one_conversation_are_counted_as_alike():
    """Three prompts under one question, all won, and one under another, lost."""
    found = win_rate(([0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]), ["a", "a", "a", "b"], range(4))
    assert (found["prompts"], found["questions"], found["rate"]) == (4, 2, 0.75)
    assert (found["low"], found["high"]) == pytest.approx(share(0.75, 1, 16 / 10)[1:])  # worth 1.6 prompts


def make_pairs() -> list[dict]:
    rows = [
        {"prompt": messages(text), "chosen": f"Good day, {text}", "rejected": "No, I " * (i + 1)}
        for i, text in enumerate(QUESTIONS)
    ]
    long = "one two three four five six seven eight nine ten eleven twelve"
    rows[2] |= {"chosen": f"{long} yes", "rejected": f"{long} no"}  # the same in 12 tokens
    rows[4] |= {"held_out_question": True}
    rows[5] |= {"held_out_question": False}
    return rows


def test_accuracy_is_the_share_of_pairs_whose_chosen_answer_scores_higher(stage, finished):
    """Against plain transformers; pairs that are the same after the cut are left out, and it is said."""
    said, rows = [], make_pairs()
    stage.display.say = said.append
    found = reward_accuracy(RewardModel(stage, finished.step(REWARD).model), rows, stage.config.data)
    chat_format = ChatFormat.load(finished.step(REWARD).model)
    kept = [row for i, row in enumerate(rows) if i != 2]
    prompts = [chat_format.prompt_ids(row["prompt"], 48) for row in kept]
    scores = {
        side: plain_scores(
            finished.step(REWARD).model, prompts, [chat_format.response_ids(row[side], 12) for row in kept]
        )
        for side in ("chosen", "rejected")
    }
    right = [a > b for a, b in zip(scores["chosen"], scores["rejected"], strict=True)]
    assert 0 < sum(right) < 5 and 2 * sum(right) != 5  # turned round it would be another
    assert found["all"]["pairs"] == found["all"]["questions"] == 5
    assert found["all"]["rate"] == pytest.approx(sum(right) / 5)
    assert (found["unseen_questions"]["pairs"], found["unseen_questions"]["rate"]) == (1, float(right[3]))
    assert "1 of 6 pairs are left out" in said[0]


def test_the_evaluation_ranks_as_step_2_does(stage, finished):
    """The accuracies of evaluation.json and of step 2's result.json have one definition."""
    model, rows = RewardModel(stage, finished.step(REWARD).model), make_pairs()
    found = reward_accuracy(model, rows, stage.config.data)
    pairs = stage.token_pairs(rows, model.chat_format)
    step_2 = RewardTask(stage, model.scorer, [], pairs).evaluate()
    names = {"all": "eval/accuracy", "unseen_questions": "eval/accuracy_unseen_questions"}
    names |= {name: f"eval/accuracy_{name}" for name in found if name.startswith("up_to_")}
    assert {names[name]: each["rate"] for name, each in found.items()} == pytest.approx(
        {name: value for name, value in step_2.items() if name.startswith("eval/accuracy")}
    )
    assert step_2["eval/margin"] == pytest.approx(step_2["eval/chosen"] - step_2["eval/rejected"], abs=1e-6)


def test_pairs_that_are_all_the_same_have_no_accuracy(stage, finished):
    rows = [row | {"rejected": row["chosen"]} for row in make_pairs()]
    assert reward_accuracy(RewardModel(stage, finished.step(REWARD).model), rows, stage.config.data) == {}


def test_a_model_against_the_base_model_by_another_judge(stage, finished, tmp_path):
    request = Request(model="sft", against="base", judge=str(finished.step(REWARD).model), prompts=3)
    result = Comparison(stage, request).run(tmp_path / "r.json", tmp_path / "a.jsonl")
    assert result["pair"] == {"base": "base model", "sft": "SFT"} and result["prompts"] == 3
    assert result["win_rate"]["judge"] == "reward of model"
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert set(rows[0]) == {"prompt", "base", "sft", "base_score", "sft_score"}


def test_the_reward_function_is_loaded_only_to_judge(stage, finished, tmp_path):
    code = tmp_path / "mine.py"
    code.write_text("open(__file__ + '.ran', 'x')\ndef score(p, r): return [len(text) / 10 for text in r]\n")
    settings = dataclasses.replace(stage, config=stage.config.model_copy(deep=True))
    settings.config.rlhf.reward_function = f"{code}:score"
    comparison = Comparison(settings)
    assert comparison.judge.name == "learned reward" and not (tmp_path / "mine.py.ran").exists()
    settings.config.rlhf.reward_function = [f"{code}:score", "length:..1=0.5"]
    assert Comparison(settings, Request(judge="learned")).judge == comparison.judge
    settings.config.trained_reward_model, settings.config.rlhf.reward_weights.model = "", 0.0
    result = Comparison(settings, Request(judge="reward", prompts=3)).run(tmp_path / "r.json", tmp_path / "a.jsonl")
    assert result["win_rate"]["judge"] == "reward" and (tmp_path / "mine.py.ran").exists()
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    words = [0.5 * min(0, 1 - len(row["rlhf"].split())) for row in rows]
    assert [row["rlhf_score"] for row in rows] == [
        len(row["rlhf"]) / 10 + each for row, each in zip(rows, words, strict=True)
    ]
    assert result["rlhf"]["reward/length"] == pytest.approx(2 * sum(words) / 3)
    labels = [label for label, *_ in table_rows(result)]
    assert labels[labels.index("reward, all sources") + 1 :][:2] == ["reward length", "reward function"]


def test_a_run_or_a_directory_can_be_measured(stage, finished, tmp_path):
    request = Request(model=str(finished.path), against=str(finished.step(SFT).model), prompts=2)
    result = Comparison(stage, request).run(tmp_path / "r.json", tmp_path / "a.jsonl")
    assert result["pair"] == {"against": "run (SFT)", "model": "run (RLHF)"}


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
    places = {"BASE": str(finished.path.parent / "base"), "REWARD": str(finished.step(REWARD).model)}
    given = {name: places.get(value, value) for name, value in vars(request_).items()}
    with pytest.raises(UserError, match=expected):
        Comparison(stage, Request(**given))


def test_answers_are_read_by_their_text_where_tokens_differ(finished):
    ours = ChatFormat.load(finished.step(SFT).model)
    tokenizer = AutoTokenizer.from_pretrained(finished.step(SFT).model)
    tokenizer.chat_template = ours.tokenizer.chat_template.replace("Human: ", "Person: ")
    other = ChatFormat(tokenizer)
    assert same_tokens(ours, ChatFormat.load(finished.step(PPO).model)) and not same_tokens(ours, other)
    prompt = messages("Hello?")
    told = [("Good day", True), ("Good day", False)]
    samples = [
        Sample(i, torch.tensor(ours.prompt_ids(prompt)), 12, response_of(ours, text, ended), [], ended)
        for i, (text, ended) in enumerate(told)
    ]
    answers = ModelAnswers(ours, [prompt, prompt], samples, [text for text, _ in told])
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


def test_pairs_of_one_question_are_counted_as_alike():
    found = accuracy_by_length([True] * 4, [8] * 4, [False] * 4, ["a", "a", "a", "b"])["all"]
    assert (found["pairs"], found["questions"]) == (4, 2)
    assert (found["rate"], found["low"], found["high"]) == share(4, 4, 16 / 10)  # worth 1.6 pairs


# Models from elsewhere


def forked(stage: Stage, sft_model) -> Stage:
    """As a run that was begun with --sft-model alone."""
    values = {"model": str(sft_model), "sft_model": str(sft_model)}
    return dataclasses.replace(stage, config=stage.config.model_copy(update=values))


def test_a_fork_is_measured_under_the_base_of_the_run_before(stage, finished):
    fork = forked(stage, finished.step(SFT).model)
    assert Comparison(fork).untouched() == ("perplexity_untouched", finished.path.parent / "base")
    found = find_pair(fork, Request(against="base"))[1].directory
    assert found == finished.path.parent / "base"


def test_without_a_base_the_row_has_another_name(stage, finished, tmp_path):
    elsewhere = shutil.copytree(finished.step(SFT).model, tmp_path / "sft")
    fork = forked(stage, elsewhere)
    assert Comparison(fork).untouched() == ("perplexity_sft_model", elsewhere)
    with pytest.raises(
        UserError, match=r"The base model of .* is not known: the run began with .*sft, which lies in no"
    ):
        find_pair(fork, Request(against="base"))


def test_where_the_compared_models_and_the_judge_come_from_is_said(stage, finished, tmp_path):
    elsewhere = shutil.copytree(finished.step(SFT).model, tmp_path / "mine")
    judge = shutil.copytree(finished.step(REWARD).model, tmp_path / "judge")
    comparison = Comparison(stage, Request(model=str(elsewhere), against="base", judge=str(judge)))
    said = trained_elsewhere(stage.run, sources(stage, (comparison.against, comparison.model), comparison.judge))
    assert [sentence.partition(" was ")[0] for sentence in said] == [
        f"It is not known what {name}" for name in ("mine", "judge")
    ]
    own = Comparison(stage)
    assert trained_elsewhere(stage.run, sources(stage, (own.against, own.model), own.judge)) == []


def test_a_round_is_measured_against_the_one_before_by_the_rewards_of_both(stage, finished, tmp_path):
    run = RunDirectory(shutil.copytree(finished.path, tmp_path / "next"))
    values = {"sft_model": str(finished.step(PPO).model), "data": {"parent": str(finished.path)}}
    settings = merge(finished.read_config().model_dump(mode="json"), values)
    run.write_config(validate_config(settings), {})
    torch.manual_seed(5)
    head = run.step(REWARD).model / "model.safetensors"
    weights = load_file(head)
    save_file(weights | {"score.weight": -weights["score.weight"]}, head, {"format": "pt"})  # it wants the opposite
    later = dataclasses.replace(stage, run=run, config=run.read_config())
    policy = run.step(PPO).model / "model.safetensors"
    weights = {name: each + 0.05 * torch.randn(each.shape) for name, each in load_file(policy).items()}
    save_file(weights, policy, {"format": "pt"})

    result = Comparison(later).run(tmp_path / "result.json", tmp_path / "answers.jsonl")
    assert result["pair"] == {"sft": "run (RLHF)", "rlhf": "RLHF"}
    ours, before = result["win_rate"], result["win_rate_before"]
    assert (ours["judge"], before["judge"]) == ("learned reward", "reward of run")
    assert before["rate"] == pytest.approx(1 - ours["rate"]) and before["rate"] != 0.5
    both = result["rlhf"]["reward_before"] + result["rlhf"]["learned_reward"]
    assert both == pytest.approx(-0.5)  # twice the shift, by the scale

    shutil.rmtree(run.step(REWARD).path)
    direct = Comparison(later).run(tmp_path / "direct.json", tmp_path / "direct.jsonl")
    assert direct["win_rate"]["judge"] == "reward of run" and "win_rate_before" not in direct
    assert direct["win_rate"]["rate"] == before["rate"] and "judge_accuracy" in direct


def test_given_rows_take_the_place_of_those_that_the_run_holds_out(finished, tmp_path):
    from training.distributed import Ranks
    from training.stage import make_stage

    given = tmp_path / "given.jsonl"
    rows = [{"prompt": f"{n} apples?", "chosen": "Yes, please.", "rejected": "No."} for n in ("Two", "Three", "No")]
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = finished.data / "prompts_train.jsonl"
    trained.write_text(json.dumps({"prompt": messages("two apples")}) + "\n")
    stage = make_stage(finished, PPO, finished.read_config(), Ranks(0, 1, torch.device("cpu")))
    stage.display.quiet = True
    try:
        comparison = Comparison(stage, Request(eval_data=(str(given),)))
        result = comparison.run(tmp_path / "result.json", tmp_path / "answers.jsonl")
    finally:
        trained.unlink()
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert sorted(row["prompt"][0]["content"] for row in answers) == ["No apples?", "Three apples?", "Two apples?"]
    assert result["reward_accuracy"]["all"]["pairs"] == 3
    assert {row["response"] for row in comparison.demonstrations} == {"Yes, please."}
    assert result["trained_elsewhere"] == [
        f"Of the 3 prompts that were given, 1 have a question that {finished.path} trained on."
    ]
