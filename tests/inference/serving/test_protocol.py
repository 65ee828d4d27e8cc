"""The OpenAI protocol as the `openai` package speaks it, and what is refused."""

import json

import httpx
import openai
import pytest
import torch
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming

from inference.generation.sampler import SamplingKey, SamplingSettings
from inference.serving.app import MOST_BYTES
from inference.serving.request import IGNORED, MEANS_NOTHING, ChatRequest
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


def test_an_answer_goes_on_behind_its_beginning(served, model):
    """In pieces of which none begins again: the first space is not taken for that behind 'Assistant:'."""
    begun, spoken = "Well, to be honest", [*MESSAGES, {"role": "assistant", "content": "Well, to be honest"}]
    answer = served.client().chat.completions.create(model="sft", messages=spoken, seed=3, **WARM)
    prompt = model.format.prompt_ids(MESSAGES)
    whole = prompt + model.format.response_ids(begun + " 🙂, no")
    given = model.format.begun_ids(begun)
    assert whole[: len(prompt + given)] == prompt + given and answer.usage.prompt_tokens == len(prompt + given)
    *_, sample = model.engine.stream(torch.tensor(prompt + given), SamplingSettings(**WARM), SamplingKey(3))
    text = model.format.decode(given + sample.response_ids).removeprefix(begun)
    assert answer.choices[0].message.content == text
    pieces = list(served.client().chat.completions.create(model="sft", messages=spoken, seed=3, stream=True, **WARM))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    nothing = [*MESSAGES, {"role": "assistant", "content": ""}]
    assert ask(served, messages=nothing, seed=3).message.content == alone(model, 3)


def ask(served, **options):
    """The only choice."""
    return served.client().chat.completions.create(**{**ASKED, **WARM, **options}).choices[0]


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 1.0}, {"temperature": 0.5}])
def test_logprobs_are_those_of_generation_and_change_no_draw(served, model, settings):
    choice = ask(served, seed=3, logprobs=True, top_logprobs=5, **settings)
    assert choice.message.content == alone(model, 3, **settings)
    prompt = torch.tensor(model.format.prompt_ids(MESSAGES))
    *_, sample = model.engine.stream(prompt, SamplingSettings(**{**WARM, **settings}), SamplingKey(3))
    content = choice.logprobs.content
    assert [token.logprob for token in content] == sample.logprobs
    assert b"".join(map(bytes, (token.bytes for token in content))).decode(errors="replace") == choice.message.content
    for token in content:
        tops = [top.logprob for top in token.top_logprobs]
        assert tops == sorted(tops, reverse=True) and 1 <= len(tops) <= 5 and token.logprob <= tops[0]
    if settings["temperature"] != 0.5:  # nothing is left out and nothing sharpened
        ids = torch.cat((prompt, torch.tensor(sample.response_ids)))[None]
        plain = model.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(torch.tensor(sample.logprobs), plain.gather(1, ids[0, len(prompt) :, None])[:, 0])
        tops = torch.tensor([[top.logprob for top in token.top_logprobs] for token in content])
        torch.testing.assert_close(tops, plain.topk(5).values)
    plainly = ask(served, seed=3, **settings)
    assert plainly.logprobs is None and plainly.message.content == choice.message.content


def test_streamed_logprobs_come_with_their_text(served):
    asked = {**WARM, "temperature": 1, "max_tokens": 60, "seed": 4, "n": 2, "logprobs": True, "top_logprobs": 1}
    wholes = served.client().chat.completions.create(**ASKED, **asked).choices
    texts, tokens = ["", ""], [[], []]
    for chunk in served.client().chat.completions.create(**ASKED, **asked, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
        shown = b"".join(bytes(token.bytes) for token in tokens[choice.index])
        assert shown.decode(errors="replace") == texts[choice.index]
    assert tokens == [whole.logprobs.content for whole in wholes] and len(tokens[0]) > 30


def test_tokens_behind_a_stop_string_have_no_logprobs(served, model):
    whole = alone(model, 3)
    choice = ask(served, seed=3, stop=whole[12:17], logprobs=True)
    *rest, last = (bytes(token.bytes) for token in choice.logprobs.content)
    fewer, said = b"".join(rest).decode(errors="replace"), b"".join([*rest, last]).decode(errors="replace")
    assert said.startswith(choice.message.content) and len(fewer) < len(choice.message.content)
    assert all(token.top_logprobs == [] for token in choice.logprobs.content)


def test_a_conversation_too_long_loses_its_oldest_messages_if_asked_to(served, model):
    turns = [{"role": role, "content": f"{i} word " * 9} for i in range(9) for role in ("user", "assistant")][:-1]
    with pytest.raises(openai.BadRequestError, match="shorten the conversation"):
        served.client().chat.completions.create(model="sft", messages=turns)
    asked = {"model": "sft", "messages": turns, "seed": 2, "truncation": "auto", **WARM}
    answer = served.post(asked).json()
    kept = model.format.prompt(turns, LIMITS.context - WARM["max_tokens"])
    assert (
        0 < kept.left_out < len(turns) and answer["note"] == kept.note and f"its oldest {kept.left_out} " in kept.note
    )
    assert answer["usage"]["prompt_tokens"] == len(kept.ids)
    chunks = list(served.client().chat.completions.create(**asked_of(asked), stream=True))
    assert chunks[0].note == kept.note
    cut = served.post({**asked, "messages": [*turns[:1], {"role": "user", "content": "word " * 400}]}).json()["note"]
    assert "its oldest message and the beginning of the last one had to be left out" in cut
    assert "note" not in served.post({**asked, "messages": MESSAGES}).json()
    whole = served.post({**asked, "max_tokens": 200}).json()["usage"]  # no more than half for the answer
    assert whole["prompt_tokens"] <= LIMITS.context // 2 >= whole["completion_tokens"]


def asked_of(body):
    """For a client that does not know what is ours."""
    return {**{k: v for k, v in body.items() if k != "truncation"}, "extra_body": {"truncation": body["truncation"]}}


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
        ({"messages": ["Hi"]}, "messages[0]", "an object"),
        ({"messages": [{"role": "assistant", "content": "Well"}]}, "messages", "needs a message before it"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "no tools",
        ),
        ({"logprobs": 1}, "logprobs", "valid boolean"),
        ({"top_logprobs": 2}, "top_logprobs", "needs 'logprobs'"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "equal to 20"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "valid boolean"),
        ({"response_format": {"type": "json_object"}}, "response_format", 'other than {"type": "text"}'),
        ({"tools": [{"type": "function"}]}, "tools", "leave it out"),
        ({"temprature": 1}, "temprature", "Unrecognized"),
    ],
)
def test_what_cannot_be_is_said(served, change, param, said):
    response = served.post({**ASKED, **change})
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and said in error["message"], error
    assert error["type"] == "invalid_request_error" and error["message"].endswith(".")


@pytest.mark.parametrize(("body", "code"), [({}, "missing_required_parameter"), ({**ASKED, "n": "2"}, "invalid_type")])
def test_codes_say_what_is_wrong_and_the_client_shows_it(served, body, code):
    with pytest.raises(openai.BadRequestError) as refused:
        served.client().post("/chat/completions", body=body, cast_to=object)
    assert refused.value.code == code and refused.value.param and refused.value.type == "invalid_request_error"


def test_every_setting_of_the_protocol_has_a_rule():
    known = ChatRequest.model_fields.keys() | IGNORED | MEANS_NOTHING.keys()
    assert CompletionCreateParamsStreaming.__annotations__.keys() <= known
    assert not {*ChatRequest.model_fields} & {*IGNORED, *MEANS_NOTHING}


def test_what_asks_for_nothing_is_taken(served):
    body = {**ASKED, "max_tokens": 2, "tools": [], "presence_penalty": 0.0, "user": "me", "stop": None, "min_p": None}
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
        (httpx.options(f"{served.url}/v1/chat/completions"), 405),
        (httpx.delete(f"{served.url}/v1/models/sft"), 405),
        (served.post({**ASKED, "messages": [{"role": "user", "content": "x" * MOST_BYTES}]}), 413),
        (served.post(content=announced_only(), headers={"content-type": "application/json"}), 413),
    ):
        assert response.status_code == status
        assert response.json()["error"]["message"].endswith(".")
        assert "access-control-allow-origin" not in response.headers
    for path, status in (("/", 200), ("/v1/models", 200), ("/v1/nothing", 404)):
        head = httpx.head(served.url + path)
        assert head.status_code == status and head.content == b"" and int(head.headers["content-length"]) > 0


def announced_only():
    """Comes in pieces, without its length."""
    for _ in range(MOST_BYTES // 2**16 + 1):
        yield b" " * 2**16
