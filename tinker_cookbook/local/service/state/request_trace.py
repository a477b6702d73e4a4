"""A session's timeline in the Chrome trace format, which Perfetto and chrome://tracing open."""

from __future__ import annotations

import json
import struct
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import NamedTuple

from tinker_cookbook.local.service.state.futures import Entry

__all__ = ["TraceLog"]

MAX_EVENTS_PER_SESSION = 20_000
MAX_EVENTS = 60_000
"""Maximum number for all sessions. Beyond it, the session without work for longest is dropped."""

_PACKED = struct.Struct("<3I3d")


class _Span(NamedTuple):
    kind: str
    lane: str
    outcome: str
    created_at: float
    started_at: float
    finished_at: float
    request_id: str


class _Spans:
    """The newest spans of a session. Each takes about a hundred bytes."""

    def __init__(self) -> None:
        self._packed: deque[bytes] = deque(maxlen=MAX_EVENTS_PER_SESSION)
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._packed)

    def add(self, span: _Span) -> None:
        names = (self._number(name) for name in span[:3])
        self._packed.append(_PACKED.pack(*names, *span[3:6]) + span.request_id.encode())

    def __iter__(self) -> Iterator[_Span]:
        for packed in self._packed:
            kind, lane, outcome, *times = _PACKED.unpack_from(packed)
            created_at, started_at, finished_at = times
            yield _Span(
                *(self._names[kind], self._names[lane], self._names[outcome]),
                *(created_at, started_at, finished_at, packed[_PACKED.size :].decode()),
            )

    def _number(self, name: str) -> int:
        if name not in self._numbers:
            self._numbers[name] = len(self._names)
            self._names.append(name)
        return self._numbers[name]


class TraceLog:
    """Finished requests of the sessions that worked last."""

    def __init__(self) -> None:
        self._spans: OrderedDict[str, _Spans] = OrderedDict()
        self._num_spans = 0

    def add(self, entry: Entry, lane: str, started_at: float) -> None:
        outcome = f"failed ({entry.category})" if entry.failed else "done"
        times = (entry.created_at, started_at, entry.finished_at or time.time())
        span = _Span(entry.kind, lane, outcome, *times, entry.request_id)
        spans = self._spans.setdefault(entry.session_id, _Spans())
        self._spans.move_to_end(entry.session_id)
        before = len(spans)
        spans.add(span)
        self._num_spans += len(spans) - before
        while self._num_spans > MAX_EVENTS:
            self.drop(next(iter(self._spans)))

    def drop(self, session_id: str) -> None:
        self._num_spans -= len(self._spans.pop(session_id, ()))

    def export(self, session_id: str) -> bytes:
        """Return the trace file; empty for a session without requests. Works on any thread."""
        events: list[dict] = []
        lanes: dict[str, int] = {}
        # requests may end in a different order than they began
        # copied in one step, because spans are added meanwhile
        spans = tuple(self._spans.get(session_id, ()))
        for span in sorted(spans, key=lambda span: span.started_at):
            lane = lanes.setdefault(span.lane, len(lanes) + 1)
            events.append(
                {
                    "name": span.kind,
                    "cat": "request",
                    "ph": "X",
                    "ts": span.started_at * 1e6,
                    "dur": (span.finished_at - span.started_at) * 1e6,
                    "pid": 1,
                    "tid": lane,
                    "args": {
                        "request_id": span.request_id,
                        "outcome": span.outcome,
                        "queued_ms": (span.started_at - span.created_at) * 1e3,
                    },
                }
            )
        for name, lane in lanes.items():
            args = {"name": name}
            events.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": lane, "args": args})
        return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}).encode()
