"""A server of a tiny model in this process, on a free port."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from inference.chat_model import ChatModel
from inference.generation.sample import SamplingSettings
from inference.serving.app import create_app
from inference.serving.lane import Lane
from inference.serving.listener import bind
from inference.serving.server import Server
from inference.serving.service import Limits, Service

LIMITS = Limits(slots=4, queue=120, context=300, max_tokens=200)
MESSAGES: list[Any] = [{"role": "user", "content": "How are you today?"}]
WARM: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 24}


@dataclass(frozen=True)
class Served:
    url: str
    service: Service
    server: Server

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, **options)

    def post(self, body: Any = None, **options: Any) -> httpx.Response:
        given = {"json": body} if body is not None else {}
        return httpx.post(f"{self.url}/v1/chat/completions", **given, **options)

    def health(self, name: str = "sft") -> dict[str, int]:
        return httpx.get(f"{self.url}/health").json()["models"][name]


@contextmanager
def serving(service: Service, grace: float = 5.0, connections: int | None = None, **options: Any) -> Iterator[Served]:
    listener, is_ready = bind("127.0.0.1", 0), threading.Event()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = Server(create_app(service, **options), service, is_ready.set, grace, connections)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        assert is_ready.wait(20)
        yield Served(url, service, server)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def alone(model: ChatModel, seed: int, messages: list[Any] = MESSAGES, **settings: Any) -> str:
    """What the model answers in a chat of its own."""
    return "".join(model.reply(messages, SamplingSettings(**{**WARM, **settings}), seed, turn=0))


@pytest.fixture(scope="session")
def model(tiny_model_directory) -> ChatModel:
    """For what to expect; the server has its own."""
    return ChatModel.load(tiny_model_directory)


@pytest.fixture(scope="package")
def served(tiny_model_directory) -> Iterator[Served]:
    models = {name: ChatModel.load(tiny_model_directory) for name in ("sft", "rlhf")}
    service = Service(models, LIMITS)
    assert service.warm_up() > 0
    with serving(service) as running:
        yield running


@pytest.fixture
def slowly(monkeypatch) -> None:
    """Each step of generation takes 20 ms."""
    step = Lane.step

    def slow_step(lane: Lane):
        threading.Event().wait(0.02)
        return step(lane)

    monkeypatch.setattr(Lane, "step", slow_step)


@pytest.fixture
def go(monkeypatch) -> threading.Event:
    """Until it is set, a model with all slots taken draws nothing."""
    step, go = Lane.step, threading.Event()

    def held_step(lane: Lane):
        if lane.running < lane.slots or go.is_set():
            return step(lane)
        go.wait(0.01)
        return []

    monkeypatch.setattr(Lane, "step", held_step)
    return go
