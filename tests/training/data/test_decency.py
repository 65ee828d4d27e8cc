import pytest

from training.data.chitchat import upbeat_score
from training.data.rated_texts import is_decent, is_talk


@pytest.mark.parametrize("text", ["what the FUCK", "fuuuuuck", "holy sh!t", "clusterfuck", "a blow job", "You idiot!"])
def test_rude(text):
    assert not is_decent(text)


@pytest.mark.parametrize("text", ["oh my god, that class is killing me", "Scunthorpe assassins pass the cocktail", ""])
def test_decent(text):
    assert is_decent(text)


def test_the_whole_list_is_used():
    assert not is_decent("slut")  # in the list, among neither the roots nor the insults
    assert is_decent("damn")  # in the list, let through


@pytest.mark.parametrize("text", ["", "?!", ":)", "12 3", "see www.x.y", "http://x", "a@b.de", "go to Google.com now"])
def test_no_talk(text):
    assert not is_talk(text)


@pytest.mark.parametrize("text", ["ok", "I", "it costs 5.50"])
def test_talk(text):
    assert is_talk(text)


def test_upbeat_score():
    # "good" is rated 1.9; VADER's compound score is x / sqrt(x^2 + 15)
    assert upbeat_score("good") == pytest.approx(1.9 / (1.9**2 + 15) ** 0.5, abs=1e-4)
    assert upbeat_score("table") == 0
    assert upbeat_score("not good") < 0
