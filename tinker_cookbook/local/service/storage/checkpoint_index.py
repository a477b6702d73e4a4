"""The SQLite index of sessions, runs, samplers and checkpoints.

Several processes may share one file: it uses WAL, a busy timeout, unique ids and short
transactions. A commit is on disk when the call returns (`synchronous=FULL`).

Changes wait for each other, and for other programs that write to the file, so they are made on
other threads than the event loop's. Each thread has its own connection for reading, which does not
wait, so the event loop may read. A damaged row is skipped and logged.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.local.errors import OTHER_STATE_DIR, StorageError
from tinker_cookbook.local.service.storage.rows import (
    SCHEMA,
    TABLES,
    AnyRow,
    CheckpointRow,
    Parameters,
    Row,
    RunRow,
    SamplerRow,
    SessionRow,
    Status,
    to_record,
    to_row,
)

__all__ = ["Index", "IndexDamagedError", "NameTakenError"]

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
WRITE_SECONDS = 30.0
"""Maximum time that a change waits for another program that writes."""
READ_SECONDS = 0.2
"""Maximum time that a read waits. In WAL mode it waits only for a program with an exclusive
lock."""


class IndexDamagedError(Exception):
    """The file is not a database, or its pages are damaged."""


class NameTakenError(Exception):
    """A row with this name already exists."""


class Index:
    """Thread-safe access to the index file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_complete = True
        """False for a new file, until it lists the checkpoints that are in the folder."""
        self._lock = threading.RLock()
        """Held during a change."""
        self._damaged: set[str] = set()
        """Damaged rows that have been logged."""
        self.open()

    def open(self) -> None:
        """Connect to the file; may be called again after `close`.

        Raises:
            ConfigurationError: the file is locked, not writable, or of another format.
            IndexDamagedError: the file is damaged.
        """
        try:
            self._connection = self._open()
        except sqlite3.OperationalError as error:  # locked, no permission, disk full
            raise ConfigurationError(
                f"{self.path} cannot be used as the service's index: {error}; free some space, or "
                f"{OTHER_STATE_DIR}"
            ) from error
        except sqlite3.DatabaseError as error:
            raise IndexDamagedError(f"{self.path} is damaged: {error}") from error
        self._is_closed = False
        self._own = threading.local()
        self._readers: list[sqlite3.Connection] = []

    def _connect(self, timeout: float) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=timeout, isolation_level=None, check_same_thread=False
        )
        connection.row_factory = sqlite3.Row
        return connection

    def _open(self) -> sqlite3.Connection:
        connection = self._connect(WRITE_SECONDS)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, SCHEMA_VERSION):
            raise ConfigurationError(
                f"{self.path} has format {version}, this program reads {SCHEMA_VERSION}; use the "
                "program that made it, or another --state-dir"
            )
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        connection.executescript(SCHEMA)
        self.is_complete = version == SCHEMA_VERSION
        return connection

    @property
    def _reader(self) -> sqlite3.Connection:
        """This thread's connection for reading."""
        reader: sqlite3.Connection | None = getattr(self._own, "reader", None)
        if self._is_closed:
            raise sqlite3.ProgrammingError("the index was closed")
        if reader is None:
            reader = self._own.reader = self._connect(READ_SECONDS)
            reader.execute("PRAGMA query_only=1")
            self._readers.append(reader)
        return reader

    def mark_complete(self) -> None:
        """Record that the index lists all checkpoints, so that other folders may be removed."""
        with self._lock, self._naming_the_file():
            self._connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        self.is_complete = True

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            for reader in self._readers:
                reader.close()
            self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Make one atomic, durable change."""
        with self._lock, self._naming_the_file():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                # sqlite rolls back by itself if the disk failed
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StorageError(f"{self.path} cannot be used: {error}") from error

    def _query(self, sql: str, parameters: Parameters = ()) -> list[sqlite3.Row]:
        with self._naming_the_file():
            return self._reader.execute(sql, parameters).fetchall()

    def insert(self, row: Row) -> None:
        """Add a row, or raise NameTakenError."""
        record = to_record(row)
        table = TABLES[type(row)]
        columns = ", ".join(record)
        marks = ", ".join(f":{key}" for key in record)
        with self.transaction() as connection:
            try:
                connection.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks})", record)
            except sqlite3.IntegrityError as error:
                raise NameTakenError(str(error)) from error

    def _select(
        self, cls: type[AnyRow], where: str = "1", parameters: Parameters = ()
    ) -> list[AnyRow]:
        sql = f"SELECT * FROM {TABLES[cls]} WHERE {where}"
        rows = []
        for record in self._query(sql, parameters):
            try:
                rows.append(to_row(cls, record))
            except (ValueError, TypeError, RecursionError) as error:
                self._log_damage(f"{TABLES[cls]} {record[0]!r}", error)
        return rows

    def _log_damage(self, row: str, error: Exception) -> None:
        if row not in self._damaged:
            self._damaged.add(row)
            logger.error("%s: the row %s is damaged and skipped: %s", self.path, row, error)

    def session(self, session_id: str) -> SessionRow | None:
        return next(iter(self._select(SessionRow, "session_id=?", (session_id,))), None)

    def sessions(self, *, limit: int, offset: int) -> list[SessionRow]:
        order = "1 ORDER BY created_at DESC, session_id DESC LIMIT ? OFFSET ?"
        return self._select(SessionRow, order, (limit, offset))

    def sessions_before(self, created_at: float, session_id: str, limit: int) -> list[SessionRow]:
        """Return the sessions older than a position, newest first."""
        where = (
            "(created_at, session_id) < (?, ?) ORDER BY created_at DESC, session_id DESC LIMIT ?"
        )
        return self._select(SessionRow, where, (created_at, session_id, limit))

    def session_storage(self, session_id: str) -> tuple[int, int]:
        """Return the number and the bytes of a session's checkpoints."""
        record = self._query(
            "SELECT COUNT(*), COALESCE(SUM(size_bytes), 0) FROM checkpoints JOIN runs "
            "USING (run_id) WHERE session_id=? AND (expires_at IS NULL OR expires_at > ?)",
            (session_id, time.time()),
        )[0]
        return record[0], record[1]

    def update_session(
        self,
        session_id: str,
        *,
        status: Status | None = None,
        project_id: str | None = None,
    ) -> None:
        with self.transaction() as connection:
            if status is not None:
                connection.execute(
                    "UPDATE sessions SET status=? WHERE session_id=?",
                    (json.dumps(status), session_id),
                )
            if project_id is not None:
                connection.execute(
                    "UPDATE sessions SET project_id=? WHERE session_id=?", (project_id, session_id)
                )

    def touch_sessions(self, last_seen_at: dict[str, float]) -> None:
        """Record the times of the last requests of sessions."""
        with self.transaction() as connection:
            connection.executemany(
                "UPDATE sessions SET last_seen_at=MAX(last_seen_at, ?) WHERE session_id=?",
                [(seconds, session_id) for session_id, seconds in last_seen_at.items()],
            )

    def run(self, run_id: str) -> RunRow | None:
        return next(iter(self._select(RunRow, "run_id=?", (run_id,))), None)

    def runs(self, *, limit: int, offset: int, project_id: str | None) -> tuple[list[RunRow], int]:
        """Return a page of runs, newest first, and the number of all runs."""
        where = (
            "(?1 IS NULL OR session_id IN (SELECT session_id FROM sessions WHERE project_id=?1))"
        )
        total = self._query(f"SELECT COUNT(*) FROM runs WHERE {where}", (project_id,))[0][0]
        order = f"{where} ORDER BY created_at DESC, run_id DESC LIMIT ?2 OFFSET ?3"
        return self._select(RunRow, order, (project_id, limit, offset)), total

    def runs_of_session(self, session_id: str) -> list[RunRow]:
        return self._select(RunRow, "session_id=? ORDER BY created_at, run_id", (session_id,))

    def touch_runs(self, last_request_at: dict[str, float]) -> None:
        """Record the times of the last uses of runs."""
        with self.transaction() as connection:
            connection.executemany(
                "UPDATE runs SET last_request_at=MAX(last_request_at, ?) WHERE run_id=?",
                [(seconds, run_id) for run_id, seconds in last_request_at.items()],
            )

    def sampler(self, sampler_id: str) -> SamplerRow | None:
        return next(iter(self._select(SamplerRow, "sampler_id=?", (sampler_id,))), None)

    def samplers_of_session(self, session_id: str) -> list[SamplerRow]:
        return self._select(
            SamplerRow, "session_id=? ORDER BY created_at, sampler_id", (session_id,)
        )

    def checkpoint(self, run_id: str, segment: str, name: str) -> CheckpointRow | None:
        """Return a checkpoint, unless it has expired."""
        rows = self._select(
            CheckpointRow,
            "run_id=? AND segment=? AND name=? AND (expires_at IS NULL OR expires_at > ?)",
            (run_id, segment, name, time.time()),
        )
        return next(iter(rows), None)

    def checkpoint_in(self, folder: str) -> CheckpointRow | None:
        """Return the checkpoint of a folder, unless it has expired."""
        where = "folder=? AND (expires_at IS NULL OR expires_at > ?)"
        return next(iter(self._select(CheckpointRow, where, (folder, time.time()))), None)

    def checkpoints(
        self, run_id: str | None = None, *, limit: int = -1, offset: int = 0
    ) -> tuple[list[CheckpointRow], int]:
        """Return a page of checkpoints that have not expired, newest first, and their number."""
        where = "(?1 IS NULL OR run_id=?1) AND (expires_at IS NULL OR expires_at > ?2)"
        parameters = (run_id, time.time())
        total = self._query(f"SELECT COUNT(*) FROM checkpoints WHERE {where}", parameters)[0][0]
        order = f"{where} ORDER BY created_at DESC, folder DESC LIMIT ?3 OFFSET ?4"
        return self._select(CheckpointRow, order, (*parameters, limit, offset)), total

    def put_checkpoint(self, row: CheckpointRow, *, overwrite: bool) -> str | None:
        """Add a checkpoint whose folder is complete.

        Returns:
            The folder of the checkpoint that it replaces, which may now be deleted, or None.

        Raises:
            NameTakenError: the name exists and `overwrite` is false.
        """
        record = to_record(row)
        key = (row.run_id, row.segment, row.name)
        with self.transaction() as connection:
            found = connection.execute(
                "SELECT folder, expires_at FROM checkpoints "
                "WHERE run_id=? AND segment=? AND name=?",
                key,
            ).fetchone()
            if found is not None:
                is_live = found["expires_at"] is None or found["expires_at"] > time.time()
                if is_live and not overwrite:
                    raise NameTakenError(row.tinker_path)
                connection.execute("DELETE FROM checkpoints WHERE folder=?", (found["folder"],))
            columns = ", ".join(record)
            marks = ", ".join(f":{name}" for name in record)
            connection.execute(f"INSERT INTO checkpoints ({columns}) VALUES ({marks})", record)
        return None if found is None else found["folder"]

    @contextmanager
    def changing_checkpoint(
        self, folder: str, changes: dict[str, bool | float | None]
    ) -> Iterator[None]:
        """Change columns of a checkpoint. An error in the `with` block undoes the change."""
        columns = ", ".join(f"{name}=:{name}" for name in changes)
        with self.transaction() as connection:
            connection.execute(
                f"UPDATE checkpoints SET {columns} WHERE folder=:folder",
                {**changes, "folder": folder},
            )
            yield

    def delete_checkpoint(self, folder: str) -> None:
        with self.transaction() as connection:
            connection.execute("DELETE FROM checkpoints WHERE folder=?", (folder,))

    def expired(self, now: float) -> list[str]:
        """Return the folders of the checkpoints that have expired."""
        sql = "SELECT folder FROM checkpoints WHERE expires_at <= ?"
        return [record["folder"] for record in self._query(sql, (now,))]

    def remove_expired(self, now: float) -> None:
        """Remove the checkpoints that `expired` returns for the same time."""
        with self.transaction() as connection:
            connection.execute("DELETE FROM checkpoints WHERE expires_at <= ?", (now,))

    def remove_old_records(self, before: float) -> int:
        """Remove sessions without a request since a time, and their runs and samplers.

        Runs with checkpoints, and their sessions, are kept.

        Returns:
            The number of removed sessions and runs.
        """
        with self.transaction() as connection:
            connection.execute(
                "DELETE FROM samplers WHERE NOT EXISTS (SELECT 1 FROM sessions "
                "WHERE sessions.session_id = samplers.session_id AND last_seen_at >= ?)",
                (before,),
            )
            runs = connection.execute(
                "DELETE FROM runs WHERE last_request_at < ?1 AND NOT EXISTS (SELECT 1 FROM "
                "checkpoints WHERE checkpoints.run_id = runs.run_id) AND NOT EXISTS (SELECT 1 FROM "
                "sessions WHERE sessions.session_id = runs.session_id AND last_seen_at >= ?1)",
                (before,),
            )
            sessions = connection.execute(
                "DELETE FROM sessions WHERE last_seen_at < ? AND NOT EXISTS (SELECT 1 FROM runs "
                "WHERE runs.session_id = sessions.session_id)",
                (before,),
            )
            connection.execute(
                "DELETE FROM copies WHERE tinker_path NOT IN (SELECT 'tinker://' || run_id || '/' "
                "|| segment || '/' || name FROM checkpoints)"
            )
        return runs.rowcount + sessions.rowcount

    def run_ids(self) -> list[str]:
        """Return the ids of all runs."""
        return [record[0] for record in self._query("SELECT run_id FROM runs")]

    def has_folder(self, folder: str) -> bool:
        """Return whether a checkpoint, expired or not, uses this folder."""
        return bool(self._query("SELECT 1 FROM checkpoints WHERE folder=?", (folder,)))

    def copy_of(self, idempotency_key: str) -> str | None:
        """Return the path that an earlier copy request with this key got as its answer."""
        sql = "SELECT tinker_path FROM copies WHERE idempotency_key=?"
        found = self._query(sql, (idempotency_key,))
        return found[0][0] if found else None

    def put_copy(self, idempotency_key: str, tinker_path: str) -> None:
        with self.transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO copies VALUES (?, ?)", (idempotency_key, tinker_path)
            )
