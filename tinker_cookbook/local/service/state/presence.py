"""Which clients are still alive and will fetch their results.

A client that waits for results polls for them and sends heartbeats. If its polls are disconnected
and no request follows, its process is gone. The same holds after a long time without any request.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tinker_cookbook.local.service.settings import Patience

__all__ = ["Presence"]


@dataclass(eq=False)
class _Client:
    heard_at: float = field(default_factory=time.monotonic)
    num_polls: int = 0
    was_cut: bool = False
    """Whether its last poll was disconnected before the answer."""
    ended_at: float | None = None
    """Time when it closed its session."""


class Presence:
    """Times of the last requests of sessions. Use it only on the event loop's thread."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._clients: dict[str, _Client] = {}

    def hear(self, session_id: str) -> None:
        """Record a request of a session."""
        client = self._clients.setdefault(session_id, _Client())
        client.heard_at = time.monotonic()
        client.was_cut = False

    @contextmanager
    def poll(self, session_id: str) -> Iterator[None]:
        """Mark a session as polling while the block runs."""
        self.hear(session_id)
        client = self._clients[session_id]
        client.num_polls += 1
        try:
            yield
        finally:
            client.num_polls -= 1
            client.heard_at = time.monotonic()

    def cut(self, session_id: str) -> None:
        """Record that a poll ended because its client disconnected."""
        self._clients.setdefault(session_id, _Client()).was_cut = True

    def end(self, session_id: str) -> None:
        """Record that a client has closed its session: it will not fetch results any more."""
        client = self._clients.setdefault(session_id, _Client())
        client.ended_at = time.monotonic()

    def is_lost(self, session_id: str) -> bool:
        """Return whether nobody will fetch the results of a session any more."""
        client = self._clients.setdefault(session_id, _Client())
        now, patience = time.monotonic(), self._patience
        if client.ended_at is not None:
            return now - client.ended_at > patience.ended_seconds
        seconds = patience.cut_seconds if client.was_cut else patience.silent_seconds
        return not client.num_polls and now - client.heard_at > seconds

    def forget_silent(self, seconds: float) -> None:
        """Drop the records of sessions without a request for this time."""
        before = time.monotonic() - seconds
        for session_id, client in list(self._clients.items()):
            if client.heard_at < before and not client.num_polls:
                del self._clients[session_id]
