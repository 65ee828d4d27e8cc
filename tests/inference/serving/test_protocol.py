"""The OpenAI protocol as the `openai` package speaks it, and what is refused."""

import json

import httpx
import openai
import pytest

from inference.serving.app import MOST_BYTES
from tests.inference.serving.conftest import LIMITS, MESSAGES, WARM, alone

ASKED = {"model": "sft", "messages": MESSAGES}


def test_an_answer_is_that_of_a_chat_with_its_figures(served, model):
    answer = served.client().chat.completions.create(model="sft", messages=MESSAGES, seed=3, **WARM)
    assert answer.object == "chat.completion" and answer.model == "sft" and answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content == alone(model, 3)
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == WARM["max_tokens"]
    assert answer.usage.prompt_tokens == len(model.format.prompt_ids(MESSAGES))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_an_answer_that_ends_by_itself_stops(served, model):
    found = None
    for seed in range(200):  # one token in 512 is the end
        answer = served.client().chat.completions.create(**ASKED, seed=seed, temperature=2, max_tokens=60)
        if answer.choices[0].finish_reason == "stop":
            found = answer
            break
    assert found is not None and found.usage.completion_tokens < 60
    assert found.choices[0].message.content == alone(model, seed, temperature=2.0, top_p=1.0, max_tokens=60)


def test_a_stream_joins_to_the_answer_without_broken_characters(served, model):
    client = served.client()
    characters = ""
    for seed in range(6):
        stream = client.chat.completions.create(
            **ASKED, seed=seed, temperature=1, max_tokens=80, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert len({chunk.id for chunk in chunks}) == 1
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices == []
        assert all(chunk.usage is None for chunk in chunks[:-1])
        (last,) = (c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason)
        assert last == ("length" if chunks[-1].usage.completion_tokens == 80 else "stop")
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
        assert "".join(pieces) == alone(model, seed, top_p=1.0, max_tokens=80)
        assert len(pieces) > 10
        characters += "".join(pieces)
    assert not characters.isascii()  # the random model writes bytes of all kinds


def test_several_choices_are_drawn_apart_and_always_the_same(served, model):
    def draw(**options):
        return served.client().chat.completions.create(**ASKED, seed=5, n=3, **WARM, **options)

    answer = draw()
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert texts[0] == alone(model, 5)
    assert answer.usage.completion_tokens > sum(len(model.format.response_ids(text)) for text in texts[:2]) / 2
    streamed = ["", "", ""]
    for chunk in draw(stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_before_it(served, model, stream):
    whole = alone(model, 3)
    stop = whole[12:17]
    client = served.client()
    answer = client.chat.completions.create(**ASKED, seed=3, stop=["not in there", stop], stream=stream, **WARM)
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert answer.usage.completion_tokens < WARM["max_tokens"]
    assert text == whole[: whole.index(stop)] and finish == "stop"


def test_seeds_decide(served):
    def draw(**options):
        answer = served.client().chat.completions.create(**ASKED, **WARM, **options)
        return answer.choices[0].message.content

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert len({draw() for _ in range(3)}) == 3  # without a seed each is another
    assert draw(seed=-(2**63)) == draw(seed=-(2**63))


def test_messages_of_all_kinds_reach_the_template(served, model):
    messages = [
        {"role": "developer", "content": "Answer in Chinese. 你好 🙂"},
        {"role": "user", "content": [{"type": "text", "text": "How are "}, {"type": "text", "text": "you?"}]},
        {"role": "assistant", "content": "Naïve."},
        {"role": "user", "content": "Why?"},
    ]
    plain = [
        {"role": "system", "content": "Answer in Chinese. 你好 🙂"},
        {"role": "user", "content": "How are you?"},
        *messages[2:],
    ]
    answer = served.client().chat.completions.create(model="rlhf", messages=messages, seed=1, **WARM)
    assert answer.choices[0].message.content == alone(model, 1, plain)
    assert answer.usage.prompt_tokens == len(model.format.prompt_ids(plain))


@pytest.mark.parametrize("temperature", [0, 1e-30])
def test_greedy(served, model, temperature):
    options = {**WARM, "temperature": temperature}
    answer = served.client().chat.completions.create(**ASKED, **options)
    assert answer.choices[0].message.content == alone(model, 9, temperature=0.0)


def test_answers_of_any_length_fit_the_room(served, model):
    answer = served.client().chat.completions.create(**ASKED, seed=1)
    expected = min(LIMITS.max_tokens, LIMITS.context - answer.usage.prompt_tokens)
    assert answer.usage.completion_tokens == expected or answer.choices[0].finish_reason == "stop"


def test_models_are_listed(served):
    models = served.client().models
    assert [listed.id for listed in models.list()] == ["sft", "rlhf"]
    assert models.retrieve("rlhf").id == "rlhf"
    with pytest.raises(openai.NotFoundError, match="there is sft and rlhf"):
        models.retrieve("other")


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 201}, "max_tokens", "at most 200"),
        ({"max_completion_tokens": 201}, "max_completion_tokens", "at most 200"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"seed": 1.5}, "seed", "valid integer"),
        ({"n": 5}, "n", "at most 4"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "empty"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "user"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "'text'"),
        ({"messages": [{"role": "user", "content": "word " * 400}]}, "messages", "shorten the conversation"),
        ({"max_tokens": 200, "messages": [{"role": "user", "content": "word " * 130}]}, "messages", "fewer tokens"),
        ({"logprobs": True}, "logprobs", "no 'logprobs'"),
        ({"tools": [{"type": "function"}]}, "tools", "leave it out"),
        ({"temprature": 1}, "temprature", "Unrecognized"),
    ],
)
def test_what_cannot_be_is_said(served, change, param, said):
    response = served.post({**ASKED, **change})
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and said in error["message"], error
    assert error["type"] == "invalid_request_error" and error["message"].endswith(".")


def test_what_asks_for_nothing_is_taken(served):
    body = {**ASKED, "max_tokens": 2, "tools": [], "presence_penalty": 0.0, "user": "me", "stop": None, "seed": None}
    assert served.post(body).status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff{}", b'{"model": "\\ud800"}', b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"]
)
def test_a_body_that_is_no_request(served, body):
    response = served.post(content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_json"


def test_other_errors_have_the_same_form(served):
    for response, status in (
        (served.post({**ASKED, "model": "gpt-9"}), 404),
        (served.post(content=json.dumps(ASKED), headers={"content-type": "text/plain"}), 415),
        (httpx.get(f"{served.url}/v1/chat/completions"), 405),
        (httpx.get(f"{served.url}/v1/nothing"), 404),
        (served.post({**ASKED, "messages": [{"role": "user", "content": "x" * MOST_BYTES}]}), 413),
        (served.post(content=announced_only(), headers={"content-type": "application/json"}), 413),
    ):
        assert response.status_code == status
        assert response.json()["error"]["message"].endswith(".")
        assert "access-control-allow-origin" not in response.headers


def announced_only():
    """Comes in pieces, without its length."""
    for _ in range(MOST_BYTES // 2**16 + 1):
        yield b" " * 2**16
