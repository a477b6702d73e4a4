"""Connections that do not wait forever: whoever connects must send the head of a request soon.

Nobody has shown a key at that point, and each open connection takes a file descriptor. What comes
after the head has times of its own: a body `http.BODY_SECONDS`, an idle connection that of uvicorn.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

__all__ = ["HEAD_SECONDS", "timed_protocol"]

HEAD_SECONDS = 20.0


def timed_protocol(head_seconds: float = HEAD_SECONDS) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol with a time in which a request's head must be there."""
    base: Any = AutoHTTPProtocol  # httptools' or h11's, whichever is installed

    class TimedProtocol(base):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Time what is not yet a request; more bytes of it do not begin the time anew."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop()
            elif self._timer is None:
                self._timer = self.loop.call_later(head_seconds, self.transport.close)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return TimedProtocol
