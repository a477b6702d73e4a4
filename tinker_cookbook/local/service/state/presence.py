"""Which clients are still there to fetch what is computed for them.

A client at work holds a request for each result it waits for and sends heartbeats meanwhile. Ended
connections without anything after them tell that its process is gone; so does a long silence.
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
    """Whether its last request was left without an answer."""
    ended_at: float | None = None
    """When it closed its session."""


class Presence:
    """Signs of life of sessions. Used on the event loop's thread only."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._clients: dict[str, _Client] = {}

    def hear(self, session_id: str) -> None:
        """Note a request of a session."""
        client = self._clients.setdefault(session_id, _Client())
        client.heard_at = time.monotonic()
        client.was_cut = False

    @contextmanager
    def poll(self, session_id: str) -> Iterator[None]:
        """While a request of a session is held; ClientDisconnect is for the caller to raise."""
        self.hear(session_id)
        client = self._clients[session_id]
        client.num_polls += 1
        try:
            yield
        finally:
            client.num_polls -= 1
            client.heard_at = time.monotonic()

    def cut(self, session_id: str) -> None:
        """Note that a held request ended because its connection did."""
        self._clients.setdefault(session_id, _Client()).was_cut = True

    def end(self, session_id: str) -> None:
        """Note that a client has closed its session, after which it takes no results."""
        client = self._clients.setdefault(session_id, _Client())
        client.ended_at = time.monotonic()

    def is_lost(self, session_id: str) -> bool:
        """Whether nobody will come for results any more."""
        client = self._clients.setdefault(session_id, _Client())
        now, patience = time.monotonic(), self._patience
        if client.ended_at is not None:
            return now - client.ended_at > patience.ended_seconds
        seconds = patience.cut_seconds if client.was_cut else patience.silent_seconds
        return not client.num_polls and now - client.heard_at > seconds

    def forget_silent(self, seconds: float) -> None:
        """Drop what is known of sessions not heard of for so long."""
        before = time.monotonic() - seconds
        for session_id, client in list(self._clients.items()):
            if client.heard_at < before and not client.num_polls:
                del self._clients[session_id]
