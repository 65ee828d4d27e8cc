"""`rlhf-chat prefer`: whose answers, who judges, where preferences go, and what is refused."""

import io
import json
import shutil
import sys

import pytest

from applications import prefer
from applications.prefer import find_model, prefer_command
from inference.errors import UserError
from inference.preferences import PreferenceFile
from tests.conftest import rlhf_chat
from tests.tiny_runs import make_tiny_run, messages
from training.run_directory import RunDirectory
from training.steps import PPO, SFT


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("prefer")


@pytest.fixture(scope="module")
def whole_run(place) -> RunDirectory:
    run = make_tiny_run(place, has_reward=False)
    rows = [{"prompt": messages(text)} for text in ("A tree?", "A tree?", "A lake?")]
    (run.data / "prompts_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.fixture
def run(whole_run) -> RunDirectory:
    whole_run.preferences.unlink(missing_ok=True)
    return whole_run


def typing(monkeypatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def ask(run, monkeypatch, text: str, target=None, **given) -> list:
    typing(monkeypatch, text)
    usual = dict(name="ann", again=None, model="", against="", temperature=None, max_tokens=None, to=None)
    prefer_command(target or run.path, **{**usual, **given})
    return PreferenceFile(given.get("to") or run.preferences).read()


def test_the_command_from_a_pipe_to_the_next_round(run):
    done = rlhf_chat("prefer", run.path, "--as", "ann", cwd=run.path, stdin="Hi\n1\n\n2\n\n=\n")
    assert done.code == 0, done.err
    first, second, third = PreferenceFile(run.preferences).read()
    assert [each.prompt for each in (first, second, third)] == [messages(t) for t in ("Hi", "A tree?", "A lake?")]
    assert {first.model_a, first.model_b} == {"run/rlhf"} and (first.temperature, first.max_tokens) == (0.7, 12)
    assert done.out.startswith(f"1: {first.response_a}\n2: ") and done.out.count("user: ") == 2
    assert f"Collected 3 preferences of ann; {run.preferences} has 3 preferences, 2 for one of two answers." in done.err
    assert f"The next round: rlhf-chat run --from {run.path} --go-on\n" in done.err
    done = rlhf_chat("prefer", run.path, "--as", "ben", "--again", "ann", cwd=run.path, stdin="1\n1\n=\n")
    assert done.code == 0, done.err
    assert "3 pairs to judge again" in done.err and "ann and ben agree on " in done.err


def test_two_models_are_named_in_the_file_and_nowhere_else(run, monkeypatch, capsys):
    (preference,) = ask(run, monkeypatch, "Hi\n1\n", against="sft", max_tokens=3)
    assert {preference.model_a, preference.model_b} == {"run/rlhf", "run/sft"}
    assert "sft" not in capsys.readouterr().out


def test_models_by_their_words(run, place):
    found = {
        word: find_model(run.path, word, False) for word in ("", "sft", "base", str(place / "base"), str(run.path))
    }
    assert {word: each.label for word, each in found.items()} == {
        "": "run/rlhf",
        "sft": "run/sft",
        "base": "run/base",
        str(place / "base"): "base",
        str(run.path): "run/rlhf",
    }
    assert found[""].directory == run.step(PPO).model and found["sft"].directory == run.step(SFT).model
    assert found["base"].directory == place / "base"


def test_a_model_directory_says_where_its_preferences_go(run, place, monkeypatch):
    with pytest.raises(UserError, match="is no run: say where the preferences go, with --to FILE"):
        ask(run, monkeypatch, "", target=place / "base")
    (preference,) = ask(run, monkeypatch, "Hi\n2\n", target=place / "base", to=place / "mine.jsonl", max_tokens=3)
    assert {preference.model_a, preference.model_b} == {"base"}
    namesake = shutil.copytree(place / "base", place / "other" / "base")
    with pytest.raises(UserError, match="base and base cannot be told apart: give another one with --against"):
        ask(run, monkeypatch, "", target=place / "base", against=str(namesake), to=place / "mine.jsonl")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"against": "rlhf"}, "run/rlhf and run/rlhf cannot be told apart: give another one with --against"),
        ({"against": "dpo"}, "step2_dpo of .* is not finished; run it first: rlhf-chat dpo"),
        ({"against": "sfft"}, "sfft"),
        ({"temperature": 0.0}, "gives the same answer twice"),
        ({"name": " "}, "Say who judges"),
        ({"again": "ben"}, "ben has judged nothing yet"),
        ({"again": "", "name": "ann"}, "Say who judges"),
    ],
)
def test_what_cannot_be_is_one_sentence(run, monkeypatch, given, words):
    with pytest.raises(UserError, match=words):
        ask(run, monkeypatch, "", **given)
    assert not run.preferences.exists()


def test_a_target_that_is_nothing_is_refused_as_chat_does(run, place, monkeypatch):
    for target, words in ((place / "nowhere", "does not exist"), (run.data, "neither a run directory")):
        with pytest.raises(UserError, match=words):
            ask(run, monkeypatch, "", target=target)


def test_a_damaged_file_is_found_before_anybody_judges(run, monkeypatch):
    run.preferences.write_text("not JSON\n{}\n")
    with pytest.raises(UserError, match=r"is no file of preferences \(line 1: "):
        ask(run, monkeypatch, "Hi\n1\n")


def test_what_is_left_to_judge_again(run, monkeypatch, capsys):
    """For another person once, for the same one a second time; the last word of the first counts."""
    ask(run, monkeypatch, "One\n1\nTwo\n2\n", max_tokens=3)
    assert len(ask(run, monkeypatch, "1\ns\n", name="ben", again="ann")) == 3
    assert len(ask(run, monkeypatch, "1\n2\n", name="ben", again="ann")) == 4
    assert len(ask(run, monkeypatch, "=\n=\n=\n", again="ann")) == 6
    capsys.readouterr()
    assert len(ask(run, monkeypatch, "1\n", again="ann")) == 6
    assert "Nothing is left to judge." in capsys.readouterr().err
    with pytest.raises(UserError, match="carl has judged nothing yet: there are preferences of ann, ben"):
        ask(run, monkeypatch, "", again="carl")


def test_who_judges_is_the_name_on_this_machine(monkeypatch):
    monkeypatch.setattr(prefer.getpass, "getuser", lambda: "ada")
    assert prefer.login_name() == "ada"

    def nobody() -> str:
        raise OSError("No username set in the environment")

    monkeypatch.setattr(prefer.getpass, "getuser", nobody)
    with pytest.raises(UserError, match="--as NAME"):
        prefer.login_name()
