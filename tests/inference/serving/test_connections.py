"""Clients that hold a connection and send nothing, half a request, a slow one, or read no answer."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import httpx
import pytest

from inference.chat_model import ChatModel
from inference.serving import app, server
from inference.serving.server import Connection
from inference.serving.service import Limits, Service
from tests.inference.serving.conftest import Served, serving
from tests.inference.serving.test_load import wait_for

HALF_A_HEADER = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Half: "
HALF_A_BODY = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 1000\r\n\r\n{"
)
NOT_HERE = HALF_A_BODY.replace(b"Host: localhost", b"Host: elsewhere.example")
MOST = 12


@pytest.fixture(scope="module")
def few(tiny_model_directory) -> Iterator[Served]:
    """A server with room for a dozen connections."""
    service = Service({"sft": ChatModel.load(tiny_model_directory)}, Limits(2, 2, 64, 16))
    service.warm_up()
    with serving(service, connections=MOST) as served:
        yield served


@pytest.fixture
def opened(few):
    """Opens a connection that has sent something."""
    with ExitStack() as held:

        def open_connection(sent: bytes = b"") -> socket.socket:
            address = few.url.removeprefix("http://").split(":")
            client = held.enter_context(socket.create_connection((address[0], int(address[1])), timeout=120))
            client.sendall(sent)
            return client

        yield open_connection


def ends(client: socket.socket) -> bool:
    """Whether the server closes it."""
    try:
        while client.recv(65536):
            pass
        return True
    except ConnectionError:
        return True


@pytest.mark.parametrize("sent", [b"", HALF_A_HEADER, HALF_A_BODY, NOT_HERE], ids=["none", "header", "body", "refused"])
def test_many_that_wait_keep_nobody_out(few, opened, sent):
    held = [opened(sent) for _ in range(5 * MOST)]
    assert httpx.get(f"{few.url}/health", timeout=120).status_code == 200
    assert len(few.server.server_state.connections) <= MOST + 1
    assert all(ends(client) for client in held[:MOST])


def test_whoever_is_answered_stays(few, opened, go):
    """A stream under way is not what makes room."""
    body = {"model": "sft", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "n": 2, "stream": True}
    with httpx.stream("POST", f"{few.url}/v1/chat/completions", json=body, timeout=60) as answer:
        wait_for(lambda: few.health()["running"] == 2)
        held = [opened(HALF_A_HEADER) for _ in range(3 * MOST)]
        assert httpx.get(f"{few.url}/health", timeout=120).status_code == 200
        go.set()
        assert answer.read().endswith(b"[DONE]\n\n") and held


@pytest.mark.parametrize("sent", [b"", HALF_A_HEADER, NOT_HERE], ids=["none", "header", "refused"])
def test_headers_have_their_time_however_they_drip(few, opened, monkeypatch, sent):
    """Nor does the body of a request that was refused hold the connection."""
    monkeypatch.setattr(Connection, "header_seconds", 0.3)
    client, until = opened(sent), time.monotonic() + 120
    with pytest.raises(ConnectionError):
        while time.monotonic() < until:
            client.sendall(b"x" * bool(sent))
            time.sleep(0.02)
            if not sent and client.recv(1) == b"":
                raise ConnectionResetError


def test_a_body_has_its_time(few, opened, monkeypatch):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.2)
    client = opened(HALF_A_BODY)
    assert b"408" in client.recv(65536)


def test_who_reads_nothing_is_cut_off(few, opened, monkeypatch):
    """Requests one after the other, whose answers nobody takes."""
    monkeypatch.setattr(Connection, "reader_seconds", 0.2)
    client = opened()
    client.settimeout(0.2)
    with pytest.raises(ConnectionError):
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with suppress(TimeoutError):
                client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)


def test_half_of_the_descriptors_are_for_connections(monkeypatch):
    for descriptors, most in ((1024, 512), (1 << 20, 1024 + 136)):
        monkeypatch.setattr(server.resource, "getrlimit", lambda which, n=descriptors: (n, n))
        assert server.most_connections(136) == most
