"""Who may hold a connection, and how long: a client that sends half a request, or reads no answer, keeps nobody out.

uvicorn has no limits on the time of headers, on what comes after an answer, or on readers that stop; in front of the
token, anybody could take all descriptors with them.
"""

import asyncio
import resource
from collections.abc import Collection
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0
"""In which the headers of a request must have come, since the connection or the answer before."""
READER_SECONDS = 60.0
"""In which a client must take some of an answer that waits for it."""


class Connection(H11Protocol):
    """Besides uvicorn's own states it is waiting, without a request, or its request is on the way."""

    header_seconds, reader_seconds = HEADER_SECONDS, READER_SECONDS
    since = 0.0
    """When it began to wait, or its request to come, by the clock of the loop."""
    _headers: asyncio.TimerHandle | None = None
    _reader: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, most: int, **options: Any):
        """One of `most` that are there at a time; the other arguments are uvicorn's."""
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
    """Cut off one that waits or whose request has not come whole, the oldest; what is answered stays."""
    unfinished = [each for each in connections if each.is_waiting or each.cycle.more_body]
    open_ones = [each for each in unfinished if not each.transport.is_closing()]
    if open_ones:
        min(open_ones, key=lambda each: each.since).transport.abort()


def most_connections(places: int) -> int:
    """For answers that have `places`, and others that come and go: at most half of the descriptors there are."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(1024 + places, descriptors // 2)
