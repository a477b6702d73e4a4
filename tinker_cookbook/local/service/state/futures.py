"""Results of requests, which clients may fetch repeatedly, and the rule by which they are dropped.

A result is kept for `result_keep_seconds` after it was finished, or, if it has been read, for
`read_keep_seconds` after the last read. If finished results together exceed `result_keep_bytes`,
the oldest are dropped first. The id of a dropped result is answered with "gone", as are ids from
before a restart of the service. An id that no service made is unknown.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Literal

from tinker_cookbook.local.errors import shorten_message

__all__ = ["Entry", "FutureTable", "Payload"]

Category = Literal["user", "server", "unknown"]
_REQUEST_ID = re.compile(r"req-[0-9a-f]{8}-[0-9a-f]{32}")
PROTOBUF = "application/x-protobuf"
JSON = "application/json"
_DONE = asyncio.Event()
_DONE.set()


@dataclass(frozen=True)
class Payload:
    """A finished result, serialized."""

    body: bytes
    content_type: str

    @classmethod
    def of_json(cls, value: Mapping[str, object]) -> Payload:
        return cls(json.dumps(value).encode(), JSON)

    @classmethod
    def of_proto(cls, body: bytes) -> Payload:
        return cls(body, PROTOBUF)

    @classmethod
    def of_failure(cls, message: str, category: Category) -> Payload:
        return cls.of_json({"error": message, "category": category})


@dataclass(eq=False)
class Entry:
    """One request's future."""

    request_id: str
    kind: str
    session_id: str
    group: str | None
    """Name of the sampling client that polls for this and other results together, or None."""
    created_at: float = field(default_factory=time.time)
    finished_at: float | None = None
    payload: Payload | None = None
    failed: bool = False
    category: Category | None = None
    read_at: float = 0.0
    """Time of the last read; before the first read, the time when it was finished."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    is_unwanted: bool = False
    """Whether its client is gone. The result is then not kept, and its id is answered with
    "gone"."""


class _Group:
    """Finished requests of one sampling client, in order, for `retrieve_futures`."""

    def __init__(self) -> None:
        self.finished: deque[Entry] = deque()
        self.trimmed = 0
        self.changed = asyncio.Event()

    def add(self, entry: Entry) -> None:
        self.finished.append(entry)
        self.changed.set()

    def after(self, cursor: int) -> list[Entry]:
        for _ in range(max(0, min(cursor - self.trimmed, len(self.finished)))):
            self._drop_oldest()
        return list(self.finished)

    def forget(self, kept: Container[str]) -> None:
        """Drop entries whose results are no longer kept. Many clients never ask for these."""
        while self.finished and self.finished[0].request_id not in kept:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        self.finished.popleft()
        self.trimmed += 1


class FutureTable:
    """All futures of this process. Use it only on the event loop's thread."""

    def __init__(
        self, *, keep_seconds: float, keep_bytes: int, read_keep_seconds: float | None = None
    ) -> None:
        """Without `read_keep_seconds`, read and unread results are kept equally long."""
        self.instance = secrets.token_hex(4)
        self._keep_seconds = keep_seconds
        self._read_keep_seconds = keep_seconds if read_keep_seconds is None else read_keep_seconds
        self._keep_bytes = keep_bytes
        self._entries: dict[str, Entry] = {}
        self._unread: OrderedDict[str, Entry] = OrderedDict()
        self._read: OrderedDict[str, Entry] = OrderedDict()
        """Finished entries, never read and read, each in the order of `read_at`."""
        self._finished_bytes = 0
        self._groups: dict[str, _Group] = {}

    def create(self, kind: str, session_id: str, *, group: str | None = None) -> Entry:
        request_id = f"req-{self.instance}-{secrets.token_hex(16)}"
        entry = Entry(request_id, kind, session_id, group)
        self._entries[request_id] = entry
        return entry

    def resolve(self, entry: Entry, payload: Payload) -> None:
        """Finish an entry. Only the first call has an effect."""
        if entry.payload is not None:
            return
        entry.payload = payload
        entry.finished_at = entry.read_at = time.time()
        entry.done.set()
        entry.done = _DONE  # one shared event: an event takes more memory than many results
        if entry.is_unwanted:
            self._entries.pop(entry.request_id, None)
            return
        self._unread[entry.request_id] = entry
        self._finished_bytes += len(payload.body)
        if entry.group is not None:
            self._groups.setdefault(entry.group, _Group()).add(entry)

    def fail(self, entry: Entry, message: str, category: Category) -> None:
        if entry.payload is None:
            entry.failed = True
            entry.category = category
            self.resolve(entry, Payload.of_failure(shorten_message(message), category))

    def get(self, request_id: str) -> Entry | None:
        return self._entries.get(request_id)

    def is_gone(self, request_id: str) -> bool:
        """Return whether a service made this id and no longer keeps the result."""
        return _REQUEST_ID.fullmatch(request_id) is not None and request_id not in self._entries

    async def wait(self, entry: Entry, seconds: float) -> bool:
        """Wait until an entry is finished; returns False if the time is over."""
        if not entry.done.is_set():
            try:
                await asyncio.wait_for(entry.done.wait(), seconds)
            except TimeoutError:
                return False
        self._touch(entry)
        return True

    def _touch(self, entry: Entry) -> None:
        entry.read_at = time.time()
        if self._unread.pop(entry.request_id, None) is not None:
            self._read[entry.request_id] = entry
        elif entry.request_id in self._read:
            self._read.move_to_end(entry.request_id)

    async def wait_group(self, group: str, cursor: int, seconds: float) -> tuple[list[Entry], int]:
        """Return the entries of a group that finished after `cursor`, and the new cursor."""
        state = self._groups.setdefault(group, _Group())
        entries = state.after(cursor)
        if not entries and seconds > 0:
            state.changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(state.changed.wait(), seconds)
            entries = state.after(cursor)
        return entries, state.trimmed + len(state.finished)

    def drop(self, request_ids: list[str]) -> None:
        """Drop finished results that the client has received."""
        for request_id in request_ids:
            entry = self._read.get(request_id) or self._unread.get(request_id)
            if entry is not None:
                self._forget(entry)

    def expire(self, now: float | None = None) -> int:
        """Drop results by the rule of this module; returns their number."""
        now = time.time() if now is None else now
        before = len(self._entries)
        for results, seconds in (
            (self._unread, self._keep_seconds),
            (self._read, self._read_keep_seconds),
        ):
            while results and now - _oldest(results).read_at > seconds:
                self._forget(_oldest(results))
        while self._finished_bytes > self._keep_bytes:
            heads = [_oldest(results) for results in (self._unread, self._read) if results]
            self._forget(min(heads, key=lambda entry: entry.read_at))
        return before - len(self._entries)

    def _forget(self, entry: Entry) -> None:
        self._unread.pop(entry.request_id, None)
        self._read.pop(entry.request_id, None)
        self._entries.pop(entry.request_id, None)
        if entry.payload is not None:
            self._finished_bytes -= len(entry.payload.body)
        group = self._groups.get(entry.group) if entry.group is not None else None
        if group is not None:
            group.forget(self._entries)

    def drop_group(self, sampler_id: str) -> None:
        """Drop the groups of a sampling session that has ended."""
        for group in [g for g in self._groups if g.rpartition("#")[0] == sampler_id]:
            del self._groups[group]

    def unfinished(self, session_id: str | None = None) -> list[Entry]:
        return [
            entry
            for entry in self._entries.values()
            if entry.payload is None and session_id in (None, entry.session_id)
        ]

    def has_unread(self) -> bool:
        """Return whether a finished result was never fetched."""
        return bool(self._unread)

    def stats(self) -> dict[str, float]:
        return {
            "futures": len(self._entries),
            "futures_unfinished": len(self._entries) - len(self._unread) - len(self._read),
            "futures_result_bytes": self._finished_bytes,
        }


def _oldest(results: OrderedDict[str, Entry]) -> Entry:
    return next(iter(results.values()))
