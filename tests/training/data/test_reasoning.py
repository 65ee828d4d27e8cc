"""Tasks of reasoning-gym as data and as rewards, by a stand-in for the package, and by itself where it is installed."""

import importlib.util
import sys
from types import ModuleType

import pytest

from inference.errors import UserError
from training.data import reasoning
from training.data.reading import read_source
from training.data.sources import parse_source
from training.data_settings import DataSettings
from training.reward_specs import RewardSpec


class Sums:
    """n + n, as reasoning-gym has its tasks."""

    def __init__(self, size: int = 500, seed: int | None = None, most: int = 9):
        if most < 1:
            raise AssertionError("most must be 1 or more\nand more")
        self.size, self.seed, self.most = size, seed, most

    def __len__(self):
        return self.size

    def __getitem__(self, number: int) -> dict:
        term = (self.seed + number) % self.most
        return {"question": f"{term} + {term} =", "answer": str(2 * term), "metadata": {"terms": (term, term)}}

    def score_answer(self, answer, entry):
        return 1.0 if int(answer) == sum(entry["metadata"]["terms"]) else 0.25


class Tuples(Sums):
    """Whose answers are no longer right once they were rows."""

    def score_answer(self, answer, entry):
        return float(isinstance(entry["metadata"]["terms"], tuple))


@pytest.fixture
def gym(monkeypatch):
    """The package, as far as it is asked."""
    package, factory, utils = (ModuleType(f"reasoning_gym{end}") for end in ("", ".factory", ".utils"))
    factory.DATASETS = {"sums": (Sums, None), "tuples": (Tuples, None)}
    package.create_dataset = lambda task, **settings: factory.DATASETS[task][0](**settings)
    package.get_score_answer_fn = lambda task: factory.DATASETS[task][0]().score_answer
    utils.extract_answer = lambda text: text.split("<answer>")[1].split("</answer>")[0] if "<answer>" in text else None
    for module in (package, factory, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    reasoning.scorer.cache_clear()
    yield package
    reasoning.scorer.cache_clear()


def rows_of(source: str, **settings) -> list:
    return read_source(parse_source(source), DataSettings(**settings), print).rows


def test_a_task_gives_prompts_with_what_its_scorer_asks_for(gym):
    rows = rows_of("reasoning:sums(size=3, most=4)")
    assert [row["prompt"][0]["content"] for row in rows] == ["0 + 0 =", "1 + 1 =", "2 + 2 ="]
    assert rows[1]["extra"] == {"answer": "2", "metadata": {"terms": [1, 1], "source_dataset": "sums"}}
    assert rows_of("reasoning:sums(size=3, seed=1)")[0]["extra"]["answer"] == "2"
    assert len(rows_of("reasoning:sums")) == 500 and len(rows_of("reasoning:sums", limit=7)) == 7


def test_a_weight_may_stand_behind_it():
    source = parse_source("reasoning:sums(size=3)=2")
    assert (source.name, source.weight, source.is_task) == ("reasoning:sums(size=3)", 2.0, True)
    assert parse_source("reasoning:sums=0.5").weight == 0.5 and not parse_source("a/b").is_task
    assert parse_source("reasoning:sums(at='a@b')").name == "reasoning:sums(at='a@b')"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("4", 1.0),
        (" 4\n", 1.0),
        ("5", 0.25),
        ("2 and 2 is <answer>4</answer>, I think", 1.0),
        ("four", 0.0),  # at which the scorer fails
    ],
)
def test_the_task_scores_what_is_between_tags_or_all(gym, response, expected):
    row = rows_of("reasoning:sums(size=3)")[2]["extra"]
    reward = RewardSpec.of("reasoning").named()
    assert reward.score(response, row) == expected
    assert reward.suits(row) and not reward.suits({"answer": "4"}) and not reward.suits({"metadata": "x"})


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("reasoning:summs", r"reasoning-gym has no task summs: did you mean 'sums'\?"),
        ("reasoning:", r"must be reasoning:TASK or reasoning:TASK\(KEY=VALUE, \.\.\.\)"),
        ("reasoning:sums(3)", "must be reasoning:TASK"),
        ("reasoning:sums(size=f())", "must be reasoning:TASK"),
        ("reasoning:sums(size=", "must be reasoning:TASK"),
        ("reasoning:sums(depth=3)", r"does not take these settings \(.*'depth'\)"),
        ("reasoning:sums(most=0)", r"does not take these settings \(most must be 1 or more\)"),
        ("reasoning:tuples", "cannot be written into rows; choose another task"),
    ],
)
def test_what_is_wrong_with_a_source_is_a_sentence(gym, source, sentence):
    with pytest.raises(UserError, match=sentence):
        rows_of(source)


def test_without_the_package_the_command_that_installs_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"need that package: pip install 'rlhf-chat\[reasoning\]' "):
        rows_of("reasoning:chain_sum")


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
def test_the_package_itself():
    rows = rows_of("reasoning:chain_sum(size=4, max_terms=2)")
    reasoning.scorer.cache_clear()
    for row in rows:
        assert reasoning.score(f"so <answer>{row['extra']['answer']}</answer>", row["extra"]) == 1.0
        assert reasoning.score("a fish", row["extra"]) < 0.1
    assert rows_of("reasoning:chain_sum(size=4, max_terms=2)") == rows
