"""The web application: the OpenAI protocol's paths, those of preferences, the health of the server, and the pages."""

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from inference.preferences import BlindPair
from inference.serving.answers import Answers, Completion
from inference.serving.judging import Collecting, Judging
from inference.serving.request import ApiError, PairRequest, PreferenceRequest, json_object, parse_request, validated
from inference.serving.server import Guard
from inference.serving.service import Service

MOST_BYTES = 2**20  # of a request
READ_ANYWAY = 8 * MOST_BYTES
"""A client that sends too much gets its answer only once all is read; what is longer still is cut off."""
CLIENT_GONE = 499
"""The status that a log shows for a client that left; nobody receives it."""
PREFERENCES_LINK = '<a href="prefer">Judge answers</a>'  # on the chat page
NO_PREFERENCES = "This server keeps no preferences: start it with rlhf-chat serve MODEL --preferences FILE."
BODY_SECONDS = 60
"""A request must have arrived after this time."""


def create_app(
    service: Service,
    token: str | None = None,
    loopback_only: bool = True,
    collecting: Collecting | None = None,
) -> Starlette:
    """`token` is what `/v1` asks for; `loopback_only` turns away requests under other names than localhost."""
    api, preferences = Api(service), Preferences(Judging(service, collecting) if collecting else None)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.stop)

    return Starlette(
        routes=[
            Route("/", page("page.html", without="" if collecting else PREFERENCES_LINK), methods=["GET"]),
            Route(
                "/prefer",
                page("prefer.html") if collecting else PlainTextResponse(NO_PREFERENCES, 404),
                methods=["GET"],
            ),
            Route("/health", api.health),
            Route("/v1/models", api.models),
            Route("/v1/models/{name}", api.model),
            Route("/v1/chat/completions", api.complete, methods=["POST"]),
            Route("/v1/pairs", preferences.pair, methods=["POST"]),
            Route("/v1/preferences", preferences.count),
            Route("/v1/preferences", preferences.judge, methods=["POST"]),
            Route("/v1/preferences", preferences.undo, methods=["DELETE"]),
        ],
        middleware=[Middleware(Guard, token=token, loopback_only=loopback_only)],
        exception_handlers={
            ApiError: show_error,
            HTTPException: show_http_error,
            ClientDisconnect: lambda request, error: Response(status_code=CLIENT_GONE),
            Exception: show_failure,
        },
        lifespan=lifespan,
    )


class Api:
    def __init__(self, service: Service):
        self.service = service

    async def health(self, request: Request) -> Response:
        """503 while shutting down, so that a balancer looks elsewhere."""
        models = {
            name: {"running": served.batch.running, "waiting": served.batch.waiting, "slots": served.batch.slots}
            for name, served in self.service.served.items()
        }
        status, code = ("shutting down", 503) if self.service.is_closing else ("ok", 200)
        return JSONResponse({"status": status, "models": models}, code)

    async def models(self, request: Request) -> Response:
        data = [self._describe(name) for name in self.service.served]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._describe(request.path_params["name"]))

    def _describe(self, name: str) -> dict[str, object]:
        """`context_length` and `max_tokens`, an answer's most, are ours; the rest is OpenAI's."""
        served = self.service.find(name)
        return {
            "id": name,
            "object": "model",
            "created": served.created,
            "owned_by": "rlhf-chat",
            "context_length": served.batch.context,
            "max_tokens": self.service.limits.max_tokens,
        }

    async def complete(self, request: Request) -> Response:
        wanted = parse_request(await read_json(request))
        completion = await self.service.begin(wanted)
        answers = Answers(wanted, completion)
        if wanted.stream:
            return EventStream(answers, self.service)
        try:
            return await until_gone(request, answers.body())
        finally:
            self.service.end(completion)


class EventStream(StreamingResponse):
    """Ends its completion whatever happens to the connection."""

    def __init__(self, answers: Answers, service: Service):
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(answers.events(), headers=headers, media_type="text/event-stream")
        self.completion: Completion = answers.completion
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.service.end(self.completion)


class Preferences:
    """Answers requests about pairs and preferences, with 404 where the server keeps none."""

    def __init__(self, judging: Judging | None):
        self._judging = judging

    @property
    def judging(self) -> Judging:
        if self._judging is None:
            raise ApiError(404, NO_PREFERENCES, code="no_preferences")
        return self._judging

    async def pair(self, request: Request) -> Response:
        judging = self.judging
        wanted = validated(PairRequest, json_object(await read_json(request)))

        async def body() -> dict[str, Any]:
            return shown_pair(await judging.draw(wanted))

        return await until_gone(request, body())

    async def count(self, request: Request) -> Response:
        judging = self.judging
        suggests = bool(judging.collecting.prompts)
        return JSONResponse({**await judging.count(request.query_params.get("by", "")), "suggests": suggests})

    async def judge(self, request: Request) -> Response:
        judging = self.judging
        await judging.judge(validated(PreferenceRequest, json_object(await read_json(request))))
        return JSONResponse({"kept": True})

    async def undo(self, request: Request) -> Response:
        return JSONResponse(shown_pair(await self.judging.undo(request.query_params.get("by", ""))))


def shown_pair(pair: BlindPair) -> dict[str, Any]:
    """A pair without what would tell whose answers they are."""
    return {"id": pair.id, "messages": pair.prompt, "answers": [pair.left.text, pair.right.text]}


async def until_gone(request: Request, body: Coroutine[Any, Any, Any]) -> Response:
    """The whole answer, or nothing if the client leaves before."""
    answer, gone = asyncio.ensure_future(body), asyncio.ensure_future(disconnection(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(answer.result()) if answer.done() else Response(status_code=CLIENT_GONE)
    finally:
        answer.cancel()
        gone.cancel()


async def disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_json(request: Request) -> bytes:
    """The body. Raises ApiError for another type, and for what is too large or does not come.

    A page of another site cannot send this type without asking first, and is never told yes.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "Send the request with 'Content-Type: application/json'.")
    body, size = [], 0
    try:
        announced = int(request.headers.get("content-length", 0))
        async with asyncio.timeout(BODY_SECONDS):
            if announced <= READ_ANYWAY:
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= MOST_BYTES:
                        body.append(chunk)
                    elif size > READ_ANYWAY:
                        break
    except TimeoutError:
        raise ApiError(408, f"The request has not arrived within {BODY_SECONDS} s; send it again.") from None
    if max(announced, size) > MOST_BYTES:
        raise ApiError(413, f"The request is larger than {MOST_BYTES:,} bytes; shorten the conversation.")
    return b"".join(body)


def page(name: str, without: str = "") -> HTMLResponse:
    """A page, which may load nothing and talk to nobody but this server."""
    html, style, script = (
        (files("inference.serving") / file).read_text(encoding="utf-8") for file in (name, "common.css", "common.js")
    )
    html = html.replace(without, "").replace("<style>", f"<style>{style}</style>\n<style>", 1)
    html = html.replace("<script>", f"<script>{script}</script>\n<script>", 1)
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    headers = {
        "content-security-policy": "default-src 'none'; connect-src 'self'; img-src data:; "
        f"script-src {hashes['script']}; style-src {hashes['style']}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    return HTMLResponse(html, headers=headers)


async def show_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def show_http_error(request: Request, error: Exception) -> Response:
    """Answer for a path or a method that does not exist."""
    assert isinstance(error, HTTPException)
    there = "GET /v1/models, POST /v1/chat/completions, GET /health and the pages at / and /prefer"
    message = f"There is no {request.method} {request.url.path[:80]} here; there are {there}."
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)


async def show_failure(request: Request, error: Exception) -> Response:  # the server's log has the traceback
    return JSONResponse(ApiError(500, "The server has failed at this; its log says why.").body, 500)
