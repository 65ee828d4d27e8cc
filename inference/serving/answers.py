"""What a client gets for a job: one JSON body, or a stream of server-sent events."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from inference.serving.request import ApiError, ChatRequest
from inference.serving.worker import Failure, Job, Piece

DONE = b"data: [DONE]\n\n"


class Answers:
    """The answers to one request."""

    def __init__(self, request: ChatRequest, job: Job):
        self.request, self.job = request, job
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": request.model}
        if job.note:
            self._head["note"] = job.note

    async def body(self) -> dict[str, Any]:
        """The whole, when all choices have ended. Raises ApiError if they cannot."""
        choices = {}
        async for piece in self._pieces():
            message = {"role": "assistant", "content": piece.text, "refusal": None}
            choices[piece.choice] = {"message": message, "finish_reason": piece.finish, "logprobs": shown(piece)}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [{"index": index, **choices[index]} for index in sorted(choices)],
            "usage": self._usage(),
        }

    async def events(self) -> AsyncIterator[bytes]:
        """The pieces as they come. An error ends the stream: the status has been sent already."""
        for index in range(len(self.job.choices)):
            yield self._chunk([self._choice(index, {"role": "assistant", "content": ""})])
        try:
            async for piece in self._pieces():
                if piece.text or piece.logprobs:
                    yield self._chunk([self._choice(piece.choice, {"content": piece.text}, logprobs=shown(piece))])
                if piece.finish is not None:
                    yield self._chunk([self._choice(piece.choice, {}, piece.finish)])
        except ApiError as error:
            yield server_sent(error.body)
            return
        if self.request.stream_options.include_usage:
            yield self._chunk([], self._usage())
        yield DONE

    async def _pieces(self) -> AsyncIterator[Piece]:
        missing = len(self.job.choices)
        while missing:
            event = await self.job.events.get()
            if isinstance(event, Failure):
                raise ApiError(event.status, event.message)
            missing -= event.finish is not None
            yield event

    def _usage(self) -> dict[str, int]:
        prompt, completion = self.job.prompt_tokens, self.job.response_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _choice(self, index: int, delta: dict[str, str], finish: str | None = None, logprobs: Any = None) -> Any:
        return {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        figures = {"usage": usage} if self.request.stream_options.include_usage else {}
        return server_sent({**self._head, "object": "chat.completion.chunk", "choices": choices, **figures})


def shown(piece: Piece) -> dict[str, Any] | None:
    """A piece's log-probabilities, if they are asked for."""
    return None if piece.logprobs is None else {"content": piece.logprobs, "refusal": None}


def server_sent(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"
