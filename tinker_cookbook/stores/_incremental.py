"""A reader of a growing JSONL file: each byte is read once."""

from __future__ import annotations

import asyncio
import json
from collections import deque

from tinker_cookbook.stores.storage import Storage
from tinker_cookbook.utils.jsonl_log import Row

__all__ = ["IncrementalReader"]

_MAX_RECORDS = 1_000_000
SEEN_BYTES = 256
"""Bytes before the offset that are compared, to notice that the file was written anew."""


class IncrementalReader:
    """Reads the rows that were appended since the last call.

    A last line without its newline is read once it is complete. If the file was replaced, for
    example because a resumed run has dropped rows, it is read again from the start. Lines that are
    not JSON objects are counted in `num_bad_lines` and skipped.

    Args:
        storage: Where the file is.
        path: The file; it need not exist yet.
        max_records: Maximum number of newest rows to keep in `records`.
    """

    def __init__(self, storage: Storage, path: str, max_records: int = _MAX_RECORDS) -> None:
        self._storage = storage
        self._path = path
        self._records: deque[Row] = deque(maxlen=max_records)
        self._restart()

    @property
    def records(self) -> list[Row]:
        """All rows read so far that are still in the file, oldest first."""
        return list(self._records)

    @property
    def total_read(self) -> int:
        """Number of rows in the part of the file that has been read."""
        return self._total

    @property
    def known_keys(self) -> set[str]:
        """Keys of all rows read so far."""
        return set(self._keys)

    def read(self) -> list[Row]:
        """Return the new rows; after a replacement of the file, all its rows."""
        found = self._storage.stat(self._path)
        if found is None:
            self._restart()
            return []
        if found.size < self._offset or not self._continues():
            self._restart()
        if found.size == self._offset:
            return []
        try:
            data = self._storage.read_range(self._path, self._offset)
        except FileNotFoundError:  # deleted since the call of `stat`
            self._restart()
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        self._seen = (self._seen + complete)[-SEEN_BYTES:]
        rows = [row for line in complete.split(b"\n") if (row := self._parse(line)) is not None]
        self._records.extend(rows)
        self._total += len(rows)
        self._keys.update(*rows)
        return rows

    async def aread(self) -> list[Row]:
        """Run `read` in a thread."""
        return await asyncio.to_thread(self.read)

    def has_data(self) -> bool:
        """Return whether the file exists and is not empty."""
        found = self._storage.stat(self._path)
        return found is not None and found.size > 0

    def _restart(self) -> None:
        self._offset = 0
        self._seen = b""
        self._total = 0
        self.num_bad_lines = 0
        self._keys: set[str] = set()
        self._records.clear()

    def _continues(self) -> bool:
        """Return whether the bytes before the offset are those that were read there."""
        if not self._seen:
            return True
        start = self._offset - len(self._seen)
        try:
            return self._storage.read_range(self._path, start, len(self._seen)) == self._seen
        except FileNotFoundError:
            return False

    def _parse(self, line: bytes) -> Row | None:
        if not line.strip():
            return None
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            self.num_bad_lines += 1
            return None
        return row
