"""Tokens, and names that a server on the loopback interface does not answer to."""

import httpx
import openai
import pytest

from inference.errors import UserError
from inference.serving.server import bind, is_loopback, is_loopback_name
from inference.serving.service import Service
from tests.inference.serving.conftest import LIMITS, serving


@pytest.fixture(scope="module")
def elsewhere(model):
    """As for other machines: with a token, under any name. Nothing is generated."""
    with serving(Service({"sft": model}, LIMITS), token="secret", loopback_only=False) as running:
        yield running


def test_a_token_is_asked_for(elsewhere):
    client = openai.OpenAI(base_url=f"{elsewhere.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="token is needed"):
        client.models.list()
    assert elsewhere.post({}).status_code == 401
    assert elsewhere.post({}, headers={"authorization": "Bearer ü".encode()}).status_code == 401
    assert elsewhere.post({}, headers={"authorization": "Basic secret"}).status_code == 401
    right = openai.OpenAI(base_url=f"{elsewhere.url}/v1", api_key="secret", max_retries=0)
    assert [listed.id for listed in right.models.list()] == ["sft"]
    for path in ("/", "/health"):  # hold no secrets
        assert httpx.get(elsewhere.url + path, headers={"host": "model.example.org"}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example.org", "localhost.evil.org", "127.0.0.1.evil.org", "10.0.0.1:8000", ""])
def test_other_names_are_turned_away_on_the_loopback(served, host):
    for path in ("/", "/health", "/v1/models"):
        response = httpx.get(served.url + path, headers={"host": host})
        assert response.status_code == 403 and response.json()["error"]["code"] == "wrong_host"


def test_names_of_this_machine():
    assert all(map(is_loopback_name, (["localhost:80"], ["LOCALHOST"], ["127.0.0.1"], ["127.1.2.3:9"], ["[::1]:8000"])))
    assert not any(map(is_loopback_name, ([], ["localhost", "localhost"], ["localhost:80@evil"], ["0.0.0.0"], ["::1"])))
    assert is_loopback("localhost") and is_loopback("127.0.0.2") and is_loopback("::1")
    assert not is_loopback("0.0.0.0") and not is_loopback("::") and not is_loopback("example.org")


def test_a_port_that_is_taken_and_an_address_of_elsewhere():
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"Port {port} is in use; give another one"):
            bind("127.0.0.1", port)
    with pytest.raises(UserError, match=r"Nothing can listen on 203\.0\.113\.1"):
        bind("203.0.113.1", 0)
    with pytest.raises(UserError, match="Nothing can listen on no-such-host"):
        bind("no-such-host.invalid", 0)
