"""The waiting queue, one line per client: new requests, and suspended sequences. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from tinker_cookbook.local.engine.sampling.prefix_index import PrefixIndex
from tinker_cookbook.local.engine.sampling.sequence import Request, Sequence, SequenceStatus

__all__ = ["WaitingQueue"]

_MOST_AHEAD = 64
"""Number of requests of a client that are considered for its next place."""


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
        self._beginnings = PrefixIndex[Request]()
        """The waiting requests that can share prefixes with each other."""

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
        if request.is_single_pass:
            self._beginnings.add(request, request.hashes)

    def num_shared(self, request: Request) -> int:
        """Return how many prompt tokens a waiting request shares with another, in whole blocks."""
        return self._beginnings.num_shared(request.hashes, with_items=2)

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

    def line_of(self, client: str) -> list[Sequence | Request]:
        """Return what a client's next places are for, in this order."""
        line = self._lines[client]
        return [*line.suspended, *islice(line.requests, _MOST_AHEAD)]

    def take_sequence(self, sequence: Sequence) -> None:
        """Remove a suspended sequence that gets a place."""
        client = sequence.request.client
        self._lines[client].suspended.remove(sequence)
        self._drop_if_empty(client)

    def take_request(self, request: Request) -> None:
        """Remove a request that gets a place."""
        self._lines[request.client].requests.remove(request)
        self._leave(request)

    def drop(self, request: Request) -> None:
        """Remove a request and its suspended sequences, if they are in the queue."""
        line = self._lines.get(request.client)
        if line is None:
            return
        line.requests = deque(r for r in line.requests if r is not request)
        line.suspended = deque(s for s in line.suspended if s.request is not request)
        self._leave(request)

    def _leave(self, request: Request) -> None:
        if request.is_single_pass:
            self._beginnings.discard(request, request.hashes)
        self._drop_if_empty(request.client)

    def _line(self, client: str) -> _Line:
        return self._lines.setdefault(client, _Line())

    def _drop_if_empty(self, client: str) -> None:
        line = self._lines[client]
        if not line.requests and not line.suspended:
            del self._lines[client]
