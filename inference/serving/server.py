"""The server's life, from start to Ctrl-C."""

import asyncio
import errno
import hmac
import ipaddress
import math
import re
import resource
import socket
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from inference.errors import UserError
from inference.serving.request import ApiError
from inference.serving.service import Service

GRACE_SECONDS = 5.0
"""Answers have this long to end after Ctrl-C."""
BACKLOG = 1024
"""Connections that the system holds until they are accepted."""


class Connection(H11Protocol):
    """Adds to uvicorn's a time limit for headers, one for readers, and an end of the oldest where there are too many.

    Until its request begins it is waiting.
    """

    header_seconds = 10.0
    """Headers of a request must have come by then, after the connection or the answer before."""
    reader_seconds = 60.0
    """A client must take some of an answer that waits for it by then."""
    since = 0.0
    """When it began to wait, or its request to come, by the clock of the loop."""
    _headers: asyncio.TimerHandle | None = None
    _reader: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, most: int, **options: Any):
        """One of at most `most` connections; the other arguments are uvicorn's."""
        super().__init__(*arguments, **options)
        self.most = most

    @property
    def is_waiting(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > self.most:
            make_room(self.connections)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_waiting = self.is_waiting
        super().data_received(data)
        if was_waiting and not self.is_waiting:
            self._forget()
            self.since = self.loop.time()

    def on_response_complete(self) -> None:
        """Begins the next request, if that has come already."""
        self._wait()
        super().on_response_complete()
        if not self.is_waiting:
            self._forget()

    def pause_writing(self) -> None:
        self._reader = self.loop.call_later(self.reader_seconds, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
        super().resume_writing()

    def _wait(self) -> None:
        self._forget()
        self.since = self.loop.time()
        self._headers = self.loop.call_later(self.header_seconds, self._expire)

    def _expire(self, unread: int = -1) -> None:
        """A client that still reads the answer before, slowly, has more time."""
        left = self.transport.get_write_buffer_size()
        if left in (0, unread):
            self.transport.abort()
        else:
            self._headers = self.loop.call_later(self.header_seconds, self._expire, left)

    def _forget(self) -> None:
        if self._headers is not None:
            self._headers.cancel()


def make_room(connections: Collection[Any]) -> None:
    """Cut off the oldest one that waits or whose request has not come whole; those being answered stay."""
    unfinished = [connection for connection in connections if connection.is_waiting or connection.cycle.more_body]
    still_open = [connection for connection in unfinished if not connection.transport.is_closing()]
    if still_open:
        min(still_open, key=lambda connection: connection.since).transport.abort()


def most_connections(answers: int) -> int:
    """Those of so many answers and 1024 others, but at most half of the process's file descriptors."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(1024 + answers, descriptors // 2)


class Server(uvicorn.Server):
    """Ends in order: at the first Ctrl-C answers may end, at the second they are cut off."""

    def __init__(
        self,
        app: Starlette,
        service: Service,
        ready: Callable[[], None],
        grace: float = GRACE_SECONDS,
        connections: int | None = None,
    ):
        """`ready` is called when requests are taken; `grace` is in seconds; `connections` is the most at a time."""
        most = connections or most_connections(service.limits.capacity * len(service.served))
        super().__init__(
            uvicorn.Config(
                app,
                http=cast(Any, partial(Connection, most=most)),
                backlog=max(1, most // 4),  # asyncio takes as many in one go, before the first of them is counted
                ws="none",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=math.ceil(grace) + 2,  # for clients that do not read what they are sent
            )
        )
        self._service, self._ready, self._grace = service, ready, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Replaces uvicorn's, which raises the signal again at the end."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(BACKLOG)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.create_task(self._service.close(self._grace, is_hurried=lambda: self.force_exit))
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn goes at once; who is cut off should hear so
            await closing
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    while self.server_state.connections:
                        await asyncio.sleep(0.02)
            await self.lifespan.shutdown()
        closing.cancel()

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            super().run(sockets)
        finally:
            self._service.stop()


LOOPBACK_NAMES = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)


class Guard:
    """Asks for a token where one is set, and turns away requests that came here under another machine's name.

    A page from elsewhere can point its own name at this machine and then read what a server on the loopback interface
    answers (DNS rebinding). Its requests carry that name in their Host header.
    """

    def __init__(self, app: ASGIApp, token: str | None, loopback_only: bool):
        self.app = app
        self._token = None if token is None else token.encode()
        self._loopback_only = loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope["path"], Headers(scope=scope))
            except ApiError as error:
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if self._loopback_only and not is_loopback_name(hosts):
            raise ApiError(403, "This server answers to localhost and 127.0.0.1 alone.", code="wrong_host")
        if self._token is not None and path.startswith("/v1/"):
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
                message = "A token is needed, as the API key: 'Authorization: Bearer TOKEN'."
                raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def is_loopback_name(hosts: Iterable[str]) -> bool:
    """Whether the values of Host headers are exactly one, which names this machine's loopback."""
    names = list(hosts)
    return len(names) == 1 and LOOPBACK_NAMES.fullmatch(names[0]) is not None


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A socket that nobody else has; port 0 is a free one. Raises UserError with the way out."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()  # until then another process can bind the same port
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            raise UserError(f"Port {port} is in use; give another one, such as --port {port % 65535 + 1}.") from None
        if number == errno.EACCES:
            raise UserError(f"Port {port} needs more rights than you have; give one above 1023 with --port.") from None
        raise UserError(f"Nothing can listen on {host} ({error}); give an address of this machine as --host.") from None
    return listener
