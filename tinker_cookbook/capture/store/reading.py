"""Open and read stores of recorded calls, whatever their kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from tinker_cookbook.capture.calls import RecordedCall
from tinker_cookbook.capture.store.database import CallDatabase, is_database, read_database
from tinker_cookbook.capture.store.files import CallLog, read_lines

__all__ = ["CallStore", "open_calls", "read_calls"]

_DATABASES = (".sqlite", ".sqlite3", ".db")


class CallStore(Protocol):
    """Keeps recorded calls."""

    def append(self, call: RecordedCall) -> None:
        """Keep a call; afterwards, a kill of the process does not lose it."""
        ...

    def close(self) -> None:
        """Close the store."""
        ...


def open_calls(path: str | Path, *, sync_to_disk: bool = False) -> CallLog | CallDatabase:
    """Open a store to append: a database for .sqlite, .sqlite3 or .db, or else a file of lines."""
    kind = CallDatabase if Path(path).suffix in _DATABASES else CallLog
    return kind(path, sync_to_disk=sync_to_disk)


def read_calls(path: str | Path) -> Iterator[RecordedCall]:
    """Yield the calls of a store, without a last one that a kill cut in half.

    Raises:
        DataFormatError: the file is damaged or something else.
    """
    return read_database(path) if is_database(path) else read_lines(path)
