"""What waits to be sampled, per client: new requests, and sequences that have begun. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from tinker_cookbook.local.engine.sampling.sequence import Request, Sequence

__all__ = ["Backlog"]


@dataclass(eq=False)
class _Line:
    """What one client waits for."""

    requests: deque[Request] = field(default_factory=deque)
    sequences: deque[Sequence] = field(default_factory=deque)
    """They have tokens already, but no place."""


class Backlog:
    """Lines of clients; one that has nothing waiting has none."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}

    def __len__(self) -> int:
        """How many requests and sequences wait."""
        lines = self._lines.values()
        return sum(len(line.requests) + len(line.sequences) for line in lines)

    def __bool__(self) -> bool:
        return bool(self._lines)

    def clients(self) -> list[str]:
        """Clients with something waiting, in the order in which their lines began."""
        return list(self._lines)

    def requests(self) -> Iterator[Request]:
        """Requests that have not begun."""
        for line in self._lines.values():
            yield from line.requests

    def sequences(self) -> Iterator[Sequence]:
        """Sequences that have begun."""
        for line in self._lines.values():
            yield from line.sequences

    def add_request(self, request: Request) -> None:
        """Put a new request at the end of its client's line."""
        self._line(request.client).requests.append(request)

    def add_sequence(self, sequence: Sequence, *, first: bool = False) -> None:
        """Put a sequence that has begun at the end of its line, or at its beginning."""
        sequences = self._line(sequence.request.client).sequences
        if first:
            sequences.appendleft(sequence)
        else:
            sequences.append(sequence)

    def next_of(self, client: str) -> Sequence | Request:
        """What a client waits for first; sequences that have begun come before requests."""
        line = self._lines[client]
        return line.sequences[0] if line.sequences else line.requests[0]

    def remove_sequence(self, sequence: Sequence) -> None:
        """Take out a sequence that gets a place."""
        client = sequence.request.client
        self._lines[client].sequences.remove(sequence)
        self._drop_if_empty(client)

    def take_request(self, client: str) -> Request:
        """Take out the request that a client waits for longest."""
        request = self._lines[client].requests.popleft()
        self._drop_if_empty(client)
        return request

    def remove(self, request: Request) -> None:
        """Take out a request and its sequences; one that is not here is left alone."""
        line = self._lines.get(request.client)
        if line is None:
            return
        line.requests = deque(r for r in line.requests if r is not request)
        line.sequences = deque(s for s in line.sequences if s.request is not request)
        self._drop_if_empty(request.client)

    def _line(self, client: str) -> _Line:
        return self._lines.setdefault(client, _Line())

    def _drop_if_empty(self, client: str) -> None:
        line = self._lines[client]
        if not line.requests and not line.sequences:
            del self._lines[client]
