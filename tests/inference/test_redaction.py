"""What a command line keeps of secrets: nothing; and of everything else: all."""

from urllib.parse import quote

import pytest

from inference.streams import filled_in, redacted, redacted_arguments, redacted_values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://anna:geheim@host:80/score?x=1", "http://***@host:80/score?x=1"),
        ("https://host/score?token=abc&k=3", "https://host/score?token=***&k=3"),
        ("https://host/score?k=3&api_key=abc#end", "https://host/score?k=3&api_key=***#end"),
        ("rlhf.reward_url=https://host/?X-Amz-Signature=ab%2Fc", "rlhf.reward_url=https://host/?X-Amz-Signature=***"),
        ("https://host/?accessToken=abc", "https://host/?accessToken=***"),
        ("service.password=abc", "service.password=***"),
        ("Authorization: Bearer abc.def", "Authorization: ***"),
        ("hf_abcdefghijklmnopqrst", "***"),
        ("http://anna:p@ss:word@host/", "http://***@host/"),
        ("https://sometoken@host", "https://***@host"),
        ('{"password": "two words", "a": 1}', '{"password": ***, "a": 1}'),
        ("reward_url: 'https://h/?jwt=a.b'", "reward_url: 'https://h/?jwt=***'"),
        ("authorization: Basic YTpi", "authorization: ***"),
        ("sent Bearer abcdefgh.ij", "sent Bearer ***"),
        ("https://${NAME}:geheim@host", "https://***@host"),
        ("HTTP_TOKEN=abc", "HTTP_TOKEN=***"),
    ],
)
def test_secrets_are_hidden(text, expected):
    assert redacted(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "sft.token_budget=40000",
        "data.max_response_tokens=32",
        "rlhf.micro_batch_tokens=64",
        "sft.optimizer.learning_rate=1e-5",
        "rlhf.reward_url=http://127.0.0.1:8000/score?model=a",
        "data.source=mine@home.jsonl=0.5",
        "rlhf.reward_function=/home/a/keys.py:score",
        "Dahoas/rm-static",
        "rlhf.reward_url=https://anna:${REWARD_KEY}@host/?token=${OTHER_KEY}&k=1",
        "https://${REWARD_KEY}@host",
        "https://host/a@b",
        "The token budget: 3; the key is lost. 2 keys = 3",
    ],
)
def test_the_rest_is_kept(text):
    assert redacted(text) == text


def test_what_follows_an_option_for_a_secret_is_hidden():
    given = ["rlhf-chat", "serve", "--token", "abc", "--api-key", "d", "--data", "x.jsonl", "--micro-batch-tokens", "9"]
    kept = ["rlhf-chat", "serve", "--token", "***", "--api-key", "***", *given[6:]]
    assert redacted_arguments(given) == kept


def test_secrets_of_the_environment_are_found_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "correct-horse")
    monkeypatch.setenv("MY_OTHER_KEY", "short")
    monkeypatch.setenv("HTTPS_PROXY", "http://anna:battery%20staple@proxy:80")
    monkeypatch.setenv("PWD", "/home/somebody")
    text = "refused correct-horse by anna:battery%20staple at proxy (battery staple); a short way in /home/somebody"
    assert redacted(text) == "refused *** by *** at proxy (***); a short way in /home/somebody"


def test_what_is_filled_in_is_hidden_from_then_on(monkeypatch):
    monkeypatch.setenv("MY_ADDRESS", "a hidden/place")
    assert redacted("a hidden/place") == "a hidden/place"
    assert filled_in("x/${MY_ADDRESS}/y", quote) == "x/a%20hidden/place/y"
    assert redacted("a hidden/place or a%20hidden/place") == "*** or ***"
    with pytest.raises(KeyError, match="NO_SUCH"):
        filled_in("${NO_SUCH}")


def test_settings_are_redacted_and_keep_their_shape():
    values = {"a": ["http://x:y@h", 3], "b": {"c": None, "d": "plain"}}
    assert redacted_values(values) == {"a": ["http://***@h", 3], "b": {"c": None, "d": "plain"}}
