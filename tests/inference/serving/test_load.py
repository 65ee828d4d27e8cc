"""Many clients, too many clients, clients that leave, steps that fail, and the end."""

import asyncio
import json
import threading
import time
from contextlib import closing
from http.client import HTTPConnection

import httpx
import openai
import pytest

from inference.chat_model import ChatModel
from inference.generation.passes import PackedPasses
from inference.serving.service import Limits, Service
from tests.inference.serving.conftest import LIMITS, MESSAGES, WARM, Served, alone, serving

LONG = {"model": "sft", "messages": MESSAGES, "max_tokens": 200, "temperature": 2, "seed": 1}


def wait_for(condition, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def settings_of(number: int) -> dict:
    return {"temperature": (0.7, 1.0, 0.0)[number % 3], "top_p": (1.0, 0.9)[number % 2], "max_tokens": 4 + number % 13}


def prompt_of(number: int) -> list:
    return [{"role": "user", "content": f"Tell me about the number {number}, and about {'the sea, ' * (number % 5)}."}]


def test_a_hundred_clients_lose_nothing_and_get_what_they_get_alone(served, model):
    async def ask(client: httpx.AsyncClient, number: int) -> str:
        body = {"model": ("sft", "rlhf")[number % 2], "messages": prompt_of(number), "seed": number}
        body |= settings_of(number) | {"stream": number % 4 == 0}
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        if not body["stream"]:
            return response.json()["choices"][0]["message"]["content"]
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        assert lines.pop() == "[DONE]"
        chunks = [httpx.Response(200, text=line).json() for line in lines]
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)

    async def ask_all() -> list[str]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=served.url, limits=limits, timeout=60) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(100)))

    answers = asyncio.run(ask_all())
    expected = [alone(model, number, prompt_of(number), **settings_of(number)) for number in range(100)]
    assert answers == expected
    assert len(set(answers)) > 60  # every third is greedy: of the number in the prompt this model knows little
    assert all(model.taken == 0 for model in served.service.served.values())


def test_the_same_seed_gives_the_same_beside_eight_others(served, model):
    def ask(seed: int) -> str:
        answer = served.client().chat.completions.create(model="sft", messages=MESSAGES, seed=seed, **WARM)
        return answer.choices[0].message.content

    by_itself = ask(0)
    texts: dict[int, str] = {}
    threads = [threading.Thread(target=lambda s=seed: texts.update({s: ask(s)})) for seed in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts[0] == by_itself
    assert texts == {seed: alone(model, seed) for seed in range(9)}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(served, endless, stream):
    model = served.service.served["sft"]
    stats = model.batch.decoding.stats
    before = stats.samples, stats.response_tokens
    with closing(HTTPConnection(served.url.removeprefix("http://"))) as client:
        body, headers = json.dumps({**LONG, "stream": stream}), {"Content-Type": "application/json"}
        client.request("POST", "/v1/chat/completions", body, headers)
        wait_for(lambda: served.health()["running"] == 1)
    wait_for(lambda: served.health()["running"] == model.taken == 0)
    assert model.batch.is_idle and stats.samples == before[0] + 1
    assert 0 < stats.response_tokens - before[1] < 200


def test_who_finds_no_place_is_told_when_to_come_again(served, go, monkeypatch):
    monkeypatch.setattr(served.service, "limits", Limits(slots=4, queue=1, context=300, max_tokens=200))
    codes: list[int] = []

    def ask() -> None:
        codes.append(served.post({**LONG, "max_tokens": 40}, timeout=60).status_code)

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    wait_for(lambda: served.health()["running"] == 4 and served.health()["waiting"] == 1)
    refused = served.post(LONG)
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert "busy" in refused.json()["error"]["message"]
    with pytest.raises(openai.RateLimitError):
        served.client().chat.completions.create(**LONG)
    assert served.post({**LONG, "model": "rlhf", "max_tokens": 2}).status_code == 200  # the other model has places
    go.set()
    for thread in threads:
        thread.join()
    assert codes == [200] * 5
    assert served.post({**LONG, "max_tokens": 2}).status_code == 200


def test_a_step_that_fails_ends_its_answers_and_not_the_server(served, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(PackedPasses, "decode", fail)
        failed = served.post(LONG)
        assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
        lines = served.post({**LONG, "stream": True}).text.strip().splitlines()
        assert '"error"' in lines[-1] and "[DONE]" not in lines[-1]
    assert served.post(LONG).status_code == 200
    assert served.service.served["sft"].taken == 0


@pytest.mark.parametrize(
    ("grace", "is_forced", "is_whole"), [(20.0, False, True), (0.0, False, False), (20.0, True, False)]
)
def test_shutting_down(tiny_model_directory, go, caplog, grace, is_forced, is_whole):
    service = Service({"sft": ChatModel.load(tiny_model_directory)}, Limits(1, 5, LIMITS.context, LIMITS.max_tokens))
    lines: list[str] = []
    waiting: list[int] = []

    def read(served: Served) -> None:
        with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=long, timeout=60) as response:
            lines.extend(line for line in response.iter_lines() if line)

    long = {**LONG, "stream": True, "max_tokens": 40}
    with serving(service, grace) as served:
        reader = threading.Thread(target=read, args=(served,))
        reader.start()
        wait_for(lambda: served.health()["running"] == 1)
        other = threading.Thread(target=lambda: waiting.append(served.post(LONG, timeout=60).status_code))
        other.start()
        wait_for(lambda: served.health()["waiting"] == 1)
        served.server.force_exit = is_forced  # as a second Ctrl-C does
        served.server.should_exit = True
        if is_whole:
            wait_for(lambda: service.is_closing)
            go.set()
    reader.join()
    other.join()
    assert waiting == [503]
    assert (lines[-1] == "data: [DONE]") == is_whole
    assert ("shutting down" in lines[-1]) != is_whole
    assert not caplog.records
    with pytest.raises(httpx.ConnectError):
        served.post(LONG)
