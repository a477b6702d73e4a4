"""Heads of requests: whoever connects must send one soon.

Nobody has shown a key at that point, and each open connection takes a file descriptor. What comes
after the head has times of its own: a body `http.BODY_SECONDS`, an idle connection that of uvicorn.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

__all__ = ["HEAD_SECONDS", "timed_protocol"]

HEAD_SECONDS = 20.0


def timed_protocol(
    head_seconds: float = HEAD_SECONDS, *, base: Any = AutoHTTPProtocol
) -> type[asyncio.Protocol]:
    """An HTTP protocol of uvicorn with a time in which a request's head must be there.

    Args:
        base: httptools' or h11's, whichever is installed, or something made of it.
    """

    class TimedProtocol(base):
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._time_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._time_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_head()
            super().connection_lost(exc)

        def _time_head(self) -> None:
            """Time what is not yet a request; more bytes of it do not begin the time anew."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._end_head()
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(head_seconds, self.transport.close)

        def _end_head(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return TimedProtocol
