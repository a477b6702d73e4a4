"""An SQLite database of recorded calls, which several processes may write at the same time.

`append` returns after the transaction is committed to the write-ahead log, so a killed process
loses nothing that was appended; SQLite drops what a kill cut in half. Tokens are int32 and logprobs
float64 blobs, so they come back bit for bit.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from tinker_cookbook.capture.calls import RecordedCall
from tinker_cookbook.exceptions import DataFormatError

__all__ = ["CallDatabase", "is_database", "read_database"]

_HEADER = b"SQLite format 3\x00"
_BUSY_SECONDS = 30.0
_COLUMNS = (
    *("rollout", "number", "parent", "new_prompt", "tokens", "logprobs"),
    *("stop_reason", "temperature", "sequence_id", "time"),
)
_CREATE = """
CREATE TABLE IF NOT EXISTS calls (
    id INTEGER PRIMARY KEY,
    rollout TEXT NOT NULL,
    number INTEGER NOT NULL,
    parent INTEGER,
    new_prompt BLOB NOT NULL,
    tokens BLOB NOT NULL,
    logprobs BLOB NOT NULL,
    stop_reason TEXT NOT NULL,
    temperature REAL,
    sequence_id TEXT,
    time REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS calls_of_rollout ON calls (rollout, number);
"""
_INSERT = f"INSERT INTO calls ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM calls"


class CallDatabase:
    """The writer of such a database."""

    def __init__(self, path: str | Path, *, sync_to_disk: bool = False) -> None:
        """Open the database, and make it and its folder if they do not exist.

        Args:
            path: The file.
            sync_to_disk: Whether to wait for the disk on every call, so that records also survive
                a power failure. Costs some milliseconds per call.

        Raises:
            DataFormatError: the file is not such a database.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(
                self.path, timeout=_BUSY_SECONDS, check_same_thread=False, isolation_level=None
            )
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute(f"PRAGMA synchronous={'FULL' if sync_to_disk else 'NORMAL'}")
            self._connection.executescript(_CREATE)
        except sqlite3.DatabaseError as error:
            raise _not_a_database(self.path, error) from error

    def append(self, call: RecordedCall) -> None:
        """Write a call.

        Raises:
            OSError: the call could not be written, for instance because the disk is full. The
                database is as before.
        """
        row = (
            *(call.rollout, call.index, call.parent),
            *(_ints(call.new_prompt), _ints(call.tokens)),
            np.asarray(call.logprobs, np.float64).tobytes(),
            *(call.stop_reason, call.temperature, call.sequence_id, call.time),
        )
        with self._lock:
            try:
                self._connection.execute(_INSERT, row)
            except sqlite3.Error as error:
                raise OSError(f"{self.path} could not be written: {error}") from error

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> CallDatabase:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def is_database(path: str | Path) -> bool:
    """Return whether a file is an SQLite database."""
    with Path(path).open("rb") as file:
        return file.read(len(_HEADER)) == _HEADER


def read_database(path: str | Path, rollout: str | None = None) -> Iterator[RecordedCall]:
    """Yield the calls of a database in the order in which they were recorded.

    Args:
        path: The file. It may be in use.
        rollout: Read only this rollout; None: all.

    Raises:
        DataFormatError: the file is not such a database.
    """
    where, values = ("", ()) if rollout is None else (" WHERE rollout = ?", (rollout,))
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS)
    try:
        for row in connection.execute(f"{_SELECT}{where} ORDER BY id", values):
            name, number, parent, new_prompt, tokens, logprobs, *others = row
            yield RecordedCall(
                name,
                number,
                parent,
                np.frombuffer(new_prompt, np.int32).tolist(),
                np.frombuffer(tokens, np.int32).tolist(),
                np.frombuffer(logprobs, np.float64).tolist(),
                *others,
            )
    except sqlite3.DatabaseError as error:
        raise _not_a_database(path, error) from error
    finally:
        connection.close()


def _ints(tokens: list[int]) -> bytes:
    return np.asarray(tokens, np.int32).tobytes()


def _not_a_database(path: str | Path, error: Exception) -> DataFormatError:
    return DataFormatError(f"{path} is not a database of calls ({error}); use another file.")
