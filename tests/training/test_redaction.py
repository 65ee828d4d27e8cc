"""What a command line keeps of secrets: nothing; and of everything else: all."""

import pytest

from training.redaction import redacted, redacted_arguments


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
    ],
)
def test_the_rest_is_kept(text):
    assert redacted(text) == text


def test_what_follows_an_option_for_a_secret_is_hidden():
    given = ["rlhf-chat", "serve", "--token", "abc", "--api-key", "d", "--data", "x.jsonl", "--micro-batch-tokens", "9"]
    kept = ["rlhf-chat", "serve", "--token", "***", "--api-key", "***", *given[6:]]
    assert redacted_arguments(given) == kept
