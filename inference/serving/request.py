"""The body of a request -> what is wanted, checked."""

import json
import re
from http import HTTPStatus
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from inference.chat_template import Message
from inference.generation.sampler import SamplingSettings
from inference.preferences import Winner

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered: one sentence with the way out, and an HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or HTTPStatus(status).phrase.lower().replace(" ", "_")
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


MOST_ALTERNATIVES = 20
MOST_STOPS = 4
COLDEST = 1e-5
"""Temperatures below are greedy: logits divided by less would overflow."""
IGNORED = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_options prompt_cache_retention "
    "prediction verbosity reasoning_effort parallel_tool_calls".split()
)
"""Settings that change nothing about an answer here."""
MEANS_NOTHING: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "moderation": (),
    "web_search_options": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
}
"""Settings that are not supported here, with the values that ask for nothing."""


def text_of(content: Any) -> Any:
    """A message's parts of text as one text."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        raise ValueError("only parts of type 'text' can be read here")
    texts = [part.get("text") for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a part of type 'text' needs a text")
    return "".join(texts)


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ChatMessage(Strict):
    """`name` and what came with an earlier answer (`refusal`, `annotations`, ...) change nothing."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(text_of)]
    tool_calls: Any = None
    function_call: Any = None

    @field_validator("tool_calls", "function_call")
    @classmethod
    def there_are_no_tools(cls, calls: Any) -> Any:
        if calls:
            raise ValueError("this server has no tools; leave such messages out")
        return calls

    @property
    def message(self) -> Message:
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


Request = TypeVar("Request", bound=Strict)


class StreamOptions(Strict):
    include_usage: bool = False


class ChatRequest(Strict):
    """What of a request decides its answer. `top_k` is ours; `truncation` is that of OpenAI's responses."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: list[str] = Field([], max_length=MOST_STOPS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_ALTERNATIVES)
    truncation: Literal["auto", "disabled"] = "disabled"
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @field_validator("messages")
    @classmethod
    def ask_for_something(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        if messages[-1].role == "assistant" and len(messages) == 1:
            raise ValueError("the beginning of an answer needs a message before it")
        return messages

    @field_validator("stop", mode="before")
    @classmethod
    def one_is_a_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def says_something(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError("a stop string cannot be empty")
        return stop

    @field_validator("top_logprobs")
    @classmethod
    def stand_beside_logprobs(cls, count: int, others: ValidationInfo) -> int:
        if count and not others.data.get("logprobs"):
            raise ValueError("needs 'logprobs': true")
        return count

    @property
    def wanted_tokens(self) -> int | None:
        """Longest answer that is asked for; `max_completion_tokens` is the newer name."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def truncates(self) -> bool:
        """Whether the oldest messages of a conversation that is too long are left out."""
        return self.truncation == "auto"

    @property
    def beginning(self) -> str:
        """The beginning of the answer that is asked for: messages may end with it."""
        return self.messages[-1].content if self.messages[-1].role == "assistant" else ""

    @property
    def conversation(self) -> list[Message]:
        """All before the answer."""
        turns = self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages
        return [turn.message for turn in turns]

    @property
    def settings(self) -> SamplingSettings:
        """How its tokens are drawn; how many is decided where the prompt's length is known."""
        temperature = self.temperature if self.temperature >= COLDEST else 0.0
        return SamplingSettings(0, temperature, self.top_p, self.top_k)


class PairRequest(Strict):
    """What two answers are wanted to: to messages, without them to the server's next suggestion; or answers that others
    have judged and this person has not, beside those that `skip` names by their ids."""

    messages: list[ChatMessage] = []
    unjudged_by: str | None = None
    skip: list[str] = []

    @field_validator("messages")
    @classmethod
    def wait_for_an_answer(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        if messages and (messages[-1].role != "user" or not messages[-1].content.strip()):
            raise ValueError("the last one must be what a user says")
        return messages

    @property
    def conversation(self) -> list[Message]:
        return [turn.message for turn in self.messages]


class PreferenceRequest(Strict):
    """What a person says of a pair that the server has given."""

    pair: str
    winner: Winner
    by: str


def parse_request(body: bytes) -> ChatRequest:
    """Raises ApiError (400) with the name of what is wrong."""
    wanted = {}
    for name, value in json_object(body).items():
        if value is None:  # clients send null for what they leave open
            continue
        if name in MEANS_NOTHING:
            if value not in MEANS_NOTHING[name]:
                allowed = " and ".join(json.dumps(value) for value in MEANS_NOTHING[name] if value)
                message = f"This server has no '{name}'{f' other than {allowed}' if allowed else ''}; leave it out."
                raise ApiError(400, message, name, "unsupported_parameter")
        elif name not in IGNORED:
            wanted[name] = value
    return validated(ChatRequest, wanted)


def json_object(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body)
        json.dumps(given, ensure_ascii=False).encode()  # half of a surrogate pair is no character
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The request body is not JSON in UTF-8 ({error}).", code="invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(400, "The request body must be a JSON object.", code="invalid_json")
    return given


def validated(kind: type[Request], given: dict[str, Any]) -> Request:
    """Raises ApiError (400) with the name of what is wrong."""
    if unknown := next((name for name in given if name not in kind.model_fields), None):
        raise ApiError(400, f"Unrecognized request argument: {unknown[:80]}.", unknown[:80], "unknown_parameter")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).removeprefix(".")
        reason, fault = first["msg"].removeprefix("Value error, "), first["type"]
        reason = re.sub("a valid dictionary or instance of .*", "an object", reason)
        code = "missing_required_parameter" if fault == "missing" else "invalid_value"
        code = "invalid_type" if fault.endswith("_type") else code
        raise ApiError(400, f"{param}: {reason}.", param, code) from None
