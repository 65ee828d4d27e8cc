"""The server's life, from start to Ctrl-C."""

import asyncio
import math
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn
from starlette.applications import Starlette

from inference.serving.connection import Connection, most_connections
from inference.serving.service import Service

GRACE = 5.0
"""Seconds that answers have to end in after Ctrl-C."""

KNOCKING = 1024
"""Connections that the system holds until they are taken."""


class Server(uvicorn.Server):
    """Ends in order: at the first Ctrl-C answers may end, at the second they are cut off."""

    def __init__(
        self,
        app: Starlette,
        service: Service,
        ready: Callable[[], None],
        grace: float = GRACE,
        connections: int | None = None,
    ):
        """`ready` is called when requests are taken; `grace` is in seconds; `connections` are there at a time."""
        most = connections or most_connections(service.limits.places * len(service.desks))
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
        """In place of uvicorn's, which raises the signal again when all is done."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(KNOCKING)
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
