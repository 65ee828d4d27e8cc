"""A server of a tiny model in this process, on a free port."""

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from inference.chat_model import ChatModel
from inference.generation.sampler import SamplingSettings
from inference.preferences import PreferenceFile
from inference.serving.app import create_app
from inference.serving.judging import Collecting, ServedModel
from inference.serving.server import Server, bind
from inference.serving.service import ContinuousBatch, Events, Limits, Service

LIMITS = Limits(slots=4, queue=120, context=300, max_tokens=200)
MESSAGES: list[Any] = [{"role": "user", "content": "How are you today?"}]
WARM: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 24}


@dataclass(frozen=True)
class Served:
    url: str
    service: Service
    server: Server
    preferences: PreferenceFile | None = None

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, **options)

    def post(self, body: Any = None, **options: Any) -> httpx.Response:
        given = {"json": body} if body is not None else {}
        return httpx.post(f"{self.url}/v1/chat/completions", **{"timeout": 120, **given, **options})

    def health(self, name: str = "sft") -> dict[str, int]:
        return httpx.get(f"{self.url}/health", timeout=120).json()["models"][name]


@contextmanager
def serving(service: Service, grace: float = 5.0, connections: int | None = None, **options: Any) -> Iterator[Served]:
    listener, is_ready = bind("127.0.0.1", 0), threading.Event()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = Server(create_app(service, **options), service, is_ready.set, grace, connections)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        assert is_ready.wait(60)
        collecting = options.get("collecting")
        yield Served(url, service, server, collecting and collecting.file)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def alone(model: ChatModel, seed: int, messages: list[Any] = MESSAGES, **settings: Any) -> str:
    """What the model answers in a chat of its own."""
    return "".join(model.reply(messages, SamplingSettings(**{**WARM, **settings}), seed, turn=0))


@pytest.fixture(scope="session")
def model(tiny_model_directory) -> ChatModel:
    """For what to expect; the server has its own."""
    return ChatModel.load(tiny_model_directory)


@pytest.fixture(scope="package")
def served(tiny_model_directory, tmp_path_factory) -> Iterator[Served]:
    models = {name: ChatModel.load(tiny_model_directory) for name in ("sft", "rlhf")}
    service = Service(models, LIMITS)
    assert service.warm_up() > 0
    setup = collecting(tmp_path_factory.mktemp("served") / "preferences.jsonl")
    with serving(service, collecting=setup) as running:
        yield running


@pytest.fixture(autouse=True)
def seeds(monkeypatch) -> None:
    """Answers asked for without a seed are the same each time: drawn freely, one in 512 begins with its end."""
    numbers = itertools.count(1)
    monkeypatch.setattr("inference.serving.service.secrets.randbits", lambda bits: next(numbers))


@pytest.fixture
def go(monkeypatch) -> threading.Event:
    """Until it is set, a model with all slots taken draws nothing."""
    return hold(monkeypatch, lambda batch: batch.running == batch.slots)


@pytest.fixture
def endless(monkeypatch) -> None:
    """A model draws nothing while an answer of 30 tokens is there, so that none comes to its end by itself."""
    hold(monkeypatch, lambda batch: any(len(sample.response_ids) >= 30 for sample in batch.decoding.unfinished))


def hold(monkeypatch, when: Callable[[ContinuousBatch], bool]) -> threading.Event:
    """A model draws nothing `when` it is so, until the event is set."""
    step, go = ContinuousBatch.step, threading.Event()

    def held_step(batch: ContinuousBatch) -> Events:
        if go.is_set() or not when(batch):
            return step(batch)
        go.wait(0.01)
        return []

    monkeypatch.setattr(ContinuousBatch, "step", held_step)
    return go


CLIENT = httpx.Client(timeout=120)
PROMPTS: list[Any] = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Number {n}?"}] for n in (1, 2)
]


@dataclass(frozen=True)
class Judged:
    """What people do whom two models answer."""

    served: Served

    @property
    def file(self) -> PreferenceFile:
        assert self.served.preferences is not None
        return self.served.preferences

    def ask(self, method: str, path: str, status: int = 200, **options: Any) -> Any:
        response = CLIENT.request(method, f"{self.served.url}/v1/{path}", **options)
        assert response.status_code == status, response.text
        return response.json() if status == 200 else response.json()["error"]

    def pair(self, messages: Any = MESSAGES, status: int = 200) -> Any:
        return self.ask("POST", "pairs", status, json={"messages": messages})

    def judge(self, pair: str, winner: str = "a", by: str = "ada", status: int = 200) -> Any:
        return self.ask("POST", "preferences", status, json={"pair": pair, "winner": winner, "by": by})

    def undo(self, by: str = "ada", status: int = 200) -> Any:
        return self.ask("DELETE", "preferences", status, params={"by": by})

    def count(self, by: str = "ada") -> Any:
        return self.ask("GET", "preferences", params={"by": by})["count"]


def collecting(file: Path, **changes: Any) -> Collecting:
    models = ServedModel("sft", "demo/sft"), ServedModel("rlhf", "demo/rlhf")
    given = {"models": models, "temperature": 0.9, "max_tokens": 8, "prompts": PROMPTS, **changes}
    return Collecting(PreferenceFile(file), **given)


@pytest.fixture
def judged(served) -> Judged:
    """With nothing judged."""
    served.preferences.path.unlink(missing_ok=True)
    return Judged(served)


def both(model: ChatModel) -> Service:
    """Of the same weights; their labels tell them apart."""
    return Service({"sft": model, "rlhf": model}, LIMITS)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """RLHF_CHAT_PICTURES keeps the screenshots, to be looked at."""
    return Path(os.environ.get("RLHF_CHAT_PICTURES", tmp_path))
