"""Connections whose other end is slow: it has gone, takes nothing, or does not say what it wants.

Nobody has shown a key before the head of a request is there, and each open connection takes a file
descriptor, so the head must come soon. What comes after it has times of its own: a body
`http.BODY_SECONDS`, an idle connection that of uvicorn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from uvicorn.protocols.http.auto import AutoHTTPProtocol

__all__ = ["HttpProtocol", "unless_gone", "wait_until_gone"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Await work that is cancelled when the client goes away; the request's body must be read.

    Raises:
        ClientDisconnect: it went away.
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
    """Return when the client has closed its connection; the request's body must be read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class HttpProtocol(AutoHTTPProtocol):
    """uvicorn's protocol, which cuts off a connection that sends no request or takes no answer.

    Whoever writes waits until the client has taken what was written before; that ends with it.
    """

    head_seconds = 20.0
    """How long a client may take to send the head of a request; then its connection ends."""
    write_seconds = 20.0
    """How long a client may take nothing; then its connection ends."""
    transport: Any
    cycle: Any
    _head_timer: asyncio.TimerHandle | None = None
    _unread = 0
    _check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def _watch_head(self) -> None:
        """Time what is not yet a request; more bytes of it do not begin the time anew."""
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
        logger.warning("a client took nothing of its answer for %g s; cut off", self.write_seconds)
        self.transport.abort()
