"""The answers to one request: as they are drawn, and as a client gets them, in one JSON body or server-sent events."""

import asyncio
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from inference.chat_model import BROKEN, TextPieces
from inference.generation.sampler import OwnSample
from inference.serving.request import ApiError, ChatRequest


class Logprobs:
    """The log-probabilities of one model's tokens as the protocol has them; each token is looked at once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]  # decoders treat a first token differently
        self._byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
        self._known: dict[int, tuple[str, list[int] | None]] = {}

    def of(self, sample: OwnSample, positions: Sequence[int]) -> list[dict[str, Any]]:
        """The protocol's `content`, for the response tokens at these positions."""
        return [
            self._entry(sample.response_ids[i], sample.logprobs[i])
            | {"top_logprobs": [self._entry(*pair) for pair in sample.likeliest[i]] if sample.alternatives else []}
            for i in positions
        ]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        if token not in self._known:
            self._known[token] = self._text_and_bytes(token)
        text, in_bytes = self._known[token]
        return {"token": text, "bytes": in_bytes, "logprob": logprob}

    def _text_and_bytes(self, token: int) -> tuple[str, list[int] | None]:
        """What a token says inside a text; its bytes also where they are only a part of a character."""
        text = self._decode([*self._before, token]).removeprefix(self._decode(self._before))
        if BROKEN not in text:
            return text, list(text.encode())
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if match := re.fullmatch("<0x([0-9A-F]{2})>", name):
            return text, [int(match[1], 16)]
        return text, [self._byte_of[letter] for letter in name] if self._byte_of.keys() >= set(name) else None

    def _decode(self, ids: list[int]) -> str:
        return cast(str, self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


class StopStrings:
    """Lets text pass up to the first stop string. What may be the beginning of one is held back until that is clear."""

    def __init__(self, stops: Sequence[str]):
        self.stops = stops
        self.was_found = False
        self._held = ""

    def let_pass(self, piece: str, is_last: bool = False) -> str:
        """The text that can be shown now and was not shown before."""
        if self.was_found:
            return ""
        text = self._held + piece
        starts = [start for stop in self.stops if (start := text.find(stop)) >= 0]
        if starts:
            self.was_found = True
            return text[: min(starts)]
        shown = len(text) if is_last else len(text) - self._beginning_of_a_stop(text)
        self._held = text[shown:]
        return text[:shown]

    def _beginning_of_a_stop(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(stop) - 1 for stop in self.stops), default=0)
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)


@dataclass(frozen=True)
class Delta:
    """New text of one choice."""

    choice: int
    text: str
    finish: str | None = None
    """`stop` or `length`, with the last one."""
    logprobs: dict[str, Any] | None = None
    """The protocol's, of the tokens of the text, where they are asked for."""


@dataclass(frozen=True)
class Failure:
    """The rest will not come."""

    status: int
    message: str


class Choice:
    """One answer of a request as it is drawn."""

    def __init__(
        self, sample: OwnSample, decode: Callable[[list[int]], str], stops: Sequence[str], begun: Sequence[int] = ()
    ):
        """The answer continues the tokens `begun`, the end of its prompt."""
        self.sample = sample
        self.finish: str | None = None
        self.text = ""
        self._pieces, self._stops, self._begun = TextPieces(decode), StopStrings(stops), begun
        self._starts: list[int] = []  # of each token: the characters before it
        self._decoded = self._shown_tokens = 0

    def grow(self) -> str:
        """After a token: the text that can be shown now and was not before. A stop string ends the sample."""
        if self._begun and not self._starts:
            self._pieces.take(self._begun)
        self._starts.append(self._decoded)
        piece = self._pieces.take([*self._begun, *self.sample.response_ids], is_whole=self.sample.is_over)
        self._decoded += len(piece)
        shown = self._stops.let_pass(piece, is_last=self.sample.is_over)
        if self._stops.was_found:
            self.sample.ended = True
        if self.sample.is_over:
            self.finish = "stop" if self.sample.ended else "length"
        self.text += shown
        return shown

    def new_tokens(self) -> range:
        """Positions of the tokens of which something is shown now, and was not before."""
        shown = sum(start < len(self.text) for start in self._starts)
        if self.finish is not None and not self._stops.was_found:  # also those without text, except the end
            shown = len(self._starts) - self.sample.ended
        first, self._shown_tokens = self._shown_tokens, max(shown, self._shown_tokens)
        return range(first, self._shown_tokens)


class Completion:
    """The choices of one request. The worker draws them; `events` is for the event loop alone."""

    def __init__(
        self,
        samples: Sequence[OwnSample],
        decode: Callable[[list[int]], str],
        stops: Sequence[str] = (),
        streams: bool = False,
        begun: Sequence[int] = (),
        logprobs: Logprobs | None = None,
        note: str = "",
    ):
        """One that `streams` gives each delta, others whole answers. The prompts end with the `begun` tokens of an
        answer. With `logprobs` those of each token are given. The `note` is for the client.
        """
        self.choices = [Choice(sample, decode, stops, begun) for sample in samples]
        self.streams, self.note, self._logprobs = streams, note, logprobs
        self.events: asyncio.Queue[Delta | Failure] = asyncio.Queue()

    def grow(self, choice: Choice) -> Delta | None:
        """After a token of a choice: what the client is to get, if anything."""
        text = choice.grow()
        if not self.streams:
            text = choice.text if choice.finish is not None else ""
        if not text and choice.finish is None:
            return None
        logprobs = None
        if self._logprobs:
            logprobs = {"content": self._logprobs.of(choice.sample, choice.new_tokens()), "refusal": None}
        return Delta(choice.sample.index, text, choice.finish, logprobs)

    @property
    def response_tokens(self) -> int:
        return sum(len(choice.sample.response_ids) for choice in self.choices)

    @property
    def is_over(self) -> bool:
        return all(choice.finish is not None for choice in self.choices)


class Answers:
    """What the client of a request gets."""

    def __init__(self, request: ChatRequest, completion: Completion):
        self.request, self.completion = request, completion
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": request.model}
        if completion.note:
            self._head["note"] = completion.note

    async def body(self) -> dict[str, Any]:
        """The whole, when all choices have ended. Raises ApiError if they cannot."""
        choices = {}
        async for delta in self._deltas():
            message = {"role": "assistant", "content": delta.text, "refusal": None}
            choices[delta.choice] = {"message": message, "finish_reason": delta.finish, "logprobs": delta.logprobs}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [{"index": index, **choices[index]} for index in sorted(choices)],
            "usage": self._usage(),
        }

    async def events(self) -> AsyncIterator[bytes]:
        """The deltas as they come. An error ends the stream: the status has been sent already."""
        for index in range(len(self.completion.choices)):
            yield self._chunk([self._choice(index, {"role": "assistant", "content": ""})])
        try:
            async for delta in self._deltas():
                if delta.text or (delta.logprobs and delta.logprobs["content"]):
                    yield self._chunk([self._choice(delta.choice, {"content": delta.text}, logprobs=delta.logprobs)])
                if delta.finish is not None:
                    yield self._chunk([self._choice(delta.choice, {}, delta.finish)])
        except ApiError as error:
            yield server_sent(error.body)
            return
        if self.request.stream_options.include_usage:
            yield self._chunk([], self._usage())
        yield b"data: [DONE]\n\n"

    async def _deltas(self) -> AsyncIterator[Delta]:
        missing = len(self.completion.choices)
        while missing:
            event = await self.completion.events.get()
            if isinstance(event, Failure):
                raise ApiError(event.status, event.message)
            missing -= event.finish is not None
            yield event

    def _usage(self) -> dict[str, int]:
        prompt = len(self.completion.choices[0].sample.prompt_ids)
        response = self.completion.response_tokens
        return {"prompt_tokens": prompt, "completion_tokens": response, "total_tokens": prompt + response}

    def _choice(self, index: int, delta: dict[str, str], finish: str | None = None, logprobs: Any = None) -> Any:
        return {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        figures = {"usage": usage} if self.request.stream_options.include_usage else {}
        return server_sent({**self._head, "object": "chat.completion.chunk", "choices": choices, **figures})


def server_sent(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"
