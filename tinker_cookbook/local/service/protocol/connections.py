"""Time limits for connections whose client is gone, does not read, or does not send a request.

Each open connection uses a file descriptor, and a client shows its key only with the head of a
request, so the head must arrive soon. Other limits apply later: `http.BODY_SECONDS` to the body,
and uvicorn's keep-alive timeout to an idle connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from uvicorn.protocols.http.auto import AutoHTTPProtocol

__all__ = ["HttpProtocol", "unless_gone", "wait_until_gone"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Await work, and cancel it if the client disconnects. The request's body must have been read.

    Raises:
        ClientDisconnect: the client disconnected first.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(wait_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def wait_until_gone(request: Request) -> None:
    """Return when the client has disconnected. The request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Cycle(Protocol):
    """A request and its answer, in uvicorn."""

    response_complete: bool


class HttpProtocol(AutoHTTPProtocol):
    """uvicorn's protocol, which closes connections whose client stops sending or stops reading.

    A function that writes an answer waits until the client has read what was written before.
    Closing the connection also ends this wait.
    """

    head_seconds = 20.0
    """Time limit for the head of a request."""
    write_seconds = 20.0
    """Time limit for reading the next part of an answer."""
    transport: asyncio.Transport
    cycle: _Cycle | None
    _head_timer: asyncio.TimerHandle | None = None
    _unread = 0
    _check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def _watch_head(self) -> None:
        """Start the timer for the head of a request; more bytes of the head do not restart it."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching_head()
        elif self._head_timer is None:
            loop = asyncio.get_running_loop()
            self._head_timer = loop.call_later(self.head_seconds, self.transport.close)

    def _stop_watching_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_watching()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        self._stop_watching_head()
        super().connection_lost(exc)

    def _watch(self) -> None:
        self._stop_watching()
        self._unread = self.transport.get_write_buffer_size()
        self._check = asyncio.get_running_loop().call_later(self.write_seconds, self._look)

    def _stop_watching(self) -> None:
        if self._check is not None:
            self._check.cancel()
            self._check = None

    def _look(self) -> None:
        if self.transport.get_write_buffer_size() < self._unread:
            self._watch()
            return
        logger.warning(
            "a client did not read its answer for %g s; its connection is closed",
            self.write_seconds,
        )
        self.transport.abort()
