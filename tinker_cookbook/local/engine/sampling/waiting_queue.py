"""The waiting queue, one line per client: new requests, and suspended sequences. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from tinker_cookbook.local.engine.sampling.sequence import Request, Sequence, SequenceStatus

__all__ = ["WaitingQueue"]


@dataclass(eq=False)
class _Line:
    """What one client waits for."""

    requests: deque[Request] = field(default_factory=deque)
    """Requests whose prompts have not been started."""
    suspended: deque[Sequence] = field(default_factory=deque)
    """Sequences that have tokens but no row; they come before the client's new requests."""


class WaitingQueue:
    """Lines of the clients that wait for something."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}

    def __len__(self) -> int:
        """Number of waiting requests and suspended sequences."""
        lines = self._lines.values()
        return sum(len(line.requests) + len(line.suspended) for line in lines)

    def __bool__(self) -> bool:
        return bool(self._lines)

    def clients(self) -> list[str]:
        """Return the clients that wait, in the order in which their lines began."""
        return list(self._lines)

    def requests(self) -> Iterator[Request]:
        """Yield all requests that have not been started."""
        for line in self._lines.values():
            yield from line.requests

    def suspended(self) -> Iterator[Sequence]:
        """Yield all suspended sequences."""
        for line in self._lines.values():
            yield from line.suspended

    def add_request(self, request: Request) -> None:
        """Put a new request at the end of its client's line."""
        self._line(request.client).requests.append(request)

    def suspend(self, sequence: Sequence, *, first: bool = False) -> None:
        """Put a sequence that lost its row, or never got one, behind or before its client's other
        suspended sequences.
        """
        sequence.status = SequenceStatus.SUSPENDED
        line = self._line(sequence.request.client).suspended
        if first:
            line.appendleft(sequence)
        else:
            line.append(sequence)

    def next_of(self, client: str) -> Sequence | Request:
        """Return what a client's next place is for."""
        line = self._lines[client]
        return line.suspended[0] if line.suspended else line.requests[0]

    def take_sequence(self, sequence: Sequence) -> None:
        """Remove a suspended sequence that gets a place."""
        client = sequence.request.client
        self._lines[client].suspended.remove(sequence)
        self._drop_if_empty(client)

    def take_request(self, client: str) -> Request:
        """Remove and return the oldest request of a client."""
        request = self._lines[client].requests.popleft()
        self._drop_if_empty(client)
        return request

    def drop(self, request: Request) -> None:
        """Remove a request and its suspended sequences, if they are in the queue."""
        line = self._lines.get(request.client)
        if line is None:
            return
        line.requests = deque(r for r in line.requests if r is not request)
        line.suspended = deque(s for s in line.suspended if s.request is not request)
        self._drop_if_empty(request.client)

    def _line(self, client: str) -> _Line:
        return self._lines.setdefault(client, _Line())

    def _drop_if_empty(self, client: str) -> None:
        line = self._lines[client]
        if not line.requests and not line.suspended:
            del self._lines[client]
